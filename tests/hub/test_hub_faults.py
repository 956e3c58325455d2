"""Everything that goes wrong with a Hub ends in one clear error, without a token in it."""

from __future__ import annotations

import resource
import socket

import pytest
from hub_server import safetensors_bytes, sharded_files

TOKEN = "hf_averysecrettokenvalue0123456789"
ONE = {"config.json": b"{}", "model.safetensors": safetensors_bytes({"w": [float(i) for i in range(500)]})}


def test_a_missing_repository_is_named_and_so_is_the_missing_path(hub, open_reference):
    answer = open_reference("org/absent")
    assert (answer["error"], answer["exit_code"]) == ("HubError", 2)
    assert answer.message.startswith("org/absent: no such local path, and no model org/absent on the Hub")
    assert "hf auth login" in answer.message


def test_a_missing_revision_is_told_apart_from_a_missing_repository(hub, open_reference):
    hub.add("org/model", ONE)
    answer = open_reference("hf://org/model@nowhere")
    assert answer["error"] == "HubError"
    assert "org/model has no revision 'nowhere'" in answer.message


def test_a_missing_folder_is_named(hub, open_reference):
    hub.add("org/model", ONE)
    answer = open_reference("hf://org/model/absent")
    assert answer["error"] == "HubError"
    assert "no such file or folder" in answer.message


@pytest.mark.parametrize("token", [None, "hf_wrongwrongwrongwrong"])
def test_a_private_repository_asks_to_sign_in(hub, open_reference, token):
    hub.add("org/model", ONE, token=TOKEN)
    answer = open_reference("org/model", HF_TOKEN=token)
    assert answer["error"] == "HubError"
    assert "set HF_TOKEN" in answer.message
    assert "hf_wrong" not in answer.message + answer.stderr


@pytest.mark.parametrize("token", [None, "hf_wrongwrongwrongwrong"])
def test_a_gated_repository_asks_to_accept_its_licence(hub, open_reference, token):
    hub.add("org/model", ONE, token=TOKEN, gated=True)
    answer = open_reference("org/model", HF_TOKEN=token)
    assert answer["error"] == "HubError"
    assert "gated" in answer.message
    assert "accept it on the model's page" in answer.message
    assert "hf_wrong" not in answer.message + answer.stderr


def test_a_token_opens_private_repositories_and_never_reaches_the_storage_host(hub, open_reference):
    hub.add("org/model", sharded_files(2), token=TOKEN)
    answer = open_reference("org/model", HF_TOKEN=TOKEN)
    assert answer["tensors"] == ["layer.0", "layer.1"]
    storage = [request for request in hub.requests if request.host == "storage"]
    assert len(storage) == 2
    assert all(TOKEN not in repr(request) for request in storage)
    hub_gets = [r for r in hub.requests if r.host == "hub" and "org/model" in r.path]
    assert all(
        request.headers["authorization" if "authorization" in request.headers else "Authorization"]
        for request in hub_gets
    )
    assert TOKEN not in answer.stderr + repr(answer.value)


@pytest.mark.parametrize("status", [401, 403, 418])
def test_a_server_that_echoes_the_token_does_not_get_it_into_a_message(hub, open_reference, status):
    hub.add("org/model", ONE)
    echo = f"Invalid credentials in Authorization header {TOKEN}"
    hub.fail("api/models/org/model", status=status, headers={"X-Error-Message": echo}, body=echo.encode())
    answer = open_reference("org/model", HF_TOKEN=TOKEN)
    assert answer["error"] == "HubError"
    assert TOKEN not in answer.stderr + repr(answer.value)


def test_a_refused_token_is_said_to_be_refused(hub, open_reference):
    hub.add("org/model", ONE)
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.fail("api/models/org/model", status=401, headers=headers)
    assert "the Hub refused the access token (401)" in open_reference("org/model", HF_TOKEN=TOKEN).message


def test_a_token_that_cannot_be_sent_is_not_shown(hub, open_reference):
    hub.add("org/model", ONE)
    answer = open_reference("org/model", HF_TOKEN=TOKEN + "…")
    assert answer["error"] == "HubError"
    assert "characters that cannot be sent" in answer.message
    assert TOKEN not in answer.stderr + repr(answer.value)


def test_a_server_error_that_passes_is_survived(hub, open_reference):
    hub.add("org/model", ONE)
    hub.fail("api/models/org/model$", status=503, times=1)
    hub.fail("HEAD .*model.safetensors", status=500, times=1)
    assert open_reference("org/model")["tensors"] == ["w"]


def test_a_server_error_that_stays_is_reported_after_three_attempts(hub, open_reference):
    hub.add("org/model", ONE)
    hub.fail("api/models/org/model$", status=502)
    answer = open_reference("org/model")
    assert answer["error"] == "HubError"
    assert "the Hub answered 502, several times" in answer.message
    assert len(hub.asked("api/models/org/model$")) == 3
    assert "HfHubHTTPError; trying again in 0.1 s" in answer.stderr


def test_a_refused_connection_names_the_reason_and_the_missing_path(hub, open_reference):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        answer = open_reference("org/model", HF_ENDPOINT=url)
    assert answer["error"] == "HubError"
    assert "no such local path, and the connection to the Hub failed: Connection refused" in answer.message
    assert "HF_HUB_OFFLINE=1" in answer.message


def test_a_server_that_never_answers_is_given_up(hub, open_reference):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer = open_reference("org/model", HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")
    assert answer["error"] == "HubError"
    assert "the connection to the Hub failed" in answer.message


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_cut_once_in_a_file_is_survived_and_the_bytes_are_right(hub, open_reference, how):
    hub.add("org/model", ONE)
    hub.fail("GET .*Signature", times=1, cut_after=1000, how=how)
    answer = open_reference("org/model")
    assert answer["bytes"] == [len(ONE["model.safetensors"])]
    assert answer["tensors"] == ["w"]


def test_a_connection_cut_for_good_is_an_error_and_leaves_nothing_half_written(hub, open_reference, tmp_path):
    hub.add("org/model", ONE)
    fault = hub.fail("GET .*Signature", cut_after=0, how="reset")
    answer = open_reference("org/model")
    assert answer["error"] == "HubError"
    assert "file model.safetensors: the connection to the Hub failed" in answer.message.replace(
        "no such local path, and ", ""
    )
    assert not list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))
    assert open_reference("org/model", HF_HUB_OFFLINE="1")["error"] == "CheckpointNotFoundError"
    fault.times = 0
    assert open_reference("org/model")["tensors"] == ["w"]


def test_a_cached_file_of_another_length_is_refused(hub, open_reference, tmp_path):
    hub.add("org/model", ONE)
    open_reference("org/model")
    (shard,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    shard.resolve().write_bytes(ONE["model.safetensors"][:-4])
    answer = open_reference("org/model")
    assert answer["error"] == "HubError"
    assert f"expected: {len(ONE['model.safetensors'])} bytes, as the Hub lists" in answer.message
    assert str(shard.resolve()) in answer.message


def test_offline_without_a_cached_copy_says_both(hub, open_reference):
    hub.add("org/model", ONE)
    answer = open_reference("org/model", HF_HUB_OFFLINE="1")
    assert answer["error"] == "HubError"
    assert "not in the Hub cache, while HF_HUB_OFFLINE" in answer.message
    assert not hub.requests


def test_a_repository_without_checkpoint_files_says_what_was_looked_for(hub, open_reference):
    hub.add("org/model", {"README.md": b"#", "model.gguf": b"x", "training_args.bin": b"x"})
    answer = open_reference("org/model")
    assert (answer["error"], answer["exit_code"]) == ("CheckpointNotFoundError", 2)
    assert "holds no checkpoint (3 other files)" in answer.message


def test_a_shard_that_the_index_names_and_the_repository_lacks_is_named_before_any_shard_is_fetched(
    hub, open_reference
):
    files = sharded_files(3)
    del files["model-00002-of-00003.safetensors"]
    hub.add("org/model", files)
    answer = open_reference("org/model")
    assert answer["error"] == "CheckpointNotFoundError"
    assert "names the shard model-00002-of-00003.safetensors, which is not there" in answer.message
    assert not hub.asked("Signature")


@pytest.mark.parametrize("index", [b"{", b'{"weight_map": {"w": "../w.safetensors"}}'])
def test_a_malformed_index_is_an_error_that_names_it(hub, open_reference, index):
    hub.add("org/model", {"model.safetensors.index.json": index, "config.json": b"{}"})
    answer = open_reference("org/model")
    assert answer["error"] in ("CorruptCheckpointError", "CheckpointNotFoundError")
    assert "model.safetensors.index.json" in answer.message
    assert not hub.asked("Signature")


def test_numbered_shards_without_an_index_must_be_complete(hub, open_reference):
    files = {k: v for k, v in sharded_files(3).items() if "00001" not in k and not k.endswith("index.json")}
    hub.add("org/model", files)
    assert "names the shard model-00001-of-00003.safetensors" in open_reference("org/model").message


def test_a_checkpoint_that_cannot_fit_on_the_disk_is_refused_before_the_download(hub, open_reference):
    hub.add("org/model", ONE)
    hub.listed_sizes["model.safetensors"] = 2**60
    answer = open_reference("org/model")
    assert answer["error"] == "HubError"
    assert f"needs {2**60 + 2} bytes in the Hub cache" in answer.message
    assert not hub.asked("resolve")


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(hub, open_reference, tmp_path):
    hub.add("org/model", ONE)
    (tmp_path / "file").write_bytes(b"")
    answer = open_reference("org/model", HF_HOME=str(tmp_path / "file"))
    assert answer["error"] == "HubError"
    assert "the Hub cache cannot be used: Not a directory" in answer.message
    assert "HF_HOME" in answer.message


def test_a_write_that_fails_in_the_middle_of_a_file_is_an_error_and_nothing_is_used(
    hub, open_reference, tmp_path
):
    hub.add("org/model", ONE)
    limit = len(ONE["model.safetensors"]) // 2

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    answer = open_reference("org/model", preexec=small_files_only)
    assert answer["error"] == "HubError"
    assert "the Hub cache cannot be used: File too large" in answer.message
    assert not list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))


def test_an_answer_that_is_not_a_hubs_points_at_the_endpoint(hub, open_reference):
    page = b"<html>Please sign in to the guest network</html>"
    hub.fail("api/models/org/model", status=200, headers={"Content-Type": "text/html"}, body=page)
    answer = open_reference("org/model")
    assert answer["error"] == "HubError"
    assert "the answer is not a Hub's" in answer.message
    assert "HF_ENDPOINT" in answer.message


def test_a_malformed_reference_never_reaches_the_network(hub, open_reference):
    answer = open_reference("hf://org/model@")
    assert (answer["error"], answer["exit_code"]) == ("UsageError", 2)
    assert not hub.requests
