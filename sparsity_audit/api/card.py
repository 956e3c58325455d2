"""`mask card`: the README of a mask, as the Hub shows it.

Contract: a pure function of the mask's own record; the same mask gives the same text. It says what a bit
means, under which criterion and view, how many entries are selected per module, and how to read the bits with
numpy alone. It never offers the mask as a pruning mask.

Source: model cards, https://huggingface.co/docs/hub/model-cards (YAML front matter between `---`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsity_audit.align.roles import role_of
from sparsity_audit.api.masks import MaskInfo, MaskTensorInfo, mask_info
from sparsity_audit.checkpoint.hub_reference import parse_reference
from sparsity_audit.errors import UsageError
from sparsity_audit.masks.metadata import UNSPECIFIED, SourceReference
from sparsity_audit.report.output import write_atomically
from sparsity_audit.stats.findings import percent

__all__ = ["card_text", "mask_card"]

_TAGS = ("sparsity-audit", "update-mask")
_FILES = {
    "packed": "mask-*.safetensors",
    "bool": "mask-*.safetensors",
    "indices": "mask-*.safetensors",
    "pt": "mask.pt",
}
_SNIPPETS = {
    "packed": """import glob, json, numpy as np
from safetensors import safe_open
mask = {}
for path in sorted(glob.glob("mask-*.safetensors")):
    with safe_open(path, "np") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            bits = np.unpackbits(file.get_tensor(name), axis=-1, count=(shape or [1])[-1], bitorder="little")
            mask[name] = bits.reshape(shape)
""",
    "bool": """import glob
from safetensors import safe_open
mask = {}
for path in sorted(glob.glob("mask-*.safetensors")):
    with safe_open(path, "np") as file:
        mask |= {name: file.get_tensor(name) for name in file.keys()}
""",
    "indices": """import glob, json, numpy as np
from safetensors import safe_open
mask = {}
for path in sorted(glob.glob("mask-*.safetensors")):
    with safe_open(path, "np") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            mask[name] = np.zeros(shape, bool)
            mask[name].flat[file.get_tensor(name)] = True
""",
    "pt": """import torch
mask = torch.load("mask.pt", weights_only=True)
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    label: str
    tensors: int
    compared: int
    selected: int


def mask_card(path: str | Path, out: str | Path | None = None) -> str:
    """The card of the mask at `path`, also written to `out` where one is given.

    Args:
        path: A mask directory.
        out: File for the card.

    Raises:
        UsageError: `path` is a single file of another tool.
        MaskError: It is no mask.
        OutputError: `out` cannot be written.
    """
    if Path(path).is_file():
        raise UsageError(
            str(path),
            "is a file",
            expected="a mask directory",
            remedy=f"sparsity-audit mask convert {path} -o MASK",
        )
    text = card_text(mask_info(path))
    if out is not None:
        write_atomically(Path(out), text.encode())
    return text


def card_text(info: MaskInfo) -> str:
    """The card of a mask."""
    parts = [_front_matter(info), _what(info), _made_of(info), _density(info), _loading(info), _warning()]
    return "\n".join(parts)


def _front_matter(info: MaskInfo) -> str:
    import yaml

    front: dict[str, object] = {"tags": list(_TAGS)}
    base = _repository(info.metadata.base)
    if base is not None:
        front["base_model"] = [base]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _repository(source: SourceReference | None) -> str | None:
    """`org/model` of a side that came from the Hub."""
    if source is None or not source.resolved.startswith("hf://"):
        return None
    try:
        reference = parse_reference(source.resolved)
    except UsageError:
        return None
    return None if reference is None else reference.repo_id


def _what(info: MaskInfo) -> str:
    metadata = info.metadata
    rule = "an unspecified criterion" if metadata.criterion == UNSPECIFIED else f"`{metadata.criterion}`"
    view = "" if metadata.view == UNSPECIFIED else f" in the {metadata.view} view ({_VIEWS[metadata.view]})"
    operation = metadata.origin.get("operation", "diff")
    made = "" if operation == "diff" else f" It was made by the operation `{operation}`."
    return f"""# Update mask

One bit for every entry of a checkpoint: **1 = updated** between base and tuned (or, for derived masks,
selected for training), 0 = not updated. "Updated" means changed under {rule}{view}.{made}
Entries that were not compared (outside `compared_rows` in the metadata) are 0, which there says nothing.

| | |
|---|---|
| polarity | 1 = updated |
| criterion | `{metadata.criterion}` |
| view | {metadata.view} |
| entries | {info.entries:,} |
| compared | {info.compared:,} |
| selected | {info.selected:,} |
| update density | {_share(info.selected, info.compared)} of compared entries |
| encoding | `{info.encoding}` |
| written by | {metadata.tool} |
"""


_VIEWS = {"native": "values as stored", "served": "both sides rounded to bf16"}


def _made_of(info: MaskInfo) -> str:
    rows = [
        f"| {side} | {_cell(source.reference)} | {_cell(source.resolved)} |"
        for side, source in (("base", info.metadata.base), ("tuned", info.metadata.tuned))
        if source is not None
    ]
    if not rows:
        return "The checkpoints it was made from are not recorded.\n"
    return "\n".join(["| side | as given | resolved |", "|---|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    plain = "".join(c if c.isprintable() else "�" for c in text)
    return "`" + plain.replace("`", "'").replace("|", "\\|") + "`"


def _density(info: MaskInfo) -> str:
    lines = ["## Density per module", "", "| module | tensors | compared | selected | density |"]
    lines.append("|---|---|---|---|---|")
    for group in _groups(info.tensors):
        share = _share(group.selected, group.compared)
        lines.append(
            f"| {group.label} | {group.tensors:,} | {group.compared:,} | {group.selected:,} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _groups(tensors: Sequence[MaskTensorInfo]) -> list[_Group]:
    found: dict[str, list[MaskTensorInfo]] = {}
    for tensor in tensors:
        found.setdefault(role_of(tensor.name, {}).module, []).append(tensor)
    return [
        _Group(
            label=label,
            tensors=len(members),
            compared=sum(t.compared for t in members),
            selected=sum(t.selected for t in members),
        )
        for label, members in sorted(found.items())
    ]


def _share(part: int, whole: int) -> str:
    return percent(part, whole) if whole else "–"


def _loading(info: MaskInfo) -> str:
    return f"""## Load it

The files (`{_FILES[info.encoding]}`) hold the base's tensor names.

```python
{_SNIPPETS[info.encoding]}```

Or with the tool that wrote it: `sparsity-audit mask info .` and
`sparsity-audit mask convert . -o OUT --format bool`.
"""


def _warning() -> str:
    return """## What it is not

**This is not a pruning mask.** A 0 means that the weight keeps its base value; read by a pruning tool such as
`torch.nn.utils.prune` it would set the weight to zero and destroy the model. A sparse update is not a sparse
model. For training with the mask, freeze the weights where it is 0: multiplying gradients is not enough,
because weight decay and the optimizer's momentum still move them.
"""
