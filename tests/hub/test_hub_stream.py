"""`--stream`: the same report as from a downloaded copy, whatever happens to the connections."""

from __future__ import annotations

import json
import random
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from hub_server import safetensors_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import (
    QUICK,
    SMALL,
    bf16_file,
    checkpoint,
    gets,
    local,
    numbers,
    reset,
    save,
    shard_names,
    streamed,
)

from sparsity_audit.api.diff import diff, plan_diff
from sparsity_audit.api.diff_question import DiffQuestion
from sparsity_audit.api.inspect import inspect
from sparsity_audit.api.series import series
from sparsity_audit.api.shares import diff_share, merge
from sparsity_audit.checkpoint.access import hub_access
from sparsity_audit.checkpoint.opening import open_checkpoint
from sparsity_audit.checkpoint.read_ahead import Pace, with_pace
from sparsity_audit.errors import ChangedInputError, CorruptCheckpointError, HubError, UsageError
from sparsity_audit.report.schema import to_json

TOKEN = "hf_averysecrettokenvalue0123456789"
WHOLE: list[bytes] = []


def test_a_streamed_diff_is_the_diff_of_the_same_files_on_a_disk(near_hub, pair, tmp_path):
    assert numbers(streamed(structure="on")) == numbers(local(tmp_path, structure="on"))


def test_the_reports_bytes_are_those_of_any_pace_and_any_number_of_workers(near_hub, pair):
    first = to_json(streamed())
    for pace, workers in ((Pace(), 1), (Pace(window_bytes=333, in_flight=4, buffered_bytes=10), 3)):
        assert to_json(streamed(pace=pace, workers=workers)) == first


def test_each_file_is_resolved_once_and_its_bytes_are_asked_for_in_large_ranges(near_hub, pair):
    streamed(pace=Pace())
    for repo, files in pair.items():
        for name in [n for n in files if n.endswith(".safetensors")]:
            assert len(near_hub.asked(f"HEAD /org/{repo}/resolve/.*{name}")) == 1
    assert len(gets(near_hub)) == 2 * 6  # a head and one range of each shard
    data = sum(len(d) for files in pair.values() for n, d in files.items() if n.endswith(".safetensors"))
    read = [tuple(map(int, r.headers["Range"].removeprefix("bytes=").split("-"))) for r in gets(near_hub)]
    assert sum(b - a + 1 for a, b in read if a) < data


def test_everything_names_the_commit_even_when_the_branch_moves(near_hub, pair):
    moved = checkpoint(7, moved=(0,))

    def move(request) -> None:
        commits = near_hub.repos["org/tuned"].commits
        if request.path.startswith("/org/tuned/resolve/") and len(commits) == 1:
            near_hub.add("org/tuned", moved)

    first = to_json(streamed())
    commit = near_hub.repos["org/tuned"].branches["main"]
    near_hub.on_request = move
    report = streamed()
    assert near_hub.repos["org/tuned"].branches["main"] != commit
    assert report.tuned.resolved == f"hf://org/tuned@{commit}"
    assert to_json(report) == first
    assert all(len(p.split("/")[4]) == 40 for p in (r.path for r in near_hub.requests) if "/resolve/" in p)


def test_nothing_is_written_to_the_librarys_cache(near_hub, pair, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    streamed()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_token_goes_to_the_hub_alone(near_hub, pair, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in near_hub.repos.values():
        repo.token = TOKEN
    streamed()
    assert gets(near_hub)
    assert all(TOKEN not in repr(request) for request in near_hub.requests if request.host == "storage")
    assert all(TOKEN in repr(request.headers) for request in near_hub.requests if request.host == "hub")


def test_a_mirror_that_serves_files_itself_gets_the_token_and_ranges(near_hub, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in near_hub.repos.values():
        repo.token = TOKEN
    near_hub.serves_files = True
    try:
        report = streamed()
    finally:
        near_hub.serves_files = False
    assert numbers(report) == numbers(local(tmp_path))
    assert not gets(near_hub)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 3000), max_size=30), workers=st.integers(1, 3))
def test_any_sequence_of_cuts_gives_the_same_bytes(near_hub, pair, cuts, workers):
    if not WHOLE:  # the same commits in every example
        WHOLE.append(to_json(streamed()))
    reset(near_hub)
    near_hub.cuts = list(cuts)
    assert to_json(streamed(workers=workers)) == WHOLE[0]


def test_a_cut_transfer_goes_on_at_the_first_byte_that_was_not_received(near_hub, pair):
    streamed(pace=Pace())
    whole, requests = near_hub.sent_bytes, len(gets(near_hub))
    reset(near_hub)
    near_hub.cuts = [500, 700, 900, 11, 1]
    streamed(pace=Pace())
    assert near_hub.num_cuts == 5
    assert len(gets(near_hub)) == requests + 5
    assert near_hub.sent_bytes == whole


@pytest.mark.parametrize("status", [408, 429, 500, 599])
def test_a_status_that_passes_is_waited_out(near_hub, pair, tmp_path, status):
    near_hub.fail("GET .*Signature", status=status, times=3)
    assert numbers(streamed()) == numbers(local(tmp_path))


def test_the_wait_that_a_storage_host_asks_for_is_kept(near_hub, pair, monkeypatch):
    waits = []
    monkeypatch.setattr("sparsity_audit.checkpoint.remote.time.sleep", waits.append)
    near_hub.fail("GET .*Signature", status=429, headers={"Retry-After": "17"}, times=1)
    with hub_access("stream"):
        open_checkpoint("hf://org/base")
    assert waits == [17.0]


def test_a_wait_that_is_too_long_is_an_error_that_says_so(near_hub, pair):
    near_hub.fail("GET .*Signature", status=503, headers={"Retry-After": "4000"})
    with pytest.raises(HubError, match="status 503, and a wait of 4000 s is asked for"):
        streamed()


def test_a_host_that_stays_away_is_given_up_after_a_number_of_attempts(near_hub, pair):
    near_hub.fail("GET .*Signature", status=503)
    with pytest.raises(HubError, match="status 503, 6 times in a row, at byte 0"):
        streamed()


def test_a_small_file_that_never_arrives_whole_is_given_up(near_hub, pair):
    near_hub.fail(r"GET /org/base/resolve/.*config\.json", cut_after=3)
    with hub_access("stream"), pytest.raises(HubError, match="6 times in a row"):
        open_checkpoint("hf://org/base")
    assert len(near_hub.asked(r"GET /org/base/resolve/.*config\.json")) == 6


def test_an_address_that_expires_is_asked_for_anew_and_nothing_is_lost(near_hub, pair, tmp_path):
    def expire(request) -> None:
        if request.host == "storage" and len(gets(near_hub)) in (8, 12):
            near_hub.expired.update(near_hub.signed)

    near_hub.on_request = expire
    report = streamed()
    assert numbers(report) == numbers(local(tmp_path))
    assert len(near_hub.signed) > 6


def test_a_storage_host_that_refuses_fresh_addresses_is_an_error(near_hub, pair):
    near_hub.fail("GET .*Signature", status=403)
    with pytest.raises(HubError, match="refuses the address that the Hub has just signed") as caught:
        streamed()
    assert "clock" in str(caught.value)
    assert "secret-signature" not in str(caught.value)


def test_a_token_that_is_revoked_in_the_middle_ends_the_run_with_the_way_to_sign_in(
    near_hub, pair, monkeypatch, caplog
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo in near_hub.repos.values():
        repo.token = TOKEN

    def revoke(request) -> None:
        if len(gets(near_hub)) == 9:
            near_hub.expired.update(near_hub.signed)
            for repo in near_hub.repos.values():
                repo.token = "another"

    near_hub.on_request = revoke
    with pytest.raises(HubError, match="hf auth login") as caught:
        streamed()
    assert TOKEN not in str(caught.value) + caplog.text


def test_a_server_that_ignores_range_is_an_error(near_hub, pair):
    near_hub.ignores_range = True
    with pytest.raises(HubError, match="status 200: the server or a proxy ignored Range") as caught:
        streamed()
    assert "without --stream" in str(caught.value)


def test_a_proxy_that_starts_to_ignore_range_in_the_middle_is_an_error(near_hub, pair):
    def ignore(request) -> None:
        near_hub.ignores_range = len(gets(near_hub)) > 8

    near_hub.on_request = ignore
    with pytest.raises(HubError, match="ignored Range"):
        streamed()


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": "bytes 0-9/10"}, {"Content-Range": ""}, {"Content-Encoding": "gzip"}],
)
def test_another_range_than_was_asked_for_is_an_error(near_hub, pair, headers):
    near_hub.fail("GET .*Signature", status=206, headers=headers, body=bytes(10))
    with pytest.raises(HubError, match="expected"):
        streamed()


@pytest.mark.parametrize("how", ["missing", "revision", "gated"])
def test_repositories_that_cannot_be_read_are_refused_as_without_streaming(near_hub, pair, how):
    if how == "gated":
        near_hub.repos["org/base"].gated, near_hub.repos["org/base"].token = True, "another"
    reference = {"missing": "hf://org/absent", "revision": "hf://org/base@absent", "gated": "hf://org/base"}[
        how
    ]
    expected = {"missing": "no model org/absent", "revision": "has no revision 'absent'", "gated": "is gated"}
    with pytest.raises(HubError, match=expected[how]):
        streamed(base=reference)


def test_a_mirror_that_is_out_of_step_is_an_error(near_hub, pair):
    near_hub.listed_sizes["model-00002-of-00003.safetensors"] = 999
    try:
        with pytest.raises(ChangedInputError, match=r"another bytes|another hash") as caught:
            streamed()
    finally:
        near_hub.listed_sizes.clear()
    assert "model-00002-of-00003.safetensors" in str(caught.value)


def test_a_damaged_header_names_the_file_on_the_hub(near_hub):
    near_hub.add("org/base", {"model.safetensors": struct.pack("<Q", 2**40) + b"{" + bytes(100)})
    with pytest.raises(CorruptCheckpointError, match=r"hf://org/base@[0-9a-f]{40}, file model.safetensors"):
        streamed()


def test_offline_says_that_streaming_needs_the_hub(near_hub, pair, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        streamed()


def test_files_with_one_hash_are_read_once_and_every_number_stays(near_hub, tmp_path):
    base, tuned = checkpoint(0), checkpoint(1, moved=(1,))
    near_hub.add("org/base", base)
    near_hub.add("org/tuned", tuned)
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    report = streamed(pace=Pace())
    assert numbers(report) == numbers(local(tmp_path))
    note = "2 of 3 files are the base's by sha256, read once for both sides: "
    assert (
        report.tuned.notes[-1] == note + "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"
    )
    assert len(gets(near_hub)) == 6 + 4


def test_counts_alone_need_no_byte_of_files_with_one_hash(near_hub, tmp_path):
    base, tuned = checkpoint(0), checkpoint(1, moved=(1,))
    near_hub.add("org/base", base)
    near_hub.add("org/tuned", tuned)
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    report = streamed(stats="counts", pace=Pace())
    found, expected = numbers(report), numbers(local(tmp_path, stats="counts"))
    for record, other in zip(found["tensors"], expected["tensors"], strict=True):
        if ".layers.1." not in record["name"]:
            assert record["base_fingerprint"] == record["tuned_fingerprint"] == ""
            for key in ("base_fingerprint", "tuned_fingerprint"):
                record[key] = other[key]
    assert found == expected
    assert "not read: model-00001-of-00003" in report.tuned.notes[-1]
    assert len(gets(near_hub)) == 6 + 2


def test_masks_keep_their_fingerprints_when_hashes_are_equal(near_hub, tmp_path):
    base, tuned = checkpoint(0), checkpoint(1, moved=(1,))
    near_hub.add("org/base", base)
    near_hub.add("org/tuned", tuned)
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    streamed(stats="counts", mask=tmp_path / "streamed")
    local(tmp_path, stats="counts", mask=tmp_path / "local")
    shards = sorted(p.name for p in (tmp_path / "local").glob("*.safetensors"))
    assert shards
    for name in shards:
        ours, theirs = ((tmp_path / side / name).read_bytes() for side in ("streamed", "local"))
        headers = [json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]) for raw in (ours, theirs)]
        assert headers[0]["__metadata__"]["fingerprints"] == headers[1]["__metadata__"]["fingerprints"]
        assert ours[-200:] == theirs[-200:]


@pytest.mark.parametrize("criterion", ["top:5%", "ulp:1"])
def test_selections_that_read_twice_are_the_same(near_hub, pair, tmp_path, criterion):
    assert numbers(streamed(criteria=[criterion])) == numbers(local(tmp_path, criteria=[criterion]))


def test_a_run_that_was_cut_off_goes_on_where_it_was(near_hub, pair, tmp_path):
    near_hub.fail("GET .*Signature", times=10**9, status=404)
    healthy = near_hub.faults[-1]
    healthy.times = 0

    def break_down(request) -> None:
        healthy.times = 10**9 if len(gets(near_hub)) > 13 else 0

    near_hub.on_request = break_down
    with pytest.raises(HubError, match="status 404"):
        streamed(output=tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "report.json").exists()
    near_hub.on_request, healthy.times = None, 0
    notes = []
    report = streamed(output=tmp_path / "out", workers=1, on_note=notes.append)
    assert any(note.startswith("resuming: ") for note in notes)
    assert numbers(report) == numbers(local(tmp_path))


def test_headers_alone_are_read_by_inspect_and_by_a_dry_run(near_hub, pair, tmp_path):
    with hub_access("stream"):
        found = inspect("hf://org/base")
        assert len(gets(near_hub)) == 3
        plan = plan_diff("hf://org/base", "hf://org/tuned")
    assert [file.name for file in found.files] == shard_names(3)
    assert plan.num_entries == sum(t.num_entries for t in found.tensors)
    assert found.tensors == inspect(str(tmp_path / "base")).tensors


def test_a_series_of_revisions_is_streamed(near_hub, pair, tmp_path):
    steps = []
    for step in (1, 2):
        files = checkpoint(step, moved=(0, 1))
        near_hub.add("org/run", files, branch=f"step-{step}")
        steps.append(save(files, tmp_path / f"step-{step}"))
    with hub_access("stream"), with_pace(SMALL):
        found = series("hf://org/base", ["hf://org/run@step-1", "hf://org/run@step-2"])
    expected = series(str(tmp_path / "base"), steps)
    for ours, theirs in ((found.by_tensor, expected.by_tensor), (found.overall, expected.overall)):
        assert repr(ours).replace("run@step-", "") == repr(theirs)


def test_tensors_of_another_order_and_cut_into_other_files_are_streamed(near_hub, tmp_path):
    base = checkpoint(0, shards=2)
    tuned = checkpoint(1, shards=2, moved=(0, 1))
    joined: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for name in shard_names(2):
        raw = tuned[name]
        size = struct.unpack("<Q", raw[:8])[0]
        for key, record in json.loads(raw[8 : 8 + size]).items():
            first, last = record["data_offsets"]
            joined[key] = (tuple(record["shape"]), raw[8 + size + first : 8 + size + last])
    files = {"model.safetensors": bf16_file(dict(reversed(joined.items())))}
    near_hub.add("org/base", base)
    near_hub.add("org/tuned", files)
    save(base, tmp_path / "base")
    save(files, tmp_path / "tuned")
    assert numbers(streamed()) == numbers(local(tmp_path))


def test_fp32_pairs_and_their_samples_are_streamed(near_hub, tmp_path):
    rng = random.Random(5)
    values = [rng.gauss(0, 0.02) for _ in range(70_000)]
    base = {"model.safetensors": safetensors_bytes({"w": values, "v": values[:50]})}
    tuned = {"model.safetensors": safetensors_bytes({"w": [v * 0.999 for v in values], "v": values[:50]})}
    for name, files in (("base", base), ("tuned", tuned)):
        near_hub.add(f"org/{name}", files)
        save(files, tmp_path / name)
    report = streamed(pace=Pace(), unit_bytes=None)
    assert numbers(report) == numbers(local(tmp_path, unit_bytes=None))


def test_an_unknown_way_to_read_the_hub_is_refused():
    with ExitStack() as stack, pytest.raises(UsageError, match="download, stream, shards"):
        stack.enter_context(hub_access("telepathy"))


def test_a_process_elsewhere_reads_ranges_of_its_own_in_few_requests(near_hub, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsity_audit.passes.ray_engine.RayEngine", FakeEngine)
    asked = {"structure": "off", "unit_bytes": 1000, "kernel": "numpy", "output": tmp_path / "ray"}
    with hub_access("stream"), with_pace(Pace()):
        found = diff("hf://org/base", "hf://org/tuned", engine="ray", mask=tmp_path / "mask", **asked)
    assert numbers(found) == numbers(local(tmp_path, unit_bytes=1000))
    assert (tmp_path / "ray" / "report.json").read_bytes() == to_json(found)
    assert len(gets(near_hub)) <= 4 * 6  # heads, headers of the copies, and a range or two of each shard
    assert all(TOKEN not in str(request.headers) for request in gets(near_hub))


@pytest.mark.parametrize("stats", ["counts", "full"])
def test_shares_of_a_streamed_run_are_merged_to_its_bytes(near_hub, tmp_path, stats):
    near_hub.add("org/base", checkpoint(0))
    near_hub.add("org/tuned", checkpoint(1, moved=(1,)))  # two shards are the base's
    asked = {"structure": "off", "unit_bytes": 700, "stats": stats}
    question = DiffQuestion.of(**asked)
    with hub_access("stream"), with_pace(SMALL):
        whole = diff("hf://org/base", "hf://org/tuned", output=tmp_path / "whole", kernel="numpy", **asked)
        for index in range(2):
            where = {"shard_index": index, "num_shards": 2, "output": tmp_path / "shares"}
            diff_share("hf://org/base", "hf://org/tuned", question=question, kernel="numpy", **where)
        merge([tmp_path / "shares"])
    merged = (tmp_path / "shares" / "report.json").read_bytes()
    assert merged == (tmp_path / "whole" / "report.json").read_bytes() == to_json(whole)


def adapted(folder: Path) -> tuple[Path, Path]:
    """A base of one weight and a LoRA adapter of rank 2 for it."""
    weight = "model.layers.0.q_proj"
    base, adapter = folder / "base", folder / "adapter"
    save({"model.safetensors": bf16_file({f"{weight}.weight": ((6, 8), bytes(range(96)))})}, base)
    stem = f"base_model.model.{weight}"
    parts = {
        f"{stem}.lora_A.weight": ((2, 8), bytes(range(32))),
        f"{stem}.lora_B.weight": ((6, 2), bytes(range(24))),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "org/base"}
    files = {
        "adapter_model.safetensors": bf16_file(parts),
        "adapter_config.json": json.dumps(config).encode(),
    }
    save(files, adapter)
    return base, adapter


def test_an_adapter_is_merged_without_a_download(near_hub, tmp_path):
    base, adapter = adapted(tmp_path)
    for name, folder in (("base", base), ("adapter", adapter)):
        near_hub.add(f"org/{name}", {p.name: p.read_bytes() for p in folder.iterdir()})
    with hub_access("stream"):
        found = diff("hf://org/base", "hf://org/base+hf://org/adapter", **QUICK)
    expected = numbers(diff(str(base), f"{base}+{adapter}", **QUICK))
    ours = numbers(found)
    for side in ("base", "tuned"):  # names of files hold the repository's or the folder's path
        assert len(ours[side].pop("files")) == len(expected[side].pop("files"))
    assert ours == expected
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


def test_torch_files_and_a_side_on_the_disk_are_compared_as_well(near_hub, tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"a.weight": torch.arange(4000, dtype=torch.float32).reshape(50, 80).bfloat16()}
    for name, factor in (("base", 1), ("tuned", 1.01)):
        folder = tmp_path / name
        folder.mkdir()
        torch.save({key: value * factor for key, value in weights.items()}, folder / "pytorch_model.bin")
        near_hub.add(f"org/{name}", {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()})
    expected = numbers(local(tmp_path))
    assert expected["accounts"] != []
    assert numbers(streamed()) == expected
    assert numbers(streamed(base=str(tmp_path / "base"))) == expected
