"""Make masks of runs that overlap like real ones, from the mask of one: what `overlap.py` counts.

    python benchmarks/masks.py FIRST FOLDER --runs 10

FIRST is a mask directory. Writes `FOLDER/0` … `FOLDER/9`: FIRST again, then masks that keep 7 of 8 of its
entries and change 1 in 32 of the others, each at random. They name the same base, so they are compared with
it. A folder that holds them all is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsity_audit.masks.bitmask import blocks_of, compared_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.reader import MaskCatalogue, MaskReader, open_mask
from sparsity_audit.masks.shards import INDEX_NAME

SEED = 20261121
KEPT_DRAWS, GAINED_DRAWS = 3, 5


def all_of(draws: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Bits that are set with probability 2⁻ᵈʳᵃʷˢ."""
    size = int(np.prod(shape))
    bits = np.frombuffer(rng.bytes(draws * size), dtype=np.uint8).reshape(draws, *shape)
    return np.bitwise_and.reduce(bits)


def varied(bits: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask of another run, in one block."""
    lost, gained = (all_of(draws, bits.shape, rng) for draws in (KEPT_DRAWS, GAINED_DRAWS))
    return (bits & ~lost | gained) & inside


def write_run(first: MaskCatalogue, folder: Path, seed: int) -> None:
    """One more run; the fingerprint of its tuned side is another one."""
    tensors = {
        name: replace(tensor, fingerprints=(tensor.fingerprints[0], tensor.fingerprints[1] ^ seed))
        for name, tensor in first.tensors.items()
    }
    with MaskReader(first) as reader, MaskWriter(folder, list(tensors.values()), first.metadata) as writer:
        for number, (name, tensor) in enumerate(tensors.items()):
            rng = np.random.default_rng([SEED, seed, number])
            for block in blocks_of(tensor.shape):
                inside = compared_bits(block, tensor.entry_ranges)
                bits = varied(reader.read_block(name, block), inside, rng)
                writer.write_bits(name, block.offset, bits)
        writer.finish({name: tensor.fingerprints for name, tensor in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    runs = [options.folder / str(run) for run in range(options.runs)]
    if all((run / INDEX_NAME).exists() for run in runs):
        return
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    shutil.copytree(options.first, runs[0])
    for seed, run in enumerate(runs[1:], start=1):
        write_run(open_mask(runs[0]), run, seed)


if __name__ == "__main__":
    main()
