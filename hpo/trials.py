"""What stands in a trial's user attributes, and which trial stands for a slot.

A study's total is made of slots. A trial that was cut off leaves its slot to another trial, so that whoever counts or
compares trials counts slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, Trial, TrialState

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.loop import EpochMetrics, TrainResult

TOTAL = "trials"
"""Study user attribute: the total number of trials, for workers that join."""
TRIAL_INDEX = "trial_index"
"""The user attribute of every trial of ours: its place in the study's total. A retried trial keeps it."""
BASELINE = "baseline"
"""User attribute of the trial that trains the space's baseline, which is never pruned."""
OLD_NAMES = {TRIAL_INDEX: "slot", BASELINE: "base"}
"""User attributes by the names that studies of version 0.1.0 gave them; they are read, never written."""
RECIPE = "recipe"
"""The user attribute of a trial that is a recipe, which is never pruned: the recipe's name."""
LET_THROUGH = "let_through"
"""The user attribute of a trial that a rung would have cut and that went on, on purpose: the step of that rung."""
FAILURE = "failure"
"""The user attribute of a trial that could not be trained to its end: `diverged`, `oom`, `invalid` or `crashed`."""
CRASHES = "crashes"
"""The user attribute of a trial: how many attempts at its slot ended with their process, so far."""
REPLICATE_OF = "replicate_of"
"""The user attribute of a trial with an earlier slot's parameters, which it trains with another seed: that slot."""
RESUMED_EPOCH = "resumed_epoch"
"""The user attribute of an attempt that went on from a checkpoint: the epoch that was in it; with folds, the step."""
INTERRUPTED = "interrupted"
"""The user attribute of an attempt that was cut off; its slot was queued again."""
ARTIFACT = "artifacts:"
"""How Optuna begins the system attribute of a trial by which an uploaded artifact is known."""
CONFIG = "config"
"""The user attribute of a confirmation's trial: the whole configuration that it trains, seed and split included."""
STOPPED = "stopped"
"""The user attribute of a confirmation's trial that was not trained, since its candidate can no longer win: why."""
TAKEN_FROM = "taken_from"
"""The user attribute of a trial that another study ran: `STUDY/NUMBER`."""


def trial_index_of(trial: FrozenTrial) -> int:
    """The trial's index in the study's total; its number, where another program added the trial."""
    attributes = trial.user_attrs
    return int(attributes.get(TRIAL_INDEX, attributes.get(OLD_NAMES[TRIAL_INDEX], trial.number)))


def is_baseline(trial: FrozenTrial | Trial) -> bool:
    """Whether the trial trains the space's baseline."""
    return bool(trial.user_attrs.get(BASELINE) or trial.user_attrs.get(OLD_NAMES[BASELINE]))


def effective_trials(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Slot -> the trial that stands for it: what was not cut off, the earlier of two, but rather what was begun,
    or has the parameters of an attempt before."""
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            continue
        other = found.get(trial_index_of(trial))
        if other is None or (other.state == TrialState.WAITING and _is_further(trial, other)):
            found[trial_index_of(trial)] = trial
    return found


def _is_further(trial: FrozenTrial, waiting: FrozenTrial) -> bool:
    """Whether a trial stands for its slot before an earlier one that waits: it was begun, or has its parameters."""
    return trial.state != TrialState.WAITING or bool(trial.params and not waiting.params)


def first_twin(trials: Iterable[FrozenTrial], params: Mapping[str, Any], trial_index: int) -> int | None:
    """The lowest slot before this one that has these very parameters; None where it is the first.

    Only lower slots count, so that whatever runs beside it decides nothing.
    """
    return min(
        (
            other
            for other, trial in effective_trials(trials).items()
            if other < trial_index and trial.state != TrialState.WAITING and trial.params == params
        ),
        default=None,
    )


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    number: int
    trial_index: int
    state: Literal["complete", "pruned"]
    value: float | None
    """The objective: the final one of a complete trial, the last reported one of a pruned trial."""
    config: TrainConfig | None
    params: dict[str, Any]
    history: tuple[EpochMetrics, ...] = ()
    """Of all folds, one after the other; the elapsed time runs on."""
    rows: tuple[dict[str, float | int], ...] = ()
    """The lines of its `metrics.jsonl`."""
    results: tuple[TrainResult, ...] = ()
    """Of a complete trial: one, or one a fold, whose networks then wait on the host."""
    failure: str | None = None
    """`diverged`, `oom` or `invalid`, of a trial that could not be trained to its end."""
    replicate_of: int | None = None
    """The earlier slot that has the same parameters."""
    why: str = ""
    """The pruner's verdict, or the failure's text."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the storage remembers beside the value."""


@dataclass(frozen=True)
class Counts:
    """How a study's trials stand. Interrupted attempts are not in it."""

    complete: int
    pruned: int
    """By the pruner."""
    failures: int
    """Pruned because they could not be trained: `diverged`, `oom`, `invalid`."""
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """What counts towards the total."""
        return self.complete + self.pruned + self.failures
