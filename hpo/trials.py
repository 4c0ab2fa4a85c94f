"""Trials of a study: their user attributes, and the effective trial of each trial index.

A study's total consists of trial indices. An interrupted attempt is followed by another trial of the same index, so
trials are counted and compared by index, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, Trial, TrialState

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.loop import EpochMetrics, TrainResult

# User attributes of a trial

TRIAL_INDEX = "trial_index"
"""Place in the study's total. A retried trial keeps it."""
BASELINE = "baseline"
"""True for the trial that trains the space's baseline, which is never pruned."""
OLD_NAMES = {TRIAL_INDEX: "slot", BASELINE: "base"}
"""Names of these attributes in studies of version 0.1.0; read, never written."""
RECIPE = "recipe"
"""Name of the recipe that the trial trains. Recipes are never pruned."""
LET_THROUGH = "let_through"
"""Step of the rung that would have pruned the trial, which continued on purpose."""
FAILURE = "failure"
"""Why the trial could not be trained: `diverged`, `oom`, `invalid` or `crashed`."""
REASON = "reason"
"""Explanation of the failure, in one line."""
CRASHES = "crashes"
"""Number of attempts at the trial index that ended with the death of their process."""
REPLICATE_OF = "replicate_of"
"""Lower trial index with the same parameters, which this trial trains with another seed."""
RESUMED_EPOCH = "resumed_epoch"
"""Epoch of the checkpoint that an attempt resumed from; with folds, the step."""
INTERRUPTED = "interrupted"
"""True for an attempt that was interrupted; its trial index was queued again."""
CONFIG = "config"
"""Whole configuration that the trial trains, seed and split included, as in a confirmation."""
STOPPED = "stopped"
"""Why a confirmation's trial was not trained: its candidate can no longer win."""
TAKEN_FROM = "taken_from"
"""Origin of a trial that another study ran: `STUDY/NUMBER`."""

# Prefixes of Optuna's system attributes

ARTIFACT = "artifacts:"
"""Before the id of an uploaded artifact."""
CONSTRAINT = "constraints:"
"""Before the name of a constraint that `Trial.set_constraint` set."""


def trial_index_of(trial: FrozenTrial) -> int:
    """Return the trial's index in the study's total; its number if another program added the trial."""
    attributes = trial.user_attrs
    return int(attributes.get(TRIAL_INDEX, attributes.get(OLD_NAMES[TRIAL_INDEX], trial.number)))


def is_baseline(trial: FrozenTrial | Trial) -> bool:
    """Return whether the trial trains the space's baseline."""
    return bool(trial.user_attrs.get(BASELINE) or trial.user_attrs.get(OLD_NAMES[BASELINE]))


def with_current_names(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's user attributes with those of version 0.1.0 renamed."""
    current = {old: new for new, old in OLD_NAMES.items()}
    return {current.get(name, name): value for name, value in attributes.items()}


def effective_trials(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return the trial that counts for each trial index.

    Failed attempts never count. Of several trials of an index the earliest counts, unless it is waiting and a later one
    has started or has the parameters of an earlier attempt.

    Args:
        trials: All trials of a study, in the order of their numbers.
    """
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            continue
        other = found.get(trial_index_of(trial))
        if other is None or (other.state == TrialState.WAITING and _is_further(trial, other)):
            found[trial_index_of(trial)] = trial
    return found


def _is_further(trial: FrozenTrial, waiting: FrozenTrial) -> bool:
    return trial.state != TrialState.WAITING or bool(trial.params and not waiting.params)


def first_twin(trials: Iterable[FrozenTrial], params: Mapping[str, Any], trial_index: int) -> int | None:
    """Return the lowest trial index before this one with the same parameters, or None.

    Only lower indices count, so that the result does not depend on the trials that run at the same time.
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
    """Result of a finished trial."""

    number: int
    trial_index: int
    state: Literal["complete", "pruned"]
    value: float | None
    """Final objective of a complete trial, last reported one of a pruned trial."""
    config: TrainConfig | None
    params: dict[str, Any]
    history: tuple[EpochMetrics, ...] = ()
    """Epochs of all folds, one fold after the other; the elapsed time is that of the whole trial."""
    rows: tuple[dict[str, float | int], ...] = ()
    """Lines of `metrics.jsonl`."""
    results: tuple[TrainResult, ...] = ()
    """One result per fold of a complete trial, or a single one; their networks are in host memory."""
    failure: str | None = None
    """`diverged`, `oom` or `invalid`, if the trial could not be trained to its end."""
    replicate_of: int | None = None
    """Lower trial index with the same parameters."""
    why: str = ""
    """The pruner's verdict, or the error message."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """User attributes to store."""


@dataclass(frozen=True)
class Counts:
    """Number of a study's trials by state, without interrupted attempts."""

    complete: int
    pruned: int
    """By the pruner."""
    failures: int
    """Pruned because they could not be trained, see `FAILURE`."""
    running: int
    waiting: int

    @property
    def finished(self) -> int:
        """Number of trials that count towards the total."""
        return self.complete + self.pruned + self.failures


def count_trials(trials: Iterable[FrozenTrial]) -> Counts:
    """Count the effective trials by state."""
    counted = list(effective_trials(trials).values())
    states = [trial.state for trial in counted]
    failures = sum(trial.state == TrialState.PRUNED and FAILURE in trial.user_attrs for trial in counted)
    return Counts(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED) - failures,
        failures=failures,
        running=states.count(TrialState.RUNNING),
        waiting=states.count(TrialState.WAITING),
    )
