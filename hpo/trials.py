"""User attributes of trials, and the effective trial of each trial index.

A study's total consists of trial indices. After an interrupted attempt there is another trial of the same index.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
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
"""Step of the rung that would have pruned the trial, which continued deliberately."""
PAUSED = "paused"
"""Step of the rung at which the trial last paused. While it is waiting, its checkpoint waits there for promotion."""
PAUSED_BY = "paused_by"
"""Host and process ID of the worker that paused the trial."""
FAILURE = "failure"
"""Why the trial could not be trained: `diverged`, `oom`, `invalid` or `crashed`."""
REASON = "reason"
"""Explanation of the failure, in one line."""
CRASHES = "crashes"
"""Number of attempts whose process died."""
REPLICATE_OF = "replicate_of"
"""Lower trial index with the same parameters and another seed."""
RESUMED_EPOCH = "resumed_epoch"
"""Epoch of the checkpoint that an attempt resumed from; with folds, the step."""
INTERRUPTED = "interrupted"
"""True for an interrupted attempt."""
CONFIG = "config"
"""Configuration of a confirmation's trial, with seed and split."""
STANDARD_ERROR = "standard_error"
"""Standard error of the value of a search's complete trial, by the number of its validation images."""
VAL_LOSS = "val_loss"
"""Validation loss of a complete trial; the lower one is the better of trials with the same value."""
COSTS = "costs"
"""Costs of a trial by name, measured before it trains; see `hpo.space.grammar.Objective`."""
STOPPED = "stopped"
"""Why a confirmation's trial was not trained."""
TAKEN_FROM = "taken_from"
"""Origin of an imported trial: `STUDY/NUMBER`."""
WARM_START = "warm_start"
"""Trial of another study whose configuration the trial repeats: `STUDY/NUMBER`."""

# Prefixes of Optuna's system attributes

ARTIFACT = "artifacts:"
CONSTRAINT = "constraints:"
RUNG_LOSS = "rung_loss:"
"""Before a rung's step: the validation loss there at the best temperature, by which `rungs` ranks accuracies."""


def trial_index_of(trial: FrozenTrial) -> int:
    """Return the trial's index in the study's total; its number if another program added the trial."""
    attributes = trial.user_attrs
    return int(attributes.get(TRIAL_INDEX, attributes.get(OLD_NAMES[TRIAL_INDEX], trial.number)))


def is_baseline(trial: FrozenTrial | Trial) -> bool:
    """Return whether the trial trains the space's baseline."""
    return bool(trial.user_attrs.get(BASELINE) or trial.user_attrs.get(OLD_NAMES[BASELINE]))


def is_paused(trial: FrozenTrial) -> bool:
    """Return whether the trial waits at a rung to be promoted."""
    return trial.state == TrialState.WAITING and PAUSED in trial.user_attrs


def state_of(trial: FrozenTrial) -> str:
    """Return a trial's state as it is shown: Optuna's, or `paused`."""
    return "paused" if is_paused(trial) else trial.state.name.lower()


def with_current_names(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the user attributes of version 0.1.0."""
    current = {old: new for new, old in OLD_NAMES.items()}
    return {current.get(name, name): value for name, value in attributes.items()}


Order = tuple[float, float, int]
"""Sort key of complete trials, see `best_first`."""


def best_first(trial: FrozenTrial, sign: int) -> Order:
    """Sort key of complete trials: the better value, of equals the lower validation loss, then the lower index.

    With few validation images many trials share the best accuracy. Trials of earlier versions have no loss, and come
    first of equals.

    Args:
        trial: A complete trial.
        sign: 1 if the value is maximized, -1 if it is minimized.
    """
    assert trial.value is not None, "a complete trial has a value"
    return order_of(trial.value, trial.user_attrs, trial_index_of(trial), sign)


def order_of(value: float, attributes: Mapping[str, Any], trial_index: int, sign: int) -> Order:
    """Return the sort key `best_first` of a trial with this value and these user attributes."""
    return -sign * value, float(attributes.get(VAL_LOSS, -math.inf)), trial_index


def effective_trials(trials: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return the trial that counts for each trial index; `trials` are in the order of their numbers.

    Failed attempts never count. Of several trials the earliest counts, unless it is waiting and a later one has started
    or has the parameters of an earlier attempt.
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


def has_begun(trial: FrozenTrial) -> bool:
    """Whether a trial runs, has ended or is paused."""
    return trial.state != TrialState.WAITING or is_paused(trial)


def first_twin(trials: Iterable[FrozenTrial], params: Mapping[str, Any], trial_index: int) -> int | None:
    """Return the lowest trial index before this one with the same parameters."""
    return min(
        (
            other
            for other, trial in effective_trials(trials).items()
            if other < trial_index and has_begun(trial) and trial.params == params
        ),
        default=None,
    )


@dataclass(frozen=True)
class Outcome:
    """Result of a finished trial, or of one that pauses."""

    number: int
    trial_index: int
    state: Literal["complete", "pruned", "paused"]
    value: float | None
    """The last reported one of a pruned or paused trial."""
    config: TrainConfig | None
    params: dict[str, Any]
    history: tuple[EpochMetrics, ...] = ()
    """Epochs of all folds, one fold after the other."""
    rows: tuple[dict[str, float | int], ...] = ()
    """Lines of `metrics.jsonl`."""
    results: tuple[TrainResult, ...] = ()
    """Results of a complete trial's folds, with networks in host memory."""
    failure: str | None = None
    """See `FAILURE`."""
    replicate_of: int | None = None
    """See `REPLICATE_OF`."""
    why: str = ""
    """The pruner's verdict, or the error message."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """User attributes to store."""


@dataclass(frozen=True)
class Counts:
    """Trials by state, without interrupted attempts."""

    complete: int
    pruned: int
    failures: int
    """Trials that could not be trained, see `FAILURE`; they are not in `pruned`."""
    running: int
    """Trials of living and of dead processes."""
    paused: int
    """Trials that wait at a rung to be promoted; they are not in `waiting`."""
    waiting: int
    dead: int = 0
    """Number of the running trials whose process is dead, as far as this machine and heartbeats show."""

    @property
    def finished(self) -> int:
        """Number of trials that count towards the total."""
        return self.complete + self.pruned + self.failures


def count_trials(trials: Iterable[FrozenTrial], dead: Container[int] = ()) -> Counts:
    """Count the effective trials by state; `dead` has the numbers of those whose process is dead."""
    counted = list(effective_trials(trials).values())
    states = [trial.state for trial in counted]
    paused = sum(map(is_paused, counted))
    failures = sum(trial.state == TrialState.PRUNED and FAILURE in trial.user_attrs for trial in counted)
    return Counts(
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED) - failures,
        failures=failures,
        running=states.count(TrialState.RUNNING),
        paused=paused,
        waiting=states.count(TrialState.WAITING) - paused,
        dead=sum(trial.state == TrialState.RUNNING and trial.number in dead for trial in counted),
    )
