"""Writing in place, stopping anywhere, and refusing what is not a mask."""

import errno
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from sparsity_audit.errors import ChangedInputError, MaskError, OutputError
from sparsity_audit.masks.bitmask import pack_bits
from sparsity_audit.masks.container import MaskWriter
from sparsity_audit.masks.metadata import MaskMetadata, MaskTensor
from sparsity_audit.masks.reader import MaskReader, open_mask

_SHAPES = {"a.weight": (3, 13), "b.bias": (9,), "c": ()}
_BITS = {name: np.asarray(np.arange(np.prod(s)).reshape(s) % 3 == 0) for name, s in _SHAPES.items()}
_TENSORS = [MaskTensor.whole(name, shape) for name, shape in _SHAPES.items()]
_METADATA = MaskMetadata(criterion="value", view="native", tool="test")
_SHARD = "mask-00001-of-00001.safetensors"


def _fill(writer: MaskWriter, names=tuple(_SHAPES)) -> None:
    for name in names:
        writer.write_bits(name, 0, pack_bits(_BITS[name]))


def _make(target: Path, **options) -> Path:
    with MaskWriter(target, _TENSORS, _METADATA, **options) as writer:
        _fill(writer)
        writer.finish(dict.fromkeys(_SHAPES, (7, 8)))
    return target


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _edit(folder: Path, change) -> None:
    """Rewrite the only shard's header through `change(header)`."""
    path = folder / _SHARD
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def _edit_json(folder: Path, key: str, change) -> None:
    def edit(header):
        value = json.loads(header["__metadata__"][key])
        header["__metadata__"][key] = json.dumps(change(value))

    _edit(folder, edit)


# ---- writing


def test_an_unfinished_mask_cannot_be_opened_and_says_how_to_go_on(tmp_path):
    writer = MaskWriter(tmp_path / "m", _TENSORS, _METADATA)
    _fill(writer)
    writer.close()
    with pytest.raises(MaskError, match=r"unfinished mask[^\0]*goes on where it stopped"):
        open_mask(tmp_path / "m")


def test_abort_leaves_nothing_behind_not_even_the_directory(tmp_path):
    writer = MaskWriter(tmp_path / "new" / "m", _TENSORS, _METADATA)
    _fill(writer)
    writer.abort()
    assert not (tmp_path / "new" / "m").exists()


def test_an_exception_inside_the_with_block_aborts(tmp_path):
    def run():
        with MaskWriter(tmp_path / "m", _TENSORS, _METADATA) as writer:
            _fill(writer)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(tmp_path.iterdir()) == []


def test_abort_after_finish_keeps_the_mask(tmp_path):
    writer = MaskWriter(tmp_path / "m", _TENSORS, _METADATA)
    _fill(writer)
    writer.finish()
    writer.abort()
    assert open_mask(tmp_path / "m").tensors.keys() == _SHAPES.keys()


def test_resuming_keeps_the_bits_and_ends_in_the_same_bytes(tmp_path):
    whole = _make(tmp_path / "whole", max_shard_bytes=7)
    first = MaskWriter(tmp_path / "m", _TENSORS, _METADATA, max_shard_bytes=7)
    assert not first.reused
    _fill(first, ["a.weight"])
    first.close()
    second = MaskWriter(tmp_path / "m", _TENSORS, _METADATA, max_shard_bytes=7, resume=True)
    assert second.reused
    _fill(second, ["b.bias", "c"])
    second.finish(dict.fromkeys(_SHAPES, (7, 8)))
    assert _bytes(tmp_path / "m") == _bytes(whole)


@pytest.mark.parametrize("stop_after", range(12))
def test_a_kill_at_any_step_of_finish_can_be_resumed(tmp_path, monkeypatch, stop_after):
    """Let finish do `stop_after` system calls, then die without any cleaning up."""
    whole = _make(tmp_path / "whole", max_shard_bytes=7)
    writer = MaskWriter(tmp_path / "m", _TENSORS, _METADATA, max_shard_bytes=7)
    _fill(writer)
    steps = 0

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps > stop_after:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", counted(os.pwrite))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "replace", counted(Path.replace))
        try:
            writer.finish(dict.fromkeys(_SHAPES, (7, 8)))
        except Killed:
            # The index is renamed last: once it is there, nothing but a flush is missing.
            if (tmp_path / "m" / "mask.safetensors.index.json").exists():
                assert _bytes(tmp_path / "m") == _bytes(whole)
            else:
                with pytest.raises(MaskError):
                    open_mask(tmp_path / "m")
    writer.close()
    again = MaskWriter(tmp_path / "m", _TENSORS, _METADATA, max_shard_bytes=7, resume=True)
    assert again.reused
    again.finish(dict.fromkeys(_SHAPES, (7, 8)))
    assert _bytes(tmp_path / "m") == _bytes(whole)


@pytest.mark.parametrize("works", range(5))
def test_a_finish_that_fails_leaves_nothing_under_final_names_after_abort(tmp_path, monkeypatch, works):
    writer = MaskWriter(tmp_path / "m", _TENSORS, _METADATA, max_shard_bytes=7)
    _fill(writer)
    done = 0
    replace = Path.replace

    def fails_later(*args):
        nonlocal done
        done += 1
        if done > works:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails_later)
        if works >= 3:  # two shards and the index: nothing fails
            writer.finish()
        else:
            with pytest.raises(OutputError, match="Input/output error"):
                writer.finish()
    writer.abort()
    assert (tmp_path / "m").exists() == (works >= 3)


def test_resuming_with_other_metadata_starts_from_zero(tmp_path):
    first = MaskWriter(tmp_path / "m", _TENSORS, _METADATA)
    _fill(first)
    first.close()
    other = MaskMetadata(criterion="bitwise", view="native", tool="test")
    second = MaskWriter(tmp_path / "m", _TENSORS, other, resume=True)
    assert not second.reused
    second.finish()
    with MaskReader(open_mask(tmp_path / "m")) as reader:
        assert not reader.read_packed("a.weight").any()


def test_resuming_never_touches_the_finished_mask_of_another_run(tmp_path):
    before = _bytes(_make(tmp_path / "m"))
    other = MaskMetadata(criterion="bitwise", view="native", tool="test")
    with pytest.raises(OutputError, match="belongs to another mask"):
        MaskWriter(tmp_path / "m", _TENSORS, other, resume=True)
    assert _bytes(tmp_path / "m") == before


def test_a_directory_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"exists and is not empty[^\0]*remedy: choose another directory"):
        MaskWriter(tmp_path, _TENSORS, _METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OutputError, match="is a file"):
        MaskWriter(tmp_path / "notes.txt", _TENSORS, _METADATA)


def test_a_full_disk_is_reported_before_any_work_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left on device[^\0]*free space"):
        MaskWriter(tmp_path / "m", _TENSORS, _METADATA)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_names_the_file(tmp_path, monkeypatch):
    writer = MaskWriter(tmp_path / "m", _TENSORS, _METADATA)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=_SHARD):
            _fill(writer)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_fallocate_still_works(tmp_path, monkeypatch):
    def unsupported(*_args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    expected = _bytes(_make(tmp_path / "whole"))
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert _bytes(_make(tmp_path / "m")) == expected


def test_an_unwritable_place_is_refused(tmp_path, monkeypatch):
    def denied(*_args, **_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)  # the modes of real directories do not stop root
    with pytest.raises(OutputError, match=r"Permission denied[^\0]*a directory you may write to"):
        MaskWriter(tmp_path / "m", _TENSORS, _METADATA)


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        MaskWriter(tmp_path / "file" / "m", _TENSORS, _METADATA)


def test_threads_may_write_at_once(tmp_path):
    mask = np.asarray(np.random.default_rng(0).random((64, 800)) < 0.3)
    packed = pack_bits(mask)
    with MaskWriter(tmp_path / "m", [MaskTensor.whole("w", mask.shape)], _METADATA) as writer:
        threads = [
            threading.Thread(
                target=lambda rows: [writer.write_bits("w", int(r) * 100, packed[r]) for r in rows],
                args=(range(part, 64, 4),),
            )
            for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    with MaskReader(open_mask(tmp_path / "m")) as reader:
        assert np.array_equal(reader.read_packed("w", 10, 20), packed[10:20])


def test_a_mask_without_tensors_is_a_mask(tmp_path):
    with MaskWriter(tmp_path / "m", [], _METADATA) as writer:
        writer.finish()
    assert open_mask(tmp_path / "m").tensors == {}


# ---- reading what cannot be trusted


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "pt", "not a mask of this tool"),
        ("format_version", "2", "mask format version '2'"),
        ("polarity", "0=updated", r"polarity '0=updated'[^\0]*--inverted"),
        ("encoding", "zip", "encoding 'zip'"),
        ("shapes", "{", "'shapes' is not JSON"),
        ("shapes", "[" * 100_000, "'shapes' is not JSON"),
        ("shapes", "[]", "'shapes' is not a JSON object"),
        ("shapes", "{}", r"tensor 'a.weight'.*missing in shapes"),
        ("aliases", '{"x":"nowhere"}', "alias 'x'"),
        ("aliases", '{"\\ud800":"c"}', r"alias '\\ud800'.*is no name"),
        ("aliases", '{"\\u001b[31m":"c"}', "alias .*is no name"),
        ("references", '{"base":3}', "'references' is malformed"),
    ],
)
def test_metadata_that_cannot_be_believed_is_refused(tmp_path, key, value, message):
    _make(tmp_path / "m")
    _edit(tmp_path / "m", lambda header: header["__metadata__"].update({key: value}))
    with pytest.raises(MaskError, match=message) as caught:
        open_mask(tmp_path / "m")
    assert _SHARD in str(caught.value)


@pytest.mark.parametrize("key", ["shapes", "view", "compared_rows", "fingerprints", "references", "encoding"])
def test_missing_metadata_is_named(tmp_path, key):
    _make(tmp_path / "m")
    _edit(tmp_path / "m", lambda header: header["__metadata__"].pop(key))
    with pytest.raises(MaskError, match=key):
        open_mask(tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shapes", [3, 30], r"U8 of shape \[3, 2\][^\0]*expected: U8 of shape \[3, 4\]"),
        ("shapes", [3, -1], "a list of sizes"),
        ("shapes", [1] * 65, "a list of sizes"),
        ("shapes", "no", "a list of sizes"),
        ("compared_rows", [[0, 4]], "within"),
        ("compared_rows", [[2, 3], [0, 1]], "sorted, disjoint"),
        ("compared_rows", [[1, 1]], "not empty"),
        ("compared_rows", 5, r"\[start, stop\]"),
        ("compared_rows", [[True, 2]], r"\[start, stop\]"),
        ("fingerprints", ["0" * 16], "16 hex digits"),
        ("fingerprints", ["0" * 16, "G" * 16], "16 hex digits"),
        ("fingerprints", ["0" * 16, "+" + "0" * 15], "16 hex digits"),
    ],
)
def test_a_tensor_whose_description_is_impossible_is_named(tmp_path, key, value, message):
    _make(tmp_path / "m")
    _edit_json(tmp_path / "m", key, lambda table: table | {"a.weight": value})
    with pytest.raises(MaskError, match=message) as caught:
        open_mask(tmp_path / "m")
    assert "a.weight" in str(caught.value)


def test_a_tensor_of_another_dtype_is_refused(tmp_path):
    _make(tmp_path / "m")
    _edit(tmp_path / "m", lambda header: header["b.bias"].update(dtype="I8"))
    with pytest.raises(MaskError, match=r"'b.bias': I8 of shape \[2\]"):
        open_mask(tmp_path / "m")


def test_a_truncated_shard_is_refused_as_a_mask_error(tmp_path):
    _make(tmp_path / "m")
    raw = (tmp_path / "m" / _SHARD).read_bytes()
    (tmp_path / "m" / _SHARD).write_bytes(raw[:-1])
    with pytest.raises(MaskError, match="truncated"):
        open_mask(tmp_path / "m")


def test_a_missing_shard_is_named(tmp_path):
    _make(tmp_path / "m", max_shard_bytes=7)
    (tmp_path / "m" / "mask-00002-of-00002.safetensors").unlink()
    with pytest.raises(MaskError, match="mask-00002-of-00002"):
        open_mask(tmp_path / "m")


def test_a_directory_in_the_place_of_a_shard_is_refused(tmp_path):
    _make(tmp_path / "m")
    (tmp_path / "m" / _SHARD).unlink()
    (tmp_path / "m" / _SHARD).mkdir()
    with pytest.raises(MaskError, match=f"{_SHARD}: is not a file"):
        open_mask(tmp_path / "m")


def test_shards_of_two_masks_are_not_mixed(tmp_path):
    _make(tmp_path / "m", max_shard_bytes=7)
    other = MaskMetadata(criterion="bitwise", view="native", tool="test")
    with MaskWriter(tmp_path / "n", _TENSORS, other, max_shard_bytes=7) as writer:
        writer.finish()
    name = "mask-00002-of-00002.safetensors"
    (tmp_path / "n" / name).replace(tmp_path / "m" / name)
    with pytest.raises(MaskError, match=r"belongs to another mask than mask-00001-of-00002"):
        open_mask(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "lacks weight_map"),
        (lambda index: index["weight_map"].pop("c"), "tensor 'c'.*index places it in None"),
        (lambda index: index["weight_map"].update(ghost=_SHARD), "tensor 'ghost'.*not in"),
        (lambda index: index["weight_map"].update(c="../x.safetensors"), "names the shard '../x"),
        (lambda index: index["metadata"].update(shards=[]), "lacks weight_map or metadata.shards"),
        (lambda index: index["metadata"].update(shards=[_SHARD, _SHARD]), "lists a shard twice"),
        (lambda index: index["metadata"]["shards"].append(".."), r"names the shard '\.\.'"),
        (lambda index: index["metadata"]["shards"].append(""), "names the shard ''"),
        (lambda index: index["metadata"]["shards"].append("a\0b"), "names the shard 'a"),
        (lambda index: index["metadata"]["shards"].append("\ud800"), "names the shard"),
        (lambda index: index["metadata"]["shards"].append([_SHARD]), "names the shard"),
        (lambda index: index["metadata"].update(shards=[f"s{i}" for i in range(200_000)]), "names the shard"),
    ],
)
def test_an_index_that_the_shards_do_not_confirm_is_refused(tmp_path, change, message):
    _make(tmp_path / "m")
    path = tmp_path / "m" / "mask.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(MaskError, match=message):
        open_mask(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\udcff"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path, text):
    _make(tmp_path / "m")
    (tmp_path / "m" / "mask.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MaskError, match=r"is not JSON|lacks weight_map"):
        open_mask(tmp_path / "m")


def test_bits_beyond_the_last_column_are_refused_when_read(tmp_path):
    _make(tmp_path / "m")
    path = tmp_path / "m" / _SHARD
    raw = bytearray(path.read_bytes())
    raw[-9] |= 0x80  # a.weight is 6 bytes, b.bias 2, c 1: the last byte of a.weight's first row is −8
    raw[-8] |= 0x80
    path.write_bytes(raw)
    with (
        MaskReader(open_mask(tmp_path / "m")) as reader,
        pytest.raises(MaskError, match=r"'a.weight'.*beyond the last column"),
    ):
        reader.read_packed("a.weight")


def test_bits_outside_the_compared_rows_are_refused_when_read(tmp_path):
    _make(tmp_path / "m")
    _edit_json(tmp_path / "m", "compared_rows", lambda table: table | {"a.weight": [[1, 3]]})
    with (
        MaskReader(open_mask(tmp_path / "m")) as reader,
        pytest.raises(MaskError, match=r"'a.weight'.*outside the compared rows"),
    ):
        reader.read_packed("a.weight")


def test_a_mask_that_changes_while_it_is_read_is_refused(tmp_path):
    _make(tmp_path / "m")
    with MaskReader(open_mask(tmp_path / "m")) as reader:
        reader.read_packed("a.weight")
        os.utime(tmp_path / "m" / _SHARD, (1, 1))
        with pytest.raises(ChangedInputError, match=_SHARD):
            reader.read_packed("a.weight")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no mask.safetensors.index.json"),
        (["model.safetensors", "config.json"], r"is a checkpoint, not a mask[^\0]*mask export"),
        (["theirs.safetensors"], r"holds no[^\0]*mask convert"),
    ],
)
def test_a_directory_without_a_mask_says_what_to_do(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(MaskError, match=message):
        open_mask(tmp_path)


def test_a_path_that_is_missing_or_a_file_says_so(tmp_path):
    with pytest.raises(MaskError, match="does not exist"):
        open_mask(tmp_path / "nowhere")
    (tmp_path / "m.pt").touch()
    with pytest.raises(MaskError, match="is a file"):
        open_mask(tmp_path / "m.pt")
