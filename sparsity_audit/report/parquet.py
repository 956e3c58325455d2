"""The tensors' table as Parquet: the columns of `tensors.csv`, typed.

Contract: pyarrow (extra `parquet`) is imported here and nowhere else. Counts are int64 (one beyond it
is an error, never a float), missing values are null, and the same record gives the same bytes with the same
pyarrow.
"""

from __future__ import annotations

import io
from typing import Any

from sparsity_audit.errors import MissingExtraError
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.report.tables import tensor_columns

__all__ = ["import_arrow", "tensors_parquet", "verify_parquet"]

_FLOATS = ("l1", "l2", "max_abs", "relative_l2")
_TEXTS = (
    *("name", "tuned_name", "rule", "module", "kind", "shape", "base_dtype", "tuned_dtype", "view"),
    *("base_fingerprint", "tuned_fingerprint"),
)


def tensors_parquet(report: DiffReport) -> bytes:
    """One row a tensor and view, in the order of the CSV.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = import_arrow()
    columns = tensor_columns(report)
    arrays = [arrow.array(values, type=_type_of(name, arrow)) for name, values in columns.items()]
    data = io.BytesIO()
    parquet.write_table(arrow.table(arrays, names=list(columns)), data, compression="zstd")
    return data.getvalue()


def verify_parquet() -> None:
    """Raises MissingExtraError when pyarrow is not installed: before a long pass, not after it."""
    import_arrow()


def _type_of(name: str, arrow: Any) -> Any:
    if name in _TEXTS:
        return arrow.string()
    return arrow.float64() if name in _FLOATS else arrow.int64()


def import_arrow() -> tuple[Any, Any]:
    """Pyarrow and its Parquet module. Raises MissingExtraError when they are not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError(
            "Parquet", "pyarrow is not installed", remedy="pip install 'sparsity-audit[parquet]'"
        ) from error
    return pa, pq
