"use strict";
// The tensors table keeps only the visible rows in the document; names go in as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, text = null) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  };

  const count = (n) => (n === null || n === undefined ? "–" : String(n).replace(/\B(?=(\d{3})+(?!\d))/g, ","));
  const number = (x) => (x === null || x === undefined ? "–" : x === 0 ? "0" : Number(x.toPrecision(4)).toString());
  const share = (part, whole) => {
    if (part === null || part === undefined || !whole) return "–";
    const text = (100 * part / whole).toFixed(1);
    if (text === "0.0" && part) return "<0.1 %";
    return text === "100.0" && part < whole ? ">99.9 %" : text + " %";
  };
  const label = (column, i) => column.labels[column.at[i]];

  // Theme: follows the system until a button says otherwise, for this page view only.
  const themes = [...document.querySelectorAll("button[data-theme]")];
  for (const button of themes) {
    button.addEventListener("click", () => {
      if (button.dataset.theme === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = button.dataset.theme;
      for (const other of themes) other.setAttribute("aria-pressed", String(other === button));
    });
  }

  // Tensors table.
  const ROW = 28;
  const MARGIN = 10;
  const PRINTED = 500;
  const total = data.name.length;
  const state = { view: data.view, criterion: data.criterion, sort: null, down: false };
  const view = () => data.views[state.view];
  const changed = (i) => view().changed[state.criterion][i];
  const unchanged = (i) => (changed(i) === null ? null : data.entries[i] - changed(i));
  const sparsity = (i) => (unchanged(i) === null || !data.entries[i] ? null : unchanged(i) / data.entries[i]);
  const collator = new Intl.Collator("en", { numeric: true });
  const natural = (a, b) => collator.compare(a, b);

  const columns = [
    { id: "name", head: "name", css: "c-name", value: (i) => data.name[i], text: true },
    { id: "layer", head: "layer", css: "c-num", value: (i) => data.layer[i], show: (i) => count(data.layer[i]) },
    { id: "module", head: "module", css: "c-word", value: (i) => label(data.module, i), text: true },
    { id: "kind", head: "kind", css: "c-word", value: (i) => label(data.kind, i), text: true },
    { id: "dtype", head: "dtype", css: "c-word", value: (i) => label(data.dtype, i), text: true },
    { id: "shape", head: "shape", css: "c-word", value: (i) => label(data.shape, i), text: true },
    { id: "entries", head: "entries", css: "c-wide", value: (i) => data.entries[i], show: (i) => count(data.entries[i]) },
    { id: "changed", head: "changed", css: "c-wide", value: changed, show: (i) => count(changed(i)) },
    { id: "sparsity", head: "sparsity", css: "c-num", value: sparsity, show: (i) => share(unchanged(i), data.entries[i]) },
    { id: "rel", head: "‖Δ‖₂ ÷ ‖w‖₂", css: "c-wide", value: (i) => view().rel[i], show: (i) => number(view().rel[i]) },
    { id: "max", head: "max |Δ|", css: "c-num", value: (i) => view().max[i], show: (i) => number(view().max[i]) },
    { id: "flips", head: "sign flips", css: "c-num", value: (i) => view().flips[i], show: (i) => count(view().flips[i]) },
    { id: "rows", head: "rows touched", css: "c-wide", value: (i) => data.rows[i], show: (i) => count(data.rows[i]) },
    { id: "cols", head: "cols touched", css: "c-wide", value: (i) => data.cols[i], show: (i) => count(data.cols[i]) },
  ];

  const table = byId("tensor-table");
  const frame = byId("tensor-window");
  const body = table.tBodies[0];
  let order = [];
  let drawn = "";

  const heads = new Map();
  const group = make("colgroup");
  const row = make("tr");
  for (const column of columns) {
    group.append(make("col", { class: column.css }));
    const head = make("th", { scope: "col", class: column.text ? "w" : "", "data-column": column.id });
    const button = make("button", { type: "button", title: "Sort by " + column.head }, column.head);
    button.addEventListener("click", () => {
      // Numbers start with the largest, names with the first.
      state.down = state.sort === column ? !state.down : !column.text;
      state.sort = column;
      update();
    });
    head.append(button);
    row.append(head);
    heads.set(column, head);
  }
  table.insertBefore(group, table.tHead);
  table.tHead.append(row);

  const options = (select, values, chosen) => {
    for (const [value, text] of values) select.append(make("option", { value }, text));
    select.value = chosen;
  };
  const kinds = [...data.kind.labels].sort();
  options(byId("filter-kind"), [["", "all"], ...kinds.map((kind) => ["=" + kind, kind])], "");
  options(byId("tensor-view"), Object.keys(data.views).map((name) => [name, name]), state.view);
  options(byId("tensor-criterion"), data.criteria.map((name) => [name, name]), state.criterion);

  const matcher = () => {
    const field = byId("filter-text");
    field.removeAttribute("aria-invalid");
    if (!field.value) return () => true;
    if (!byId("filter-regex").checked) {
      const wanted = field.value.toLowerCase();
      return (name) => name.toLowerCase().includes(wanted);
    }
    try {
      const pattern = new RegExp(field.value);
      return (name) => pattern.test(name);
    } catch {
      field.setAttribute("aria-invalid", "true");
      return null;
    }
  };

  const update = () => {
    const matches = matcher();
    if (matches === null) {
      byId("tensor-count").textContent = "That is not a regular expression; the rows are as before.";
      return;
    }
    const kind = byId("filter-kind").value.slice(1);
    order = [];
    for (let i = 0; i < total; i++) {
      if ((!kind || label(data.kind, i) === kind) && matches(data.name[i])) order.push(i);
    }
    const column = state.sort;
    if (column) {
      const sign = state.down ? -1 : 1;
      const values = data.name.map((_, i) => column.value(i));
      order.sort((a, b) => {
        const [x, y] = [values[a], values[b]];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * (column.text ? natural(x, y) : x - y) || a - b;
      });
    }
    for (const [other, head] of heads) {
      if (other === column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.textContent = other.head + (other === column ? (state.down ? " ▼" : " ▲") : "");
    }
    byId("tensor-count").textContent =
      (order.length === total ? count(total) : count(order.length) + " of " + count(total)) +
      (total === 1 ? " tensor" : " tensors") + "; " + state.criterion + ", " + state.view + " view";
    table.setAttribute("aria-rowcount", String(order.length + 1));
    frame.scrollTop = 0;
    drawn = "";
    draw();
  };

  const cells = (position) => {
    const i = order[position];
    const line = make("tr", { "aria-rowindex": String(position + 2) });
    for (const column of columns) {
      if (column.id === "name") {
        const head = make("th", { scope: "row", class: "w" });
        const button = make("button", { type: "button", title: data.name[i] }, data.name[i]);
        button.addEventListener("click", () => detail(i));
        head.append(button);
        line.append(head);
        continue;
      }
      const text = column.show ? column.show(i) : column.value(i);
      line.append(make("td", { class: column.text ? "w" : "", title: text }, text));
    }
    return line;
  };

  const padding = (height) => {
    const line = make("tr", { class: "pad", "aria-hidden": "true" });
    const cell = make("td", { colspan: String(columns.length) });
    cell.style.height = height + "px";
    line.append(cell);
    return line;
  };

  const draw = (limit = null) => {
    const first = limit === null ? Math.max(0, Math.floor(frame.scrollTop / ROW) - MARGIN) : 0;
    const room = limit === null ? Math.ceil(frame.clientHeight / ROW) + 2 * MARGIN : limit;
    const last = Math.min(order.length, first + room);
    const key = first + ":" + last;
    if (key === drawn) return;
    const held = document.activeElement && body.contains(document.activeElement) ? document.activeElement.title : null;
    drawn = key;
    const lines = [];
    if (limit === null) lines.push(padding(first * ROW));
    for (let position = first; position < last; position++) lines.push(cells(position));
    if (limit === null) lines.push(padding((order.length - last) * ROW));
    body.replaceChildren(...lines);
    if (held !== null) {
      const again = [...body.querySelectorAll("button")].find((button) => button.title === held);
      if (again) again.focus({ preventScroll: true });
    }
  };

  const detail = (i) => {
    const list = make("dl");
    const add = (name, value) => list.append(make("dt", {}, name), make("dd", {}, value));
    add("name", data.name[i]);
    if (data.tuned[i] !== undefined) add("tuned name", data.tuned[i]);
    add("matched by", label(data.rule, i));
    add("kind, module, layer", label(data.kind, i) + ", " + label(data.module, i) + ", " + count(data.layer[i]));
    add("shape, dtype", label(data.shape, i) + ", " + label(data.dtype, i));
    for (const [name, found] of Object.entries(data.views)) {
      const shown = data.criteria
        .filter((key) => found.changed[key][i] !== null)
        .map((key) => key + " " + count(found.changed[key][i]));
      add("changed, " + name, shown.join("; ") + " of " + count(data.entries[i]) + " entries");
      add("Δ, " + name, "‖Δ‖₂ " + found.l2[i] + "; ÷ ‖w‖₂ " + (found.rel[i] ?? "–") + "; max |Δ| " + found.max[i] +
        "; " + count(found.flips[i]) + " sign flips");
    }
    if (data.rows[i] !== null) add("touched", count(data.rows[i]) + " rows, " + count(data.cols[i]) + " columns");
    if (data.decayRows[i] !== undefined) add("decay-only rows", count(data.decayRows[i]));
    if (data.sigma[i] !== undefined) add("fitted displacement σ", String(data.sigma[i]));
    add("fingerprints", "base " + data.baseFp[i] + ", tuned " + data.tunedFp[i]);
    const panel = byId("tensor-detail");
    panel.replaceChildren(list);
    const map = data.maps.find((found) => found.i === i);
    if (map) panel.append(drawMap(map));
  };

  // Row and column maps.
  const NS = "http://www.w3.org/2000/svg";
  const strip = (what, bins, lines, across, low, high) => {
    const svg = document.createElementNS(NS, "svg");
    const set = (element, attributes) => {
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    };
    set(svg, {
      viewBox: "0 0 " + bins.length + " 1", preserveAspectRatio: "none", class: "strip", role: "img",
      "aria-label": "Changed share along the " + what,
    });
    bins.forEach((changedEntries, b) => {
      const from = Math.floor((b * lines) / bins.length);
      const to = Math.floor(((b + 1) * lines) / bins.length);
      const whole = (to - from) * across;
      const rect = document.createElementNS(NS, "rect");
      const step = Math.round((20 * (changedEntries / whole - low)) / (high - low));
      set(rect, { x: b, y: 0, width: 1.02, height: 1, class: "h" + step });
      const title = document.createElementNS(NS, "title");
      const range = to - from === 1 ? what.slice(0, -1) + " " + count(from) : what + " " + count(from) + "–" + count(to - 1);
      title.textContent = range + ": " + count(changedEntries) + " of " + count(whole) + " changed (" + share(changedEntries, whole) + ")";
      rect.append(title);
      svg.append(rect);
    });
    return svg;
  };
  const densities = (bins, lines, across) =>
    bins.map((n, b) => n / ((Math.floor(((b + 1) * lines) / bins.length) - Math.floor((b * lines) / bins.length)) * across));

  const drawMap = (map) => {
    const [rows, cols] = map.n;
    // Ends on tens of percent, so that noise of a fraction of a percent does not look like stripes.
    const all = [...densities(map.rows, rows, cols), ...densities(map.cols, cols, rows)];
    const low = Math.min(0.9, Math.floor(10 * Math.min(...all)) / 10);
    const high = Math.max(low + 0.1, Math.ceil(10 * Math.max(...all)) / 10);
    const box = make("div", { class: "map" });
    box.append(make("h3", { class: "name" }, data.name[map.i]));
    const whole = map.rows.reduce((a, b) => a + b, 0);
    box.append(make("p", { class: "quiet" }, count(whole) + " of " + count(rows * cols) + " changed (" + share(whole, rows * cols) +
      "); colours from " + Math.round(100 * low) + " % to " + Math.round(100 * high) + " %"));
    box.append(make("p", {}, count(rows) + " rows, stripe score " + number(map.d[0])), strip("rows", map.rows, rows, cols, low, high));
    box.append(make("p", {}, count(cols) + " columns, stripe score " + number(map.d[1])), strip("columns", map.cols, cols, rows, low, high));
    return box;
  };

  const choice = byId("map-choice");
  if (choice) {
    const most = Math.min(3, data.maps.length);
    options(choice, [["", "the " + most + " most uneven"], ...data.maps.map((map, m) => [String(m), data.name[map.i]])], "");
    const show = () => {
      const chosen = choice.value === "" ? data.maps.slice(0, most) : [data.maps[Number(choice.value)]];
      byId("map-view").replaceChildren(...chosen.map(drawMap));
    };
    choice.addEventListener("change", show);
    show();
  }

  byId("tensor-controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["filter-text", "filter-regex", "filter-kind"]) byId(id).addEventListener("input", update);
  byId("tensor-view").addEventListener("input", (event) => { state.view = event.target.value; update(); });
  byId("tensor-criterion").addEventListener("input", (event) => { state.criterion = event.target.value; update(); });
  frame.addEventListener("scroll", () => draw(), { passive: true });
  window.addEventListener("resize", () => draw());
  window.addEventListener("beforeprint", () => { drawn = ""; draw(PRINTED); });
  window.addEventListener("afterprint", () => { drawn = ""; draw(); });
  update();
})();
