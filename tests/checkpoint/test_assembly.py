"""Pieces cover a tensor exactly or are refused; a rank's part is the part that torch gives it."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity_audit.checkpoint.assembly import Box, verify_cover
from sparsity_audit.checkpoint.dtensors import LocalShard
from sparsity_audit.checkpoint.torch_vocabulary import StorageRef, TensorRef
from sparsity_audit.errors import CorruptCheckpointError, UnsupportedFormatError

LOCAL = TensorRef(storage=StorageRef(type_name="", key="", num_entries=0), start=0, shape=(), strides=())


def covered_once(axes: tuple[int, ...], boxes: list[Box]) -> bool:
    """Counted entry by entry; a box that leaves the tensor, even an empty one, is no part of it."""
    counts = dict.fromkeys(itertools.product(*map(range, axes)), 0)
    for box in boxes:
        for entry in itertools.product(*(range(a, a + n) for a, n in zip(box.start, box.size, strict=True))):
            if entry in counts:
                counts[entry] += 1
        if any(a + n > whole for a, n, whole in zip(box.start, box.size, axes, strict=True)):
            return False
    return all(count == 1 for count in counts.values())


@st.composite
def cut_up(draw):
    """Axes and boxes: a cover made by cutting, perhaps spoiled."""
    axes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    boxes = [Box((0,) * len(axes), axes)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(axes) - 1))
        at = draw(st.integers(0, box.size[axis]))
        for first, size in ((0, at), (at, box.size[axis] - at)):
            start = tuple(s + first * (n == axis) for n, s in enumerate(box.start))
            boxes.append(Box(start, tuple(size if n == axis else s for n, s in enumerate(box.size))))
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(boxes) - 1))
        moved = draw(st.lists(st.integers(0, 2), min_size=len(axes), max_size=len(axes)))
        boxes[number] = Box(tuple(moved), boxes[number].size)
    return axes, boxes


@given(cut_up())
def test_a_cover_is_accepted_exactly_when_every_entry_is_covered_once(case):
    axes, boxes = case
    try:
        verify_cover("here", "w", axes, boxes, hint="")
    except CorruptCheckpointError:
        assert not covered_once(axes, boxes)
    else:
        assert covered_once(axes, boxes)


def test_a_scalar_is_covered_by_one_piece():
    verify_cover("here", "w", (), [Box((), ())], hint="")
    with pytest.raises(CorruptCheckpointError, match="overlap"):
        verify_cover("here", "w", (), [Box((), ()), Box((), ())], hint="")


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2), (1, 4), (2, 3)])
@pytest.mark.parametrize("shape", [(5, 6), (7,), (4, 3, 2), (1, 9)])
def test_the_part_of_a_rank_is_what_torch_computes(mesh, shape):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    choices = [None, *range(len(shape))]
    for cuts in itertools.product(choices, repeat=len(mesh)):
        shard = LocalShard(local=LOCAL, shape=shape, placements=cuts, mesh=mesh)
        placements = [Replicate() if cut is None else Shard(cut) for cut in cuts]
        boxes = []
        for rank, place in enumerate(itertools.product(*map(range, mesh))):
            size, start = _compute_local_shape_and_global_offset(
                shape, mesh, lambda axis, at=place: at[axis], placements
            )
            box = shard.box(rank, math.prod(mesh), subject="w")
            if any(cut is None and at for cut, at in zip(cuts, place, strict=True)):
                assert box is None  # a replica of what an earlier rank holds
                continue
            assert box.size == tuple(size)
            if 0 not in box.size:
                assert box.start == tuple(start)
            boxes.append(box)
        verify_cover("here", "w", shape, boxes, hint="")


def test_a_mesh_of_other_ranks_than_there_are_files_is_refused():
    shard = LocalShard(local=LOCAL, shape=(4,), placements=(0,), mesh=(2,))
    with pytest.raises(UnsupportedFormatError, match="mesh of the 4 ranks"):
        shard.box(0, 4, subject="w")
    unknown = LocalShard(local=LOCAL, shape=(4,), placements=(0, None), mesh=())
    with pytest.raises(UnsupportedFormatError, match="unknown size"):
        unknown.box(0, 4, subject="w")
