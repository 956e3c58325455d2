"""Compression of a patch's payload: none, or zstd where the extra is installed.

Contract: the only importer of `zstandard`. Each segment is a frame of its own. A frame that claims more than
the caller expects is refused before anything is allocated.
"""

from __future__ import annotations

from typing import Any

from sparsity_audit.errors import MissingExtraError
from sparsity_audit.passes.patch_manifest import Codec

__all__ = ["Compressor"]

_LEVEL = 3


class Compressor:
    """Packs and unpacks segments; one a thread.

    Args:
        codec: `none` or `zstd`.

    Raises:
        MissingExtraError: zstd is asked for and not installed.
    """

    def __init__(self, codec: Codec) -> None:
        self._module = None if codec == "none" else _zstandard()

    def pack(self, data: bytes) -> bytes:
        """The bytes to store."""
        return data if self._module is None else self._module.ZstdCompressor(level=_LEVEL).compress(data)

    def unpack(self, data: bytes, *, limit: int) -> bytes:
        """The bytes that were packed.

        Raises:
            ValueError: Not a frame, or one of more than `limit` bytes.
        """
        if self._module is None:
            return data
        try:
            claimed = self._module.frame_content_size(data)
            if not 0 <= claimed <= limit:
                raise ValueError(f"a frame of {claimed} bytes, where at most {limit} are expected")
            return self._module.ZstdDecompressor().decompress(data, max_output_size=max(limit, 1))
        except self._module.ZstdError as error:
            raise ValueError(f"no zstd frame ({error})") from error


def _zstandard() -> Any:
    try:
        import zstandard  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingExtraError(
            "codec zstd", "zstandard is not installed", remedy="pip install 'sparsity-audit[zstd]'"
        ) from error
    return zstandard
