"""`--evict`: one file at a time through the cache, and nothing left of what was not there before."""

from __future__ import annotations

from pathlib import Path

import pytest
from streaming import QUICK, checkpoint, local, numbers, save

from sparsity_audit.api.diff import diff
from sparsity_audit.checkpoint.access import hub_access
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.errors import HubError

SHARDS = "hf://org/base", "hf://org/tuned"


def by_shard(**options):
    with hub_access("shards"):
        return diff(*SHARDS, **{**QUICK, **options})


def cached(tmp_path: Path) -> list[str]:
    """Contents and names of weights that the cache holds."""
    files = (p for p in (tmp_path / "hub-cache").rglob("*") if p.is_file())
    return sorted(p.name for p in files if ".lock" not in p.name and p.name != "CACHEDIR.TAG")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_report_is_that_of_a_disk_and_the_cache_is_empty_again(near_hub, pair, tmp_path, workers):
    assert numbers(by_shard(workers=workers)) == numbers(local(tmp_path))
    assert cached(tmp_path) == []


def test_each_file_is_downloaded_once_and_whole(near_hub, pair, tmp_path):
    by_shard()
    whole = [r for r in near_hub.requests if r.host == "storage" and "Range" not in r.headers]
    assert len(whole) == len({r.path.split("?")[0] for r in whole}) == 6


def test_few_files_lie_in_the_cache_at_any_time(near_hub, pair, tmp_path):
    most = 0

    def look(request) -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "hub-cache").rglob("blobs/*"))))

    near_hub.on_request = look
    by_shard(workers=1)
    assert 1 <= most <= 4  # of six; a partial download counts


def test_what_was_cached_before_is_read_there_and_stays(near_hub, pair, tmp_path):
    from huggingface_hub import HfApi

    name = "model-00002-of-00003.safetensors"
    HfApi(endpoint=near_hub.url).hf_hub_download(
        "org/base", name, revision=near_hub.repos["org/base"].branches["main"]
    )
    before = cached(tmp_path)
    near_hub.requests.clear()
    assert numbers(by_shard()) == numbers(local(tmp_path))
    assert cached(tmp_path) == before
    data = pair["base"][name]
    assert not [r for r in near_hub.requests if r.host == "storage" and near_hub.path_of(data) in r.path]


def test_a_content_that_both_sides_share_is_there_until_neither_reads_it(near_hub, tmp_path):
    files = checkpoint(0)
    near_hub.add("org/base", files)
    near_hub.add("org/tuned", {**checkpoint(1, moved=(1,)), "config.json": b"{}"})
    save(files, tmp_path / "base")
    save(checkpoint(1, moved=(1,)), tmp_path / "tuned")
    found, expected = numbers(by_shard()), numbers(local(tmp_path))
    assert found == expected
    assert cached(tmp_path) == []


def test_a_run_that_breaks_off_leaves_nothing_in_the_cache(near_hub, pair, tmp_path):
    near_hub.fail("HEAD .*org/tuned/resolve/.*model-00002", times=10**9, status=404)
    near_hub.faults[-1].times = 0

    def break_down(request) -> None:
        if request.host == "storage" and "Range" not in request.headers:
            near_hub.faults[-1].times = 10**9

    near_hub.on_request = break_down
    with pytest.raises(HubError):
        by_shard(workers=1)
    assert cached(tmp_path) == []


def test_a_pass_that_reads_little_of_a_file_gets_ranges(near_hub, pair, tmp_path):
    with hub_access("shards"):
        entry = open_checkpoint("hf://org/base").files[0]
    assert entry.remote is not None
    assert entry.remote.open_planned(entry, entry.num_bytes // 2 - 1) is None
    source = entry.remote.open_planned(entry, entry.num_bytes // 2 + 1)
    assert source is not None
    source.close()
    assert cached(tmp_path) == []
