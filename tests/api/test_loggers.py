"""What is sent to experiment trackers, and the calls it takes; real trackers where they are installed."""

from __future__ import annotations

import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from sparsity_audit import diff
from sparsity_audit.api.loggers import LOGGERS, describe_run, log_report, require_logger
from sparsity_audit.errors import MissingExtraError, OutputError, UsageError


@pytest.fixture(scope="module")
def report(addition):
    return diff(addition / "base-fp32", addition / "grpo-fp32-seed0", preset="zhu2025")


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    """A PNG of 3 × 2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows = (
        struct.pack(">IIBBBBB", 3, 2, 8, 6, 0, 0, 0),
        zlib.compress(b"\0" + bytes(12) + b"\0" + bytes(12)),
    )
    path = tmp_path / "headline.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


def test_what_is_sent_are_the_reports_own_numbers(report):
    run = describe_run(report)
    for row in report.headlines:
        name = f"{row.view}/{row.criterion.replace(':', '_')}"
        assert run.scalars[f"sparsity/{name}"] == row.sparsity
        assert run.scalars[f"compared/{name}"] == row.compared
    assert run.scalars["sparsity/preset/zhu2025"] == report.preset.sparsity
    assert set(run.layers) == {"layer_sparsity/native/value", "layer_sparsity/served/value"}
    for rollups in report.rollups:
        groups = {g.key: next(c for c in g.counts if c.total.criterion == "value") for g in rollups.by_layer}
        expected = [(int(key), count.total.sparsity) for key, count in groups.items() if key.isdecimal()]
        assert list(run.layers[f"layer_sparsity/{rollups.view}/value"]) == sorted(expected)
    assert len(run.by_layer()) == len(run.layers["layer_sparsity/native/value"]) > 1
    assert run.config["criterion"] == "value"
    assert run.name == report.tuned.resolved[:250]


def test_names_hold_nothing_that_a_tracker_refuses(report):
    run = describe_run(report)
    for name in (*run.scalars, *run.layers):
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./ ")


def test_wandb_gets_layers_as_steps_headlines_as_summary_and_figures_as_images(monkeypatch, report, figure):
    wandb = MagicMock()
    run = wandb.init.return_value.__enter__.return_value
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sent = log_report(report, "wandb", project="p", name="n", directory="d", figures=[figure])
    wandb.init.assert_called_once_with(project="p", name="n", config=dict(sent.config), dir="d")
    assert run.define_metric.mock_calls == [call(name, step_metric="layer") for name in sent.layers]
    layers = [call({"layer": layer, **values}) for layer, values in sent.by_layer().items()]
    assert run.log.mock_calls == [*layers, call({"figures/headline": wandb.Image.return_value})]
    wandb.Image.assert_called_once_with(str(figure))
    run.summary.update.assert_called_once_with(dict(sent.scalars))


def test_trackio_gets_the_same_and_is_finished_even_when_it_fails(monkeypatch, report, figure):
    trackio = MagicMock()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    sent = log_report(report, "trackio", project="p", name="n", figures=[figure])
    trackio.init.assert_called_once_with(project="p", name="n", config=dict(sent.config))
    assert trackio.init.return_value.log.mock_calls == [
        call(dict(sent.scalars), step=0),
        *[call(values, step=layer) for layer, values in sent.by_layer().items()],
        call({"figures/headline": trackio.Image.return_value}, step=0),
    ]
    trackio.finish.assert_called_once_with()
    trackio.init.return_value.log.side_effect = ConnectionError("https://key@host")
    with pytest.raises(OutputError, match=r"--log trackio: the tracker failed \(ConnectionError\)") as caught:
        log_report(report, "trackio")
    assert "key@host" not in str(caught.value)
    assert trackio.finish.call_count == 2


def test_mlflow_gets_parameters_metrics_by_step_and_artifacts(monkeypatch, report, figure):
    mlflow = MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    sent = log_report(report, "mlflow", project="p", name="n", figures=[figure])
    mlflow.set_experiment.assert_called_once_with("p")
    mlflow.start_run.assert_called_once_with(run_name="n")
    mlflow.log_params.assert_called_once_with(dict(sent.config))
    assert mlflow.log_metrics.mock_calls == [
        call(dict(sent.scalars)),
        *[call(values, step=layer) for layer, values in sent.by_layer().items()],
    ]
    mlflow.log_artifact.assert_called_once_with(str(figure), artifact_path="figures")


def stub_tensorboard(monkeypatch) -> list[Any]:
    """The parts of tensorboard that are used, recording events."""
    events: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            events.append(("open", folder))

        def add_event(self, event: Any) -> None:
            events.append(event)

        def close(self) -> None:
            events.append("closed")

    class Summary(types.SimpleNamespace):
        Value = types.SimpleNamespace
        Image = types.SimpleNamespace

    for name, content in {
        "tensorboard.summary.writer.event_file_writer": {"EventFileWriter": Writer},
        "tensorboard.compat.proto.event_pb2": {"Event": types.SimpleNamespace},
        "tensorboard.compat.proto.summary_pb2": {"Summary": Summary},
    }.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(
                sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth]))
            )
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return events


def test_tensorboard_gets_scalars_by_step_and_encoded_images(monkeypatch, report, figure):
    events = stub_tensorboard(monkeypatch)
    sent = log_report(report, "tensorboard", project="p", name="a/b@c", directory="d", figures=[figure])
    assert events[0] == ("open", str(Path("d/p/a_b@c")))
    assert events[-1] == "closed"
    found = [(e.step, e.summary.value[0]) for e in events[1:-1]]
    scalars = {(v.tag, step): v.simple_value for step, v in found[:-1]}
    series = {(n, layer): value for n, points in sent.layers.items() for layer, value in points}
    assert scalars == {(name, 0): value for name, value in sent.scalars.items()} | series
    step, image = found[-1]
    assert (step, image.tag, image.image.width, image.image.height) == (0, "figures/headline", 3, 2)
    assert image.image.encoded_image_string == figure.read_bytes()


def test_tensorboard_reads_what_was_written(tmp_path, report, figure):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent = log_report(report, "tensorboard", name="run", directory=tmp_path, figures=[figure])
    events = EventAccumulator(str(tmp_path / "sparsity-audit" / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*sent.scalars, *sent.layers}
    (headline,) = events.Scalars("sparsity/native/value")
    assert headline.value == pytest.approx(
        sent.scalars["sparsity/native/value"], abs=1e-7
    )  # stored as float32
    assert [e.step for e in events.Scalars("layer_sparsity/native/value")] == list(sent.by_layer())
    (image,) = events.Images("figures/headline")
    assert (image.width, image.height, image.encoded_image_string) == (3, 2, figure.read_bytes())


def test_mlflow_reads_what_was_written(tmp_path, report, figure, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    sent = log_report(report, "mlflow", project="p", name="n", figures=[figure])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.info.run_name == "n"
    assert {k: v for k, v in run.data.metrics.items() if k in sent.scalars} == sent.scalars
    history = client.get_metric_history(run.info.run_id, "layer_sparsity/native/value")
    assert [(m.step, m.value) for m in history] == list(sent.layers["layer_sparsity/native/value"])
    assert [f.path for f in client.list_artifacts(run.info.run_id, "figures")] == ["figures/headline.png"]
    assert run.data.params["base"] == sent.config["base"]


def test_trackio_takes_what_is_sent(tmp_path, report, figure, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="the extra `trackio` is not installed")
    sent = log_report(report, "trackio", project="p", name="n")
    (run,) = trackio.Api().runs("p")
    assert run.name == "n"
    assert sent.scalars


@pytest.mark.parametrize("logger", sorted(LOGGERS))
def test_an_absent_tracker_names_the_extra_to_install(monkeypatch, report, logger):
    monkeypatch.setitem(sys.modules, logger, None)
    for name in [name for name in sys.modules if name.startswith(f"{logger}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as caught:
        require_logger(logger)
    assert f"pip install 'sparsity-audit[{logger}]'" in str(caught.value)
    with pytest.raises(MissingExtraError):
        log_report(report, logger)


def test_an_unknown_tracker_is_a_usage_error(report):
    with pytest.raises(UsageError, match="wandb, trackio, tensorboard, mlflow"):
        log_report(report, "comet")
