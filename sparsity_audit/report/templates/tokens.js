"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const digits = (x) => (x === null ? "∞" : x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(1) : x.toPrecision(3));
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "∅";

  // Ten steps of colour; the first value that counts for each.
  const colours = {
    js: { name: "JS divergence", steps: [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.15, 0.2, 0.3, 0.45], value: (c, i) => c.js[i], high: "0.45 and more" },
    delta: { name: "|Δ log p| of the token", steps: [0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1, 2, 4], value: (c, i) => (c.lb[i] === null || c.lt[i] === null ? Infinity : Math.abs(c.lt[i] - c.lb[i])), high: "4 and more" },
    base: { name: "entropy of the base", steps: [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2.5], value: (c, i) => c.hb[i], high: "2.5 and more" },
    tuned: { name: "entropy of the tuned", steps: [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2.5], value: (c, i) => c.ht[i], high: "2.5 and more" },
  };
  for (const [key, colour] of Object.entries(colours)) byId("colour").append(make("option", { value: key }, colour.name));

  const titles = { base: "base's sample", tuned: "tuned's sample", given: "given completion" };
  const blocks = data.prompts.map((prompt) => {
    const article = make("article", { "data-prompt": prompt.number });
    article.append(make("h3", {}, "prompt " + prompt.name), make("pre", { class: "prompt" }, prompt.text));
    const sides = make("div", { class: "sides" });
    const spans = [];
    for (const [set, c] of Object.entries(prompt.sets)) {
      const side = make("div", { class: "side " + set });
      const above = c.js.filter((js) => js > 0.1).length;
      const right = c.score === null ? "" : c.score ? ", right" : ", wrong";
      side.append(make("h4", {}, titles[set] + right + ": " + c.js.length + " tokens, " + above + " with JS > 0.1"));
      const text = make("div", { class: "text", tabindex: "0", role: "group", "aria-label": titles[set] + " of prompt " + prompt.name });
      c.t.forEach((token, i) => {
        const span = document.createElement("span");
        const body = data.tokens[token];
        span.textContent = body.includes("\n") ? body.replace(/\n/g, "⏎\n") : body;
        spans.push([span, c, i]);
        span.about = [c, i, set];
        text.append(span);
      });
      side.append(text);
      sides.append(side);
    }
    article.append(sides);
    const all = Object.values(prompt.sets);
    const total = all.reduce((sum, c) => sum + c.js.reduce((a, b) => a + b, 0), 0);
    const length = all.reduce((sum, c) => sum + c.js.length, 0);
    const searched = (prompt.text + "\n" + all.map((c) => c.t.map((t) => data.tokens[t]).join("")).join("\n")).toLowerCase();
    return { article, spans, mean: length ? total / length : 0, searched };
  });

  const paint = () => {
    const colour = colours[byId("colour").value];
    const threshold = Number(byId("threshold").value);
    for (const { spans } of blocks) {
      for (const [span, c, i] of spans) {
        const value = colour.value(c, i);
        let step = 0;
        while (step < 9 && value >= colour.steps[step + 1]) step++;
        span.className = "k" + step + (threshold ? (c.js[i] > threshold ? " mark" : " dim") : "");
      }
    }
    byId("scale-low").textContent = colour.name + ": 0";
    byId("scale-high").textContent = colour.high;
  };

  const arrange = () => {
    const wanted = byId("filter").value.toLowerCase();
    const shown = blocks.filter((block) => block.searched.includes(wanted));
    if (byId("order").value === "mean") shown.sort((a, b) => b.mean - a.mean);
    byId("list").replaceChildren(...shown.map((block) => block.article));
    byId("count").textContent = shown.length + " of " + blocks.length + " prompts";
    hide();
  };

  const card = byId("card");
  let current = null;
  const hide = () => {
    card.hidden = true;
    if (current) current.classList.remove("at");
    current = null;
  };
  const bar = (share) => {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", "0 0 100 10");
    svg.setAttribute("preserveAspectRatio", "none");
    const rect = document.createElementNS(space, "rect");
    rect.setAttribute("width", String(100 * share));
    rect.setAttribute("height", "10");
    svg.append(rect);
    return svg;
  };
  const distribution = (name, ids, logprobs, token) => {
    const list = make("ol");
    ids.forEach((id, k) => {
      const p = logprobs[k] === null ? 0 : Math.exp(logprobs[k]);
      const item = make("li", id === token ? { class: "here" } : {});
      item.append(bar(p), make("code", {}, visible(data.tokens[id])), make("em", {}, p < 1e-4 ? p.toExponential(0) : p.toFixed(4)));
      list.append(item);
    });
    return make("div", { class: name }, make("b", {}, name), list);
  };
  const show = (span) => {
    if (span === current) return;
    hide();
    const [c, i, set] = span.about;
    const facts = make("dl");
    const delta = c.lb[i] === null || c.lt[i] === null ? "∞" : digits(c.lt[i] - c.lb[i]);
    for (const [name, value] of [
      ["JS", digits(c.js[i])], ["Δ log p", delta],
      ["KL(base‖tuned)", digits(c.kb[i])], ["KL(tuned‖base)", digits(c.kt[i])],
      ["entropy base", digits(c.hb[i])], ["entropy tuned", digits(c.ht[i])],
      ["rank base", c.rb[i]], ["rank tuned", c.rt[i]],
    ]) facts.append(make("dt", {}, name), make("dd", {}, String(value)));
    const two = make("div", { class: "two" });
    two.append(distribution("base", c.bi[i], c.bp[i], c.t[i]), distribution("tuned", c.ti[i], c.tp[i], c.t[i]));
    card.replaceChildren(make("h5", {}, titles[set] + ", position " + i + ": " + visible(data.tokens[c.t[i]])), facts, two);
    card.hidden = false;
    current = span;
    span.classList.add("at");
    place();
  };
  const place = () => {
    if (!current) return;
    const box = current.getBoundingClientRect();
    const size = card.getBoundingClientRect();
    const room = document.documentElement;
    const left = Math.min(Math.max(8, box.left - 40), room.clientWidth - size.width - 8);
    const below = box.bottom + 10;
    const top = below + size.height < room.clientHeight ? below : Math.max(8, box.top - size.height - 10);
    card.style.left = left + "px";
    card.style.top = top + "px";
  };

  const list = byId("list");
  list.addEventListener("pointerover", (event) => (event.target.about ? show(event.target) : hide()));
  list.addEventListener("pointerleave", hide);
  list.addEventListener("focusin", (event) => {
    if (event.target.classList.contains("text") && event.target.matches(":focus-visible") && event.target.firstChild) show(event.target.firstChild);
  });
  list.addEventListener("focusout", hide);
  list.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !event.target.classList.contains("text")) return;
    const here = current && current.parentNode === event.target ? current : null;
    const next = here ? (event.key === "ArrowRight" ? here.nextSibling : here.previousSibling) : event.target.firstChild;
    if (next) {
      next.scrollIntoView({ block: "nearest" });
      show(next);
    }
    event.preventDefault();
  });
  addEventListener("scroll", place, { passive: true, capture: true });
  byId("colour").addEventListener("input", paint);
  byId("threshold").addEventListener("input", paint);
  byId("order").addEventListener("input", arrange);
  byId("filter").addEventListener("input", arrange);
  paint();
  arrange();
})();
