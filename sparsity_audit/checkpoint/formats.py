"""Recognise a checkpoint file by its first bytes and read its header.

Contract: the content decides, not the suffix: zip is torch's format, a header that opens a JSON object is
safetensors. What is neither is refused with what it seems to be and how to convert it; a file called
`.safetensors` is read as such, so that its damage is described.
"""

from __future__ import annotations

from contextlib import closing

from sparsity_audit.checkpoint.contents import FileContents
from sparsity_audit.checkpoint.safetensors_io import read_header
from sparsity_audit.checkpoint.store import FileEntry
from sparsity_audit.checkpoint.torch_zip import read_torch_zip
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["GGUF_REMEDY", "read_contents"]

GGUF_REMEDY = (
    "compare the safetensors that it was made from: GGUF renames, permutes and mostly quantises weights, "
    "so that its entries are not those that training changed"
)
_SNIFFED_BYTES = 64
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that opens torch's format before 1.6 (torch/serialization.py, MAGIC_NUMBER)."""


def read_contents(entry: FileEntry, *, file: int) -> FileContents:
    """The tensors of one file.

    Args:
        entry: The file.
        file: The file's index in the catalogue, stored in the specs.

    Raises:
        CorruptCheckpointError: A header contradicts itself or the file.
        UnsupportedFormatError: A format that is not read, with the way to convert it.
        UnsafePickleError: A torch file asks for more than tensors.
    """
    start = _first_bytes(entry)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return read_torch_zip(entry, file=file)
    if start[8:9] == b"{":
        return FileContents(tensors=read_header(entry, file=file)[0])
    _refuse_known(entry, start)
    if entry.path.suffix == ".safetensors":
        return FileContents(tensors=read_header(entry, file=file)[0])
    raise UnsupportedFormatError(
        entry.place,
        f"is neither safetensors nor a zip archive of torch (starts with {start[:8]!r})",
        expected="*.safetensors, or a file that torch.save wrote",
        remedy="check how the file was made or downloaded",
    )


def _first_bytes(entry: FileEntry) -> bytes:
    start = bytearray(min(entry.num_bytes, _SNIFFED_BYTES))
    with closing(entry.open()) as source:
        source.read_into(memoryview(start), 0)
    return bytes(start)


def _refuse_known(entry: FileEntry, start: bytes) -> None:
    if not start:
        raise CorruptCheckpointError(
            entry.place, "is empty", remedy="download or copy the file again, or write it again"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(
            entry.place, "is a Git LFS pointer, not the file itself", remedy="run `git lfs pull` there"
        )
    if start.startswith(_LEGACY) or (start[:1] == b"\x80" and start[1:2] in b"\x01\x02\x03\x04\x05"):
        kind = "torch's format before 1.6" if start.startswith(_LEGACY) else "a bare pickle"
        name = entry.path.name
        raise UnsupportedFormatError(
            entry.place,
            f"is {kind}; it was not read",
            expected="the zip format that torch.save writes",
            remedy="convert it with torch:\n"
            f"    state = torch.load({name!r}, map_location='cpu', weights_only=True)\n"
            f"    torch.save(state, {'zip-' + name!r})",
        )
    if start.startswith(b"GGUF"):
        raise UnsupportedFormatError(entry.place, "is a GGUF file", remedy=GGUF_REMEDY)
