"""Send the numbers of an audit to an experiment tracker: wandb, trackio, TensorBoard or MLflow.

Contract: one run an audit. What is sent is decided here once, the same for every tracker, and is a function
of the report: headline numbers, per-layer sparsity with the layer as the step, the figures that were drawn.
A tracker is imported when it is asked for; its own variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`,
`TRACKIO_SPACE_ID`, …) decide where it writes and as whom.

Source: https://docs.wandb.ai/models/ref/python, https://huggingface.co/docs/trackio/api,
https://mlflow.org/docs/latest/python_api/mlflow.html; TensorBoard's event files are written as
torch.utils.tensorboard does, through `tensorboard.summary.writer`, so that no torch is imported.
"""

from __future__ import annotations

import importlib
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sparsity_audit.errors import MissingExtraError, OutputError, UsageError
from sparsity_audit.report.schema import DiffReport
from sparsity_audit.stats.rollup import Rollup

__all__ = ["LOGGERS", "RunLog", "describe_run", "log_report", "require_logger"]

DEFAULT_PROJECT = "sparsity-audit"
_MAX_TEXT = 250
"""Characters of a run's name or parameter: MLflow's smallest limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """What is sent.

    Args:
        name: Name of the run.
        config: What was compared and how, as text.
        scalars: Headline numbers; fractions in [0, 1], counts of entries.
        layers: Series name → (layer, value), by layer.
        figures: PNG files.
    """

    name: str
    config: Mapping[str, str]
    scalars: Mapping[str, float]
    layers: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    figures: tuple[Path, ...] = ()

    def by_layer(self) -> dict[int, dict[str, float]]:
        """Layer → series name → value, in layer order."""
        found: dict[int, dict[str, float]] = {}
        for name, points in self.layers.items():
            for layer, value in points:
                found.setdefault(layer, {})[name] = value
        return dict(sorted(found.items()))


def describe_run(report: DiffReport, *, name: str | None = None, figures: Sequence[Path] = ()) -> RunLog:
    """What is sent of a report: a pure function.

    Names are paths such as `sparsity/native/value` and `layer_sparsity/native/value`; a colon in a criterion
    becomes an underscore, because MLflow refuses colons.
    """
    scalars: dict[str, float] = {}
    for row in report.headlines:
        if row.sparsity is not None:
            scalars[f"sparsity/{row.view}/{_plain(row.criterion)}"] = row.sparsity
            scalars[f"changed/{row.view}/{_plain(row.criterion)}"] = row.changed
            scalars[f"compared/{row.view}/{_plain(row.criterion)}"] = row.compared
    if report.preset is not None and report.preset.sparsity is not None:
        scalars[f"sparsity/preset/{report.preset.preset}"] = report.preset.sparsity
        scalars[f"compared/preset/{report.preset.preset}"] = report.preset.compared
    layers: dict[str, list[tuple[int, float]]] = {}
    for rollups in report.rollups:
        for group in rollups.by_layer:
            stack, _, number = group.key.rpartition(".")
            value = _sparsity(group, report.mask_criterion)
            if number.isdecimal() and value is not None:
                place = f"layer_sparsity/{rollups.view}/{_plain(report.mask_criterion)}"
                layers.setdefault(place + (f"/{stack}" if stack else ""), []).append((int(number), value))
    config = {
        "base": report.base.resolved,
        "tuned": report.tuned.resolved,
        "criterion": report.mask_criterion,
        "view": report.view.value,
        "criteria": ", ".join(report.criteria),
        "preset": "" if report.preset is None else report.preset.preset,
        "tool": report.tool,
    }
    return RunLog(
        name=(name or report.tuned.resolved)[:_MAX_TEXT],
        config={key: value[:_MAX_TEXT] for key, value in config.items()},
        scalars=scalars,
        layers={key: tuple(sorted(points)) for key, points in layers.items()},
        figures=tuple(figures),
    )


def _plain(criterion: str) -> str:
    return criterion.replace(":", "_").replace("%", "pc")


def _sparsity(group: Rollup, criterion: str) -> float | None:
    return next((c.total.sparsity for c in group.counts if c.total.criterion == criterion), None)


def log_report(
    report: DiffReport,
    logger: str,
    *,
    project: str = DEFAULT_PROJECT,
    name: str | None = None,
    directory: str | Path | None = None,
    figures: Sequence[Path] = (),
) -> RunLog:
    """Send a report to a tracker as one run; returns what was sent.

    Args:
        report: The audit.
        logger: `wandb`, `trackio`, `tensorboard` or `mlflow`.
        project: Project or experiment; a sub-directory for TensorBoard.
        name: Name of the run; default the tuned reference.
        directory: Where a tracker that writes files does so: default `runs` (TensorBoard), its own (wandb).
        figures: PNG files to attach.

    Raises:
        UsageError: No such tracker.
        MissingExtraError: It is not installed.
        OutputError: It failed; the audit itself is not touched.
    """
    adapter = _adapter(logger)
    run = describe_run(report, name=name, figures=figures)
    try:
        adapter.write(run, project=project, directory=None if directory is None else Path(directory))
    except Exception as error:
        # Trackers raise whatever their transport raises. Their texts may hold addresses with keys.
        raise OutputError(
            f"--log {logger}",
            f"the tracker failed ({type(error).__name__})",
            remedy="the audit is complete; check the tracker's sign-in and variables, then log again",
        ) from error
    return run


def require_logger(logger: str) -> None:
    """Raise before hours of reading what `log_report` would raise after them."""
    _adapter(logger)


class _Adapter(Protocol):
    def write(self, run: RunLog, *, project: str, directory: Path | None) -> None: ...


class _Wandb:
    def __init__(self) -> None:
        self._wandb = _import("wandb", extra="wandb")

    def write(self, run: RunLog, *, project: str, directory: Path | None) -> None:
        where = {} if directory is None else {"dir": str(directory)}
        with self._wandb.init(project=project, name=run.name, config=dict(run.config), **where) as started:
            for name in run.layers:
                started.define_metric(name, step_metric="layer")
            for layer, values in run.by_layer().items():
                started.log({"layer": layer, **values})
            for path in run.figures:
                started.log({f"figures/{path.stem}": self._wandb.Image(str(path))})
            started.summary.update(dict(run.scalars))


class _Trackio:
    def __init__(self) -> None:
        self._trackio = _import("trackio", extra="trackio")

    def write(self, run: RunLog, *, project: str, directory: Path | None) -> None:  # noqa: ARG002 - has none
        started = self._trackio.init(project=project, name=run.name, config=dict(run.config))
        try:
            started.log(dict(run.scalars), step=0)
            for layer, values in run.by_layer().items():
                started.log(values, step=layer)
            for path in run.figures:
                started.log({f"figures/{path.stem}": self._trackio.Image(str(path))}, step=0)
        finally:
            self._trackio.finish()


class _TensorBoard:
    def __init__(self) -> None:
        writers = "tensorboard.summary.writer.event_file_writer"
        self._writer = _import(writers, extra="tensorboard").EventFileWriter
        self._event = _import("tensorboard.compat.proto.event_pb2", extra="tensorboard").Event
        self._summary = _import("tensorboard.compat.proto.summary_pb2", extra="tensorboard").Summary

    def write(self, run: RunLog, *, project: str, directory: Path | None) -> None:
        folder = (directory or Path("runs")) / project / _as_folder(run.name)
        writer = self._writer(str(folder))
        try:
            for name, value in run.scalars.items():
                self._add(writer, 0, tag=name, simple_value=value)
            for name, points in run.layers.items():
                for layer, value in points:
                    self._add(writer, layer, tag=name, simple_value=value)
            for path in run.figures:
                self._add(writer, 0, tag=f"figures/{path.stem}", image=self._image(path.read_bytes()))
        finally:
            writer.close()

    def _add(self, writer: Any, step: int, **value: Any) -> None:
        summary = self._summary(value=[self._summary.Value(**value)])
        writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def _image(self, png: bytes) -> Any:
        width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk comes first in every PNG
        return self._summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)


class _MLflow:
    def __init__(self) -> None:
        self._mlflow = _import("mlflow", extra="mlflow")

    def write(self, run: RunLog, *, project: str, directory: Path | None) -> None:  # noqa: ARG002 - has none
        self._mlflow.set_experiment(project)
        with self._mlflow.start_run(run_name=run.name):
            self._mlflow.log_params(dict(run.config))
            self._mlflow.log_metrics(dict(run.scalars))
            for layer, values in run.by_layer().items():
                self._mlflow.log_metrics(values, step=layer)
            for path in run.figures:
                self._mlflow.log_artifact(str(path), artifact_path="figures")


LOGGERS: Mapping[str, type[_Adapter]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
}


def _adapter(logger: str) -> _Adapter:
    if logger not in LOGGERS:
        raise UsageError(f"--log {logger}", "not known", expected=", ".join(LOGGERS))
    return LOGGERS[logger]()


def _import(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"--log {extra}",
            f"{module.partition('.')[0]} is not installed",
            remedy=f"pip install 'sparsity-audit[{extra}]'",
        ) from error


def _as_folder(name: str) -> str:
    """The name with what may not stand in a file name replaced."""
    kept = "".join(c if c.isalnum() or c in "._-@" else "_" for c in name).strip("._")
    return kept or "run"
