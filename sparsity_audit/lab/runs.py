"""A training run on disk: what it writes, how it goes on after a kill, what it refuses.

Contract: in the output folder `checkpoint-N` and `final` are Hugging Face folders; `run.json` holds the
resolved config and, apart from it, what may differ between equal runs; `metrics.jsonl`, `metrics.csv`,
`result.json` and all weights are a function of the config alone, times go to `timings.jsonl`.
`state.safetensors` is replaced by rename every few steps; a killed run goes on from it and ends in the same
bytes. `result.json` is written last: with it the run is finished. A folder of another run is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.determinism import one_thread, stream
from sparsity_audit.lab.estimators import Estimate, estimate
from sparsity_audit.lab.evaluate import sampled_rewards
from sparsity_audit.lab.loop import Training
from sparsity_audit.lab.metrics import StepMetrics
from sparsity_audit.lab.model import Llama
from sparsity_audit.lab.run_folder import RunFolder, TrainResult
from sparsity_audit.lab.tasks import named_task
from sparsity_audit.lab.update import UpdateMask
from sparsity_audit.lab.watch import Watch
from sparsity_audit.seams import reached

__all__ = ["TrainResult", "run_training"]

_HELD_OUT_PROMPTS = 256


def run_training(
    config: TrainConfig,
    base: Llama,
    output: Path,
    *,
    update_mask: UpdateMask | None,
    overwrite: bool,
    state_every: int,
    on_step: Callable[[StepMetrics], None],
    on_note: Callable[[str], None],
) -> TrainResult:
    """Train and write; go on where a killed run of the same config stopped.

    Args:
        config: All settings.
        base: What it starts from.
        output: The run's folder.
        update_mask: bool tensors by parameter name, True where entries may move; None where all may.
        overwrite: Remove what another run left, and begin anew.
        state_every: Steps between two states; a resumed run repeats at most so many.
        on_step: Called after each new step.
        on_note: Called with lines for the user.

    Raises:
        OutputError: The folder belongs to another run, to one that goes on, or cannot be written.
        NotFiniteError: The run collapsed.
        UsageError: The mask does not fit the model.
    """
    folder = RunFolder(output)
    with one_thread(), folder.locked():
        if overwrite:
            folder.clear()
        if folder.belongs_to(config) and (finished := folder.result()) is not None:
            on_note(f"{output} holds this run, finished; nothing was done")
            return finished
        training = Training(config, base, update_mask=update_mask)
        history = folder.resume(training, on_note)
        watch = Watch(config, history, on_note=on_note)
        if not history and 0 in config.saved_steps():
            folder.save(training, "checkpoint-0")
        while not training.finished:
            started = time.perf_counter()
            metrics = training.step()
            folder.append(metrics, seconds=time.perf_counter() - started)
            reached("step recorded")
            if metrics.step in config.saved_steps():
                folder.save(training, f"checkpoint-{metrics.step}")
                reached("checkpoint written")
            if metrics.step % state_every == 0 or training.finished:
                folder.save_state(training)
                reached("training state written")
            history.append(metrics)
            watch.look(metrics)
            on_step(metrics)
        folder.save(training, "final")
        reached("final weights written")
        return folder.finish(_judged(training, output, history, watch))


def _judged(training: Training, output: Path, history: list[StepMetrics], watch: Watch) -> TrainResult:
    """Base and policy on the same held-out problems."""
    config, task = training.config, named_task(training.config.task)
    problems = task.sample(
        _HELD_OUT_PROMPTS, lengths=config.lengths, generator=stream(config.seed, "held-out problems")
    )

    def accuracy(model: Llama) -> Estimate:
        generator = stream(config.seed, "held-out samples")
        return estimate(sampled_rewards(model, problems, task=task, generator=generator))

    base, policy = accuracy(training.actors.reference), accuracy(training.policy)
    watch.judge(base=base.value, policy=policy.value)
    return TrainResult(
        output=output,
        steps=len(history),
        updates=sum(metrics.updates for metrics in history),
        steps_without_signal=sum(metrics.updates == 0 for metrics in history),
        base_accuracy=base,
        accuracy=policy,
        warnings=watch.warnings,
    )
