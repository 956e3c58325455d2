"""What a run should tell its user while it goes: no signal, collapse, cut completions, inert options.

Contract: warnings are a function of config and metrics, each kind is given once, and a resumed run ends with
the same list. Nothing here changes a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsity_audit.lab.config import TrainConfig
from sparsity_audit.lab.metrics import StepMetrics

__all__ = ["Watch"]

_WINDOW = 5
"""Steps a warning looks back on."""


class Watch:
    """The warnings of one run.

    Args:
        config: Its settings.
        history: Steps that were taken before.
        on_note: Called with each new warning.
    """

    def __init__(
        self, config: TrainConfig, history: Sequence[StepMetrics], *, on_note: Callable[[str], None]
    ) -> None:
        self._config, self._found = config, dict[str, str]()
        self._steps: list[StepMetrics] = []
        self._on_note: Callable[[str], None] = lambda _text: None
        for metrics in history:
            self.look(metrics)
        self._on_note = on_note
        if config.divergence_scale and config.updates_per_step == 1:
            self._warn(
                "inert",
                "--divergence-weight is inert: weights are 1 on the first minibatch after a rollout, and "
                "there is no other; add --epochs or --minibatches",
            )

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that was said, in order of their kinds."""
        return tuple(self._found[kind] for kind in sorted(self._found))

    def look(self, metrics: StepMetrics) -> None:
        """Say what a step gives rise to."""
        self._steps.append(metrics)
        last = self._steps[-_WINDOW:]
        if len(last) == _WINDOW and not any(seen.updates for seen in last):
            self._warn(
                "no signal",
                f"no gradient in {_WINDOW} steps up to step {metrics.step}: rewards did not vary within any "
                "group; weights stand still while training goes on",
            )
        if metrics.truncated_frac is not None and metrics.truncated_frac > 0.5:
            self._warn(
                "truncated",
                f"{metrics.truncated_frac:.0%} of the completions of step {metrics.step} were cut at "
                f"{self._config.max_new_tokens} tokens and have reward 0; raise --max-new-tokens",
            )
        own = [seen.accuracy for seen in self._steps if seen.accuracy is not None]
        if self._config.sample_from == "policy" and len(own) > _WINDOW:
            recent = sum(own[-_WINDOW:]) / _WINDOW
            if recent < own[0] / 2:
                self._warn("collapse", _fell(recent, own[0], f"over {_WINDOW} steps up to {metrics.step}"))

    def judge(self, *, base: float, policy: float) -> None:
        """Say whether the trained policy is far below its base."""
        if policy < base / 2:
            self._warn("collapse at the end", _fell(policy, base, "on held-out problems"))

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._found:
            self._found[kind] = text
            self._on_note(f"warning: {text}")


def _fell(now: float, before: float, where: str) -> str:
    return f"accuracy {now:.3f} {where}, from {before:.3f} at the start: the run collapsed, or must not learn"
