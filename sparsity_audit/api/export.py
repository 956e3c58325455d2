"""`mask export`: the update mask of a pair, in the encoding that is wanted.

Contract: one pass that counts and writes bits, nothing else; encodings other than `packed` are converted
from a packed mask that lies beside the target while it is made.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsity_audit.api.diff import diff
from sparsity_audit.api.engines import EngineName
from sparsity_audit.api.masks import MaskInfo, mask_convert, mask_info
from sparsity_audit.checkpoint.spelling import verify_local
from sparsity_audit.masks.metadata import Encoding
from sparsity_audit.types import Criterion, View

__all__ = ["mask_export"]


def mask_export(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    encoding: Encoding = "packed",
    criterion: Criterion | str = "value",
    view: View | str = View.NATIVE,
    maps: Sequence[tuple[str, str]] = (),
    workers: int | None = None,
    engine: EngineName = "threads",
    overwrite: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> MaskInfo:
    """Write the update mask of a pair; returns what it holds.

    Args:
        base: Directory, file or Hub reference of the base.
        tuned: The same for the tuned side.
        out: New or empty directory for the mask.
        encoding: `packed`, `bool`, `indices` or `pt`.
        criterion: What counts as changed; `top:…` for the largest movements.
        view: As stored, or both sides rounded to bf16.
        maps: (REGEX, REPL) rules that rename tuned tensors to base names.
        workers: Threads; default one a core, at most 8. With an engine, tasks at once.
        engine: `threads` or `ray`, as in `diff`.
        overwrite: Replace an earlier mask there (encoding `packed`).
        on_note: Called with lines for the user.

    Raises:
        SparsityAuditError: As `diff` and `mask_convert` do.
    """

    def make(target: Path, *, replace: bool) -> None:
        diff(
            base,
            tuned,
            criteria=[criterion],
            view=view,
            maps=maps,
            stats="counts",
            mask=target,
            workers=workers,
            engine=engine,
            overwrite=replace,
            on_note=on_note,
        )

    if encoding == "packed":
        make(Path(out), replace=overwrite)
        return mask_info(out)
    verify_local(Path(out))
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{Path(out).name}-", dir=Path(out).absolute().parent))
    try:
        make(scratch / "mask", replace=False)
        return mask_convert(scratch / "mask", out, encoding).result
    finally:
        shutil.rmtree(scratch)
