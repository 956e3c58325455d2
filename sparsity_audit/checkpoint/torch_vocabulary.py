"""What the names in a `torch.save` pickle mean, without torch.

Contract: tensors become `TensorRef`, storages `StorageRef`, kinds of tensors we cannot read `Refused` (an
error only if they belong to the state dict); everything else that `torch.load(weights_only=True)` accepts is
a leaf, and so are numpy scalars, which trainers leave beside the weights. Pieces of distributed checkpoints
are refused by name. Any other name is an UnsafePickleError.

Source: torch 2.13 `torch/_utils.py` (`_rebuild_*`), `torch/_weights_only_unpickler.py`, `torch/storage.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsity_audit.checkpoint.restricted_pickle import (
    LEAF,
    MAX_OPERATIONS,
    MAX_PICKLE_BYTES,
    Call,
    Global,
    Leaf,
    MalformedError,
    load_pickle,
)
from sparsity_audit.errors import UnsafePickleError, UnsupportedFormatError
from sparsity_audit.types import DType

__all__ = [
    "STORAGE_DTYPES",
    "TORCH_DTYPES",
    "Refused",
    "StorageRef",
    "TensorRef",
    "load_distributed",
    "load_state",
    "rebuild_from_type",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRef:
    """One stored run of entries.

    Args:
        type_name: `torch` class of the storage: BFloat16Storage, UntypedStorage, …
        key: Name of the zip member under `data/`.
        num_entries: Entries of that type.
    """

    type_name: str
    key: str
    num_entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """A tensor as the pickle describes it, unchecked.

    Args:
        storage: Where its entries lie.
        start: First entry.
        shape: Sizes.
        strides: Entry strides.
        dtype: torch's name of the dtype, when it differs from the storage's.
    """

    storage: StorageRef
    start: object
    shape: object
    strides: object
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor of a kind that this tool does not read.

    Args:
        what: The kind, as a message says it.
        remedy: What turns it into an ordinary tensor.
    """

    what: str
    remedy: str


STORAGE_DTYPES: dict[str, DType | None] = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
    "ComplexFloatStorage": DType.C64,
    "ComplexDoubleStorage": None,
    "UntypedStorage": None,
}
"""Storage classes; None where the class alone gives no dtype of ours."""

TORCH_DTYPES: dict[str, DType | None] = {
    "float64": DType.F64,
    "float32": DType.F32,
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "float8_e4m3fnuz": DType.F8_E4M3FNUZ,
    "float8_e5m2fnuz": DType.F8_E5M2FNUZ,
    "float8_e8m0fnu": DType.F8_E8M0,
    "int64": DType.I64,
    "int32": DType.I32,
    "int16": DType.I16,
    "int8": DType.I8,
    "uint64": DType.U64,
    "uint32": DType.U32,
    "uint16": DType.U16,
    "uint8": DType.U8,
    "bool": DType.BOOL,
    "complex64": DType.C64,
    "complex32": None,
    "complex128": None,
    "float4_e2m1fn_x2": None,
    **{f"{kind}{bits}": None for kind in ("int", "uint", "bits") for bits in range(1, 8)},
    **dict.fromkeys(
        ("quint8", "qint8", "qint32", "quint4x2", "quint2x4", "bits1x8", "bits2x4", "bits4x2"), None
    ),
    **dict.fromkeys(("bits8", "bits16"), None),
}
"""dtypes; None where torch has one that we do not read."""

_QUANTISED_STORAGES = ("QUInt8Storage", "QInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")
_QUANTISATION_SCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)


def load_state(data: bytes, *, subject: str) -> object:
    """What a `data.pkl` holds: dicts, lists, numbers, text, `TensorRef`, `Refused` and leaves.

    Args:
        data: The pickle.
        subject: What messages call it.

    Raises:
        UnsafePickleError: It names something that is not on the list.
        UnsupportedFormatError: It is a piece of a distributed checkpoint.
        CorruptCheckpointError: It is damaged.
    """
    try:
        return load_pickle(
            data, subject=subject, calls=_CALLS, constants=_CONSTANTS, persistent=_persistent_storage
        )
    except UnsafePickleError as error:
        if "'torch.distributed." in error.found:
            raise UnsupportedFormatError(
                subject,
                "holds distributed tensors: one rank's piece of a sharded checkpoint",
                remedy="name the directory that holds the pieces of all ranks",
            ) from error
        raise


def load_distributed(
    data: bytes,
    *,
    subject: str,
    calls: Mapping[str, Call],
    inert: tuple[str, ...],
    limits: tuple[int, int] = (MAX_PICKLE_BYTES, MAX_OPERATIONS),
) -> object:
    """`load_state` of what a trainer writes for itself: objects of named libraries are read as records.

    Args:
        data: The pickle.
        subject: What messages call it.
        calls: Calls beside those of `load_state`, or in their place.
        inert: What the paths of classes may begin with whose objects become a `Record`.
        limits: Most bytes and most operations.

    Raises:
        UnsafePickleError: It names something that is not on the list.
        CorruptCheckpointError: It is damaged.
    """
    return load_pickle(
        data,
        subject=subject,
        calls={**_CALLS, **calls},
        constants=_CONSTANTS,
        persistent=_persistent_storage,
        inert=inert,
        limits=limits,
    )


def _persistent_storage(identity: object) -> StorageRef:
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise MalformedError("refers to something outside that is not a storage")
    kind, key, num_entries = identity[1], identity[2], identity[4]
    if not isinstance(kind, Global) or not isinstance(key, str) or type(num_entries) is not int:
        raise MalformedError("refers to a storage without type, key or size")
    module, _, type_name = kind.path.rpartition(".")
    if module not in ("torch", "torch.storage") or not type_name.endswith("Storage"):
        raise MalformedError(f"gives a storage the type {kind.path}")
    return StorageRef(type_name=type_name, key=key, num_entries=num_entries)


def _rebuild_tensor(arguments: tuple[object, ...]) -> TensorRef:
    if len(arguments) < 4 or not isinstance(arguments[0], StorageRef):
        raise MalformedError("rebuilds a tensor without storage, start, shape and strides")
    return TensorRef(storage=arguments[0], start=arguments[1], shape=arguments[2], strides=arguments[3])


def _rebuild_tensor_v2(arguments: tuple[object, ...]) -> TensorRef | Refused:
    return _lazy(arguments[6:]) or _rebuild_tensor(arguments)


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> TensorRef | Refused:
    dtype = arguments[6] if len(arguments) > 6 else None
    if not isinstance(dtype, Global) or not dtype.path.startswith("torch."):
        raise MalformedError("rebuilds a tensor without a dtype")
    plain = _rebuild_tensor(arguments)
    return _lazy(arguments[7:]) or TensorRef(
        storage=plain.storage,
        start=plain.start,
        shape=plain.shape,
        strides=plain.strides,
        dtype=dtype.path.removeprefix("torch."),
    )


def _lazy(metadata: tuple[object, ...]) -> Refused | None:
    # torch writes {"conj": True} or {"neg": True} for views whose stored codes are not their values.
    if metadata and metadata[0]:
        return Refused(
            "a lazily conjugated or negated view", "call `.resolve_conj().resolve_neg()` before saving"
        )
    return None


def _rebuild_parameter(arguments: tuple[object, ...]) -> object:
    if not arguments or not isinstance(arguments[0], (TensorRef, Refused)):
        raise MalformedError("rebuilds a parameter without a tensor")
    return arguments[0]


def rebuild_from_type(arguments: tuple[object, ...]) -> object:
    """The tensor that `torch._tensor._rebuild_from_type_v2` would give, without its attributes."""
    if len(arguments) < 3 or not isinstance(arguments[0], Global) or type(arguments[2]) is not tuple:
        raise MalformedError("rebuilds a typed tensor without function and arguments")
    inner = _TENSOR_CALLS.get(arguments[0].path)
    if inner is None or inner is rebuild_from_type:
        raise MalformedError(f"rebuilds a typed tensor with {arguments[0].path}")
    return inner(arguments[2])


def _refuse(what: str, remedy: str) -> Callable[[tuple[object, ...]], Refused]:
    refused = Refused(what, remedy)
    return lambda _: refused


def _mapping(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments and arguments != ([],):
        raise MalformedError("fills a dict in a way torch.save does not")
    return {}


def _size(arguments: tuple[object, ...]) -> object:
    return arguments[0] if len(arguments) == 1 and type(arguments[0]) is tuple else LEAF


def _leaf(_: tuple[object, ...]) -> Leaf:
    return LEAF


_TENSOR_CALLS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch._utils._rebuild_qtensor": _refuse("quantised by torch", "call `.dequantize()` before saving"),
    "torch._utils._rebuild_sparse_tensor": _refuse("sparse", "call `.to_dense()` before saving"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refuse(
        "on the meta device: it has no values", "load the weights before saving"
    ),
    "torch._utils._rebuild_nested_tensor": _refuse("nested", "save its parts as tensors of their own"),
    "torch._utils._rebuild_wrapper_subclass": _refuse("of a tensor subclass", "save it as a plain tensor"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _refuse(
        "saved from an accelerator without storages", "call `.cpu()` before saving"
    ),
    "torch._utils._rebuild_device_tensor_from_numpy": _refuse(
        "saved from an accelerator without storages", "call `.cpu()` before saving"
    ),
}
_CALLS: dict[str, Callable[[tuple[object, ...]], object]] = {
    **_TENSOR_CALLS,
    "collections.OrderedDict": _mapping,
    "collections.Counter": lambda arguments: {} if arguments in ((), ({},)) else LEAF,
    "torch.Size": _size,
    **dict.fromkeys(
        (
            "torch.device",
            "torch.serialization._get_layout",
            "_codecs.encode",
            "builtins.bytearray",
            "builtins.set",
            "builtins.complex",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
        ),
        _leaf,
    ),
}
_CONSTANTS = frozenset(
    [
        f"torch.{name}"
        for name in (*STORAGE_DTYPES, *_QUANTISED_STORAGES, *TORCH_DTYPES, *_QUANTISATION_SCHEMES)
    ]
    + [
        "torch.Tensor",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.storage._UntypedStorage",
    ]
)
