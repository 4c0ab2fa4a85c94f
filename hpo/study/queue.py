"""The queue of a study's trials: enqueue, claim, finish, release, and requeue those of dead processes.

A study's total consists of trial indices. Index k is a waiting trial with the user attribute `trial_index`. A worker
claims it by a compare-and-set on its state in the storage, never by Optuna's `ask()`, which creates trials: so the
total is exact under any number of workers. A claimed trial holds a lease; when its process is dead, the attempt is
marked failed and its index queued again with the same parameters. Where two processes queue the same index at once,
the earlier trial counts and the later one is never claimed.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.storage.lease import (
    LEASE,
    Held,
    beating,
    died_alone,
    has_heartbeat,
    held_elsewhere,
    is_abandoned,
    own_lease,
    stale_elsewhere,
)
from hpo.storage.optuna_access import forget_cached_trials, id_of, storage_of, trial_id
from hpo.study.warm_start import CONSTRAINT
from hpo.trials import (
    ARTIFACT,
    BASELINE,
    CRASHES,
    FAILURE,
    INTERRUPTED,
    RECIPE,
    RESUMED_EPOCH,
    STOPPED,
    TOTAL,
    TRIAL_INDEX,
    Counts,
    effective_trials,
    is_baseline,
    trial_index_of,
)

if TYPE_CHECKING:
    from hpo.space import Recipe, SearchSpace

logger = logging.getLogger(__name__)


class TrialQueue:
    """Changes a study's trials, where `Study` only reads them.

    Args:
        study: with its space, to enqueue or claim trials; without, its trials can still be released and requeued.
    """

    def __init__(self, study: Any, space: SearchSpace | None) -> None:  # a Study, which imports this module
        self._study = study
        self._space = space
        self._storage = storage_of(study.optuna)

    def ensure_trials(self, total: int) -> Counts:
        """Queues what is missing of slots 0 to `total` - 1: the base, the recipes that the space can express, others.

        The base takes the first slot that is free: 0, but where trials of another study were taken over. A slot whose
        attempts were all cut off is queued with the parameters of the last one.
        """
        assert self._space is not None, "only a study that was opened with its space can queue trials"
        if self._study.total != total:
            self._study.optuna.set_user_attr(TOTAL, total)
        trials = self._trials()
        taken = effective_trials(trials)
        for trial in trials:
            if trial.state == TrialState.WAITING and taken[trial_index_of(trial)] is not trial:
                self._fail(trial)  # two processes queued the same slot: this one was second
        last_attempt = {trial_index_of(trial): trial for trial in trials}
        for trial_index in sorted(last_attempt.keys() - taken.keys()):
            if trial_index < total:
                self._queue_again(last_attempt[trial_index])
        missing = self._missing({**last_attempt, **taken}.values())
        for trial_index in range(total):
            if trial_index not in last_attempt:
                params, attributes = missing.pop(0) if missing else ({}, {})
                self._queue(trial_index, params, attributes)
        for _, attributes in missing:
            what = f"recipe {attributes[RECIPE]}" if RECIPE in attributes else "the base"
            logger.info("%s is no trial of the study: its %d trials were all queued before", what, total)
        counts: Counts = self._study.counts()
        return counts

    def enqueue(self, trials: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Queues these trials, each (parameters, attributes), behind all that there are, and raises the total to that.

        The total comes last, so that whoever dies here, or queues at the same time, leaves no slot without a trial.
        Without any trials it still rises to those that are there: whoever died may not have come to it.
        """
        known = [trial_index_of(trial) for trial in self._trials()]
        first = max(known, default=-1) + 1
        for trial_index, (params, attributes) in enumerate(trials, first):
            self._queue(trial_index, params, attributes)
        if first + len(trials) > (self._study.total or 0):
            self._study.optuna.set_user_attr(TOTAL, first + len(trials))

    def unslotted_recipes(self) -> list[Recipe]:
        """The recipes that the space can express and that are no trial of the study, in the space's order.

        A recipe that is the base, or another recipe, is a trial where that is one. One that waits beyond the total is
        none, since no worker will claim it.
        """
        assert self._space is not None, "only a study that was opened with its space knows its recipes"
        total = self._study.total
        trials = [
            trial
            for trial in effective_trials(self._trials()).values()
            if trial.state != TrialState.WAITING or total is None or trial_index_of(trial) < total
        ]
        names = {attributes.get(RECIPE) for _, attributes in self._missing(trials)}
        return [recipe for recipe in self._space.recipes if recipe.name in names]

    def _missing(self, trials: Iterable[FrozenTrial]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(parameters, attributes) of the base and of each recipe that the space can express, if not among these."""
        assert self._space is not None
        if self._study.confirms is not None:  # it has what was queued for it, and nothing of its own
            return []
        known = list(trials)
        names = {trial.user_attrs.get(RECIPE) for trial in known}
        base = self._space.baseline_params()
        expressed = [(recipe.name, self._space.express(recipe.config)) for recipe in self._space.recipes]
        seen = [params for name, params in expressed if name in names]
        missing: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if any(map(is_baseline, known)):
            seen.append(base)
        else:
            missing.append((base, {BASELINE: True}))
        for name, params in expressed:
            if params is None or params in seen:
                continue
            if missing and params == missing[0][0] and BASELINE in missing[0][1]:
                missing[0][1][RECIPE] = name
            else:
                missing.append((params, {RECIPE: name}))
            seen.append(params)
        return missing

    def _queue(self, trial_index: int, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        self._study.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                system_attrs={"fixed_params": dict(params)} if params else None,
                user_attrs={TRIAL_INDEX: trial_index, **attributes},
            )
        )

    def _queue_again(self, attempt: FrozenTrial, *, crashes: int | None = None) -> None:
        """Queues the slot of an attempt that was cut off: same parameters, same rungs judged, values to be reported.

        Args:
            crashes: how many attempts died so far; None leaves it at what the attempt says.
        """
        cut_off = {LEASE, INTERRUPTED, RESUMED_EPOCH, FAILURE, STOPPED, "error"}
        # What the sampler and the pruner remember of a trial stands in its system attributes, and stays. The attempt's
        # pictures do not: the next one draws them anew.
        dropped = (CONSTRAINT, ARTIFACT)
        self._study.optuna.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=attempt.params,
                distributions=attempt.distributions,
                user_attrs={key: value for key, value in attempt.user_attrs.items() if key not in cut_off}
                | ({CRASHES: crashes} if crashes else {}),
                system_attrs={k: v for k, v in attempt.system_attrs.items() if not k.startswith(dropped)},
            )
        )

    def claim(self) -> tuple[optuna.Trial, int] | None:
        """Takes the waiting trial of the lowest slot: (trial, slot), or None where nothing is left of the total.

        The trial is RUNNING and this process holds its lease. Its parameters are the sampler's to suggest, as after
        `ask()`, but for those that are fixed.
        """
        assert self._space is not None, "only a study that was opened with its space can run trials: it has the sampler"
        forget_cached_trials(self._study.optuna)
        total = self._study.total
        for trial_index, trial in sorted(effective_trials(self._trials()).items()):
            if trial.state != TrialState.WAITING or (total is not None and trial_index >= total):
                continue
            try:
                won = self._storage.set_trial_state_values(trial_id(trial), TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if won:
                self._storage.set_trial_user_attr(trial_id(trial), LEASE, own_lease())
                return optuna.Trial(self._study.optuna, trial_id(trial)), trial_index
        return None

    def finish(
        self,
        trial: optuna.Trial,
        state: Literal["complete", "pruned"],
        value: float | None = None,
        *,
        failure: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Ends a claimed trial; False where it was taken from this process before, and its result is dropped.

        Args:
            state: `complete`, with a value, or `pruned`; both count towards the total.
            failure: `diverged`, `oom` or `invalid`, of a pruned trial that could not be trained: a constraint, so that
                the sampler keeps away from it. Trials without one count as feasible.
            attributes: what to remember of the trial.
        """
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"trial {trial.number} is complete with the value {value}")
        try:
            for key, item in (attributes or {}).items():
                trial.set_user_attr(key, item)
            if failure is not None:
                trial.set_user_attr(FAILURE, failure)
                trial.set_constraint(FAILURE, 1.0)
            if state == "complete":
                self._study.optuna.tell(trial, value, state=TrialState.COMPLETE)
            else:
                self._study.optuna.tell(trial, state=TrialState.PRUNED)
        except (UpdateFinishedTrialError, ValueError):
            if self._storage.get_trial(trial_id(trial)).state == TrialState.RUNNING:
                raise
            # Its lease was taken for dead, and its slot queued again: the result of the other attempt will count.
            logger.warning("trial %d was taken from this process while it ran; its result is dropped", trial.number)
            return False
        return True

    def release(self, trial: optuna.Trial, *, crashed: bool = False) -> None:
        """Gives a claimed trial back: the attempt is marked as interrupted, and its slot queued again.

        Args:
            crashed: whether the attempt counts against `retries`.
        """
        frozen = self._storage.get_trial(trial_id(trial))
        if frozen.state == TrialState.RUNNING:
            self._interrupt(frozen, crashed=crashed)

    def reap(self, *, force: bool = False, blameless: bool = False) -> list[int]:
        """Gives back what dead processes had claimed, and returns the slots that are queued again.

        Whether a process of another host lives cannot be seen from here, but by the heartbeats that a database keeps;
        without them its trials are left alone, and `held_elsewhere` names them.

        Args:
            force: gives those back too. One that lives after all loses its trial, and its result is dropped.
            blameless: counts no death against `retries`: it was we who killed.
        """
        running = self._running()
        if not running:
            return []
        silent = (
            stale_elsewhere(self._storage, id_of(self._study.optuna)) if any(map(held_elsewhere, running)) else set()
        )
        queued = []
        for trial in running:
            if is_abandoned(trial):
                lost = self._interrupt(trial, crashed=not blameless and died_alone(trial))
            elif trial.number in silent or (force and held_elsewhere(trial) is not None):
                lost = self._interrupt(trial, crashed=False)
            else:
                continue
            if lost:
                queued.append(trial_index_of(trial))
        return queued

    def held_elsewhere(self) -> list[Held]:
        """The running trials that other hosts hold: at work there, or left behind, by a container with another name."""
        return [held for trial in self._running() if (held := held_elsewhere(trial)) is not None]

    def requeue_lost(self) -> bool:
        """Queues again what a process left behind that died while it gave a trial back; whether anything waits then."""
        if self._study.total is not None:
            self.ensure_trials(self._study.total)
        return self.waiting() > 0

    def at_work(self) -> list[int]:
        """The running trials of the total that are waited for: of living processes, as far as that can be seen."""
        total = self._study.total
        return [
            trial.number
            for trial in self._running()
            if (total is None or trial_index_of(trial) < total)
            and (held_elsewhere(trial) is None or has_heartbeat(self._storage))
        ]

    def beating(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """While in it, other hosts can see that the claimed trial's process lives, where the storage keeps that."""
        return beating(self._storage, trial_id(trial))

    def waiting(self) -> int:
        """How many slots of the total wait to be claimed."""
        total = self._study.total
        return sum(
            trial.state == TrialState.WAITING and (total is None or trial_index < total)
            for trial_index, trial in effective_trials(self._trials()).items()
        )

    def _trials(self) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._study.optuna.get_trials(deepcopy=False)
        return trials

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.state == TrialState.RUNNING]

    def _interrupt(self, trial: FrozenTrial, *, crashed: bool) -> bool:
        """Ends an attempt and queues its slot again; False where another process did, or where it crashes too often."""
        # An attempt without parameters died before its configuration could be at fault.
        crashes = int(trial.user_attrs.get(CRASHES, 0)) + bool(crashed and trial.params)
        if crashes > self._study.retries:
            self._give_up(trial, crashes)
            return False
        try:
            self._storage.set_trial_user_attr(trial_id(trial), INTERRUPTED, True)
        except UpdateFinishedTrialError:
            return False
        # A process that dies between these two leaves a slot without a trial, which `ensure_slots` queues again.
        if not self._fail(trial):
            return False
        self._queue_again(trial, crashes=crashes)
        return True

    def _give_up(self, trial: FrozenTrial, crashes: int) -> None:
        """Ends a trial whose process died again and again: its configuration cannot be trained here."""
        reported = trial.intermediate_values
        values = [reported[max(reported)]] if reported else None  # as `tell` does with a pruned trial
        try:
            self._storage.set_trial_user_attr(trial_id(trial), CRASHES, crashes)
            self._storage.set_trial_user_attr(trial_id(trial), FAILURE, "crashed")
            self._storage.set_trial_system_attr(trial_id(trial), f"{CONSTRAINT}{FAILURE}", 1.0)
            self._storage.set_trial_state_values(trial_id(trial), TrialState.PRUNED, values)
        except UpdateFinishedTrialError:  # another process was faster
            return
        for checkpoint in self._study.paths.checkpoints_of(trial_index_of(trial)):
            self._study.drop_checkpoint(checkpoint)
        logger.warning(
            "trial %d: %d attempt(s) at it died with their process, so it counts as failed to train; "
            "--retries N allows more",
            trial.number,
            crashes,
        )

    def _fail(self, trial: FrozenTrial) -> bool:
        try:
            return bool(self._storage.set_trial_state_values(trial_id(trial), TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False
