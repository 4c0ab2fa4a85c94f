"""The queue of a study's trials: enqueue, claim, finish, release and reclaim.

Each index of a study's total is a waiting trial. A worker claims it by a compare-and-set on its state in the storage,
so the total is exact. When its process is dead, the attempt is marked failed and its index queued again.

Under the pruner `promote`, a trial at a rung goes back to waiting under its number; `hpo.study.promotion` decides which
trial is claimed next. When nothing runs or can be claimed, the paused trials are pruned.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from core.text import count
from hpo.space.pruner import PromotePruner, mark_place
from hpo.storage import lease
from hpo.storage.atomic import replacing
from hpo.storage.lease import LEASE, Held
from hpo.storage.optuna_access import forget_cached_trials, storage_of, trial_id
from hpo.study.promotion import Ladder
from hpo.trials import (
    ARTIFACT,
    BASELINE,
    CONSTRAINT,
    CRASHES,
    FAILURE,
    INTERRUPTED,
    PAUSED,
    PAUSED_BY,
    REASON,
    RECIPE,
    RESUMED_EPOCH,
    STOPPED,
    TRIAL_INDEX,
    WARM_START,
    Counts,
    count_trials,
    effective_trials,
    has_begun,
    is_baseline,
    is_paused,
    trial_index_of,
    with_current_names,
)

if TYPE_CHECKING:
    from hpo.paths import StudyPaths
    from hpo.space import Recipe, SearchSpace
    from hpo.study.files import StudyFiles
    from hpo.study.settings import StudySettings

logger = logging.getLogger(__name__)

Queued = tuple[dict[str, Any], dict[str, Any]]
"""Parameters and user attributes of a trial to queue. The sampler suggests the other parameters."""


class TrialQueue:
    """Changes a study's trials. Without the space it can only release and reclaim them."""

    def __init__(
        self,
        study: optuna.Study,
        settings: StudySettings,
        files: StudyFiles,
        paths: StudyPaths,
        space: SearchSpace | None,
    ) -> None:
        self._study = study
        self._settings = settings
        self._files = files
        self._paths = paths
        self._space = space

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return storage_of(self._study)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    # Enqueue

    def ensure_trials(self, total: int, warm_starts: Sequence[Queued] = ()) -> Counts:
        """Queue the missing indices from 0 to `total` - 1.

        They are the baseline, recipes of the space, those of the warm starts that were not queued before, then free
        trials.
        """
        self._settings.total = total
        trials = self._trials()
        effective = effective_trials(trials)
        for trial in trials:
            if trial.state == TrialState.WAITING and effective[trial_index_of(trial)] is not trial:
                self._set_state(trial, TrialState.FAIL)  # two processes queued the same index, this one later
        last_attempt = {trial_index_of(trial): trial for trial in trials}
        for trial_index in sorted(last_attempt.keys() - effective.keys()):
            if trial_index < total:
                self._queue_again(last_attempt[trial_index])
        known = {**last_attempt, **effective}.values()
        missing = self._missing(known)
        tried = {trial.user_attrs.get(WARM_START) for trial in known}
        missing += [(params, of) for params, of in warm_starts if of[WARM_START] not in tried]
        for trial_index in range(total):
            if trial_index not in last_attempt:
                params, attributes = missing.pop(0) if missing else ({}, {})
                self._queue(trial_index, params, attributes)
        for attributes in (of for _, of in missing if WARM_START not in of):
            name = f"recipe {attributes[RECIPE]}" if RECIPE in attributes else "the baseline"
            logger.info("%s is no trial of the study: all of its %d trials were queued before", name, total)
        return count_trials(self._trials())

    def enqueue(self, trials: Sequence[Queued]) -> None:
        """Queue trials after all others, and raise the total.

        The total is raised last, also without new trials, in case another process died before it did.
        """
        first = max(map(trial_index_of, self._trials()), default=-1) + 1
        for trial_index, (params, attributes) in enumerate(trials, first):
            self._queue(trial_index, params, attributes)
        self._settings.total = max(self._settings.total or 0, first + len(trials))

    def missing_recipes(self) -> list[Recipe]:
        """Return the recipes that the space can express and that no trial of the total trains."""
        names = {attributes.get(RECIPE) for _, attributes in self._missing(self._of_total())}
        return [recipe for recipe in self._known_space().recipes if recipe.name in names]

    def _known_space(self) -> SearchSpace:
        assert self._space is not None, "only a study that was opened with its space can queue or claim trials"
        return self._space

    def _missing(self, trials: Iterable[FrozenTrial]) -> list[Queued]:
        """Parameters and attributes of the baseline and expressible recipes not among these trials."""
        space = self._known_space()
        if not space.trains_baseline:
            return []
        known = list(trials)
        names = {trial.user_attrs.get(RECIPE) for trial in known}
        baseline = space.baseline_params()
        expressed = [(recipe.name, space.express(recipe.config)) for recipe in space.recipes]
        seen = [params for name, params in expressed if name in names]
        missing: list[Queued] = []
        if any(map(is_baseline, known)):
            seen.append(baseline)
        else:
            missing.append((baseline, {BASELINE: True}))
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
        self._study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                system_attrs={"fixed_params": dict(params)} if params else None,
                user_attrs={TRIAL_INDEX: trial_index, **attributes},
            )
        )

    def _queue_again(self, attempt: FrozenTrial, *, crashes: int = 0) -> None:
        """Queue an attempt's index, with its parameters and rungs; delete the attempt's networks and their outputs."""
        for file in self._paths.kept_of(attempt.number):  # else the next attempt's network would count twice
            file.unlink(missing_ok=True)
            self._files.unshare(file)
        dropped = {LEASE, INTERRUPTED, RESUMED_EPOCH, FAILURE, REASON, STOPPED, "error"}
        attributes = {key: value for key, value in with_current_names(attempt.user_attrs).items() if key not in dropped}
        # The sampler's and the pruner's system attributes stay; the artifacts belong to the attempt.
        system = {k: v for k, v in attempt.system_attrs.items() if not k.startswith((CONSTRAINT, ARTIFACT))}
        # The values that a paused trial is compared by; later ones belong to the attempt.
        paused_at = attributes.get(PAUSED, 0)
        values = {step: value for step, value in attempt.intermediate_values.items() if step <= paused_at}
        self._study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=attempt.params,
                distributions=attempt.distributions,
                user_attrs=attributes | ({CRASHES: crashes} if crashes else {}),
                system_attrs=system,
                intermediate_values=values,
            )
        )

    # Claim, finish, release

    def claim(self, *, ending: bool = False, without: Container[int] = ()) -> tuple[optuna.Trial, int] | None:
        """Claim the waiting trial with the lowest index; under `promote`, the one that is due.

        Args:
            ending: Claim the best paused trial of the last rung, since there is no time for others.
            without: Indices that are not claimed.

        Returns:
            The running trial, whose lease this process holds, and its index; None if no trial of the total can be
            claimed. The sampler suggests its free parameters.
        """
        self._known_space()
        forget_cached_trials(self._study)
        while ready := [one for one in self._ready(ending=ending) if trial_index_of(one) not in without]:
            if self._take(ready[0]):
                if is_paused(ready[0]):
                    self._mark_place(ready[0], kept=True)
                return optuna.Trial(self._study, trial_id(ready[0])), trial_index_of(ready[0])
        return None

    def next_rung(self, trial: optuna.Trial) -> int | None:
        """Return the step at which a claimed trial has to pause; None if it runs to its end."""
        ladder = self._ladder()
        return None if ladder is None else ladder.next_rung(self._storage.get_trial(trial_id(trial)))

    def pause(self, trial: optuna.Trial, rung: int, attributes: Mapping[str, Any]) -> bool:
        """Let a claimed trial wait at a rung. If the process dies before the last write, it is queued there again.

        Returns:
            False if the trial was taken from this process before.
        """
        own = lease.own_lease()
        # The lease must not outlive the pause: the next process writes its own after its claim.
        written = {**attributes, PAUSED_BY: [own["host"], own["pid"]], PAUSED: rung, LEASE: None}
        try:
            for key, item in written.items():
                trial.set_user_attr(key, item)
            return self._storage.set_trial_state_values(trial_id(trial), TrialState.WAITING)
        except UpdateFinishedTrialError:
            return self._taken(trial)

    def finish(
        self,
        trial: optuna.Trial,
        state: Literal["complete", "pruned"],
        value: float | None = None,
        *,
        failure: str | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """End a claimed trial, which then counts towards the total.

        Args:
            value: The objective of a complete trial; must be finite.
            failure: `diverged`, `oom` or `invalid`, if a pruned trial could not be trained. It becomes a constraint, so
                that the sampler avoids the region.

        Returns:
            False, and the result is dropped, if the trial was taken from this process before.
        """
        if state == "complete" and (value is None or not math.isfinite(value)):
            raise ValueError(f"trial {trial.number} is complete with the value {value}")
        try:
            for key, item in (attributes or {}).items():
                trial.set_user_attr(key, item)
            if failure is not None:
                trial.set_user_attr(FAILURE, failure)
                trial.set_constraint(FAILURE, 1.0)
            self._study.tell(trial, value if state == "complete" else None, state=TrialState[state.upper()])
        except (UpdateFinishedTrialError, ValueError):
            if self._storage.get_trial(trial_id(trial)).state == TrialState.RUNNING:
                raise
            return self._taken(trial)
        return True

    def _taken(self, trial: optuna.Trial) -> Literal[False]:
        # This process seemed dead, and the index was queued again: the result of the other attempt counts.
        logger.warning("trial %d was taken from this process while it ran; its result is dropped", trial.number)
        return False

    def release(self, trial: optuna.Trial, *, crashed: bool = False) -> None:
        """Queue a claimed trial again; `crashed` counts the attempt against the retries."""
        frozen = self._storage.get_trial(trial_id(trial))
        if frozen.state == TrialState.RUNNING:
            self._interrupt(frozen, crashed=crashed)

    def heartbeat(self, trial: optuna.Trial) -> contextlib.AbstractContextManager[None]:
        """Show other hosts that the process is alive."""
        return lease.heartbeat(self._storage, trial_id(trial))

    # Reclaim

    def reclaim(self, *, force: bool = False, blameless: bool = False) -> list[int]:
        """Queue the trials of dead processes again, and return their indices.

        Args:
            force: Also reclaim trials of other hosts, whose processes cannot be checked without heartbeats.
            blameless: Do not count the deaths against the retries, because the caller killed the processes.
        """
        running = self._running()
        dead = lease.dead_of(self._study, running)
        queued = []
        for trial in running:
            abandoned = lease.is_abandoned(trial)
            if trial.number in dead or (force and lease.held_elsewhere(trial) is not None):
                crashed = abandoned and not blameless and lease.died_alone(trial)
                if self._interrupt(trial, crashed=crashed):
                    queued.append(trial_index_of(trial))
        return queued

    def drop_finished_checkpoints(self) -> None:
        """Delete the checkpoints of finished trials, which a process leaves that dies as its trial ends."""
        taken = effective_trials(self._trials())
        for trial_index in self._paths.trial_indices_with_checkpoints() & taken.keys():
            if taken[trial_index].state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._drop_checkpoints(taken[trial_index])

    def requeue_lost(self) -> bool:
        """Requeue the trials of processes that died while they gave one back. Return whether any can be claimed.

        If none can, and none runs, prune the paused trials.
        """
        if self._settings.total is not None:
            self.ensure_trials(self._settings.total)
        if self.claimable():
            return True
        if self._ladder() is not None and not self._running():
            self._prune_paused()
        return False

    def _prune_paused(self) -> None:
        for trial in filter(is_paused, self._of_total()):
            if not self._take(trial):  # so that no other process continues it meanwhile
                continue
            self._mark_place(trial, kept=False)
            self._bring_files(trial)
            self._drop_checkpoints(trial)
            self._storage.set_trial_state_values(
                trial_id(trial), TrialState.PRUNED, [trial.intermediate_values[max(trial.intermediate_values)]]
            )

    def _bring_files(self, trial: FrozenTrial) -> None:
        """Copy the files of the attempt that paused, if a process has died with the trial since."""
        folder, index = self._paths.trial(trial.number), trial_index_of(trial)
        earlier = [one.number for one in self._trials()[: trial.number] if trial_index_of(one) == index]
        paused = next((number for number in earlier if self._paths.trial_metrics(number).exists()), None)
        if paused is None or self._paths.trial_metrics(trial.number).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in self._paths.trial(paused).iterdir():
            with replacing(folder / file.name) as copy:
                shutil.copyfile(file, copy)

    def held_elsewhere(self) -> list[Held]:
        """Return the running trials of other hosts or containers, which may be dead."""
        return [held for trial in self._running() if (held := lease.held_elsewhere(trial)) is not None]

    def at_work(self) -> list[int]:
        """Return the numbers of the total's running trials that can be checked from here."""
        return [
            trial.number
            for trial in self._of_total()
            if trial.state == TrialState.RUNNING
            and (lease.held_elsewhere(trial) is None or lease.has_heartbeat(self._storage))
        ]

    def waiting(self) -> int:
        """Return the number of waiting trials, paused ones included."""
        return sum(trial.state == TrialState.WAITING for trial in self._of_total())

    def claimable(self) -> int:
        """Return the number of trials that can be claimed now: the waiting ones without those that stay paused."""
        return len(self._ready())

    def paused(self) -> list[FrozenTrial]:
        """Return the trials that wait at a rung, the best of the last rung first."""
        ladder = self._ladder()
        return [] if ladder is None else ladder.furthest()

    def _ready(self, *, ending: bool = False) -> list[FrozenTrial]:
        ladder = self._ladder()
        if ladder is None:
            return [trial for trial in self._of_total() if trial.state == TrialState.WAITING]
        return ladder.furthest() if ending else ladder.claimable()

    def _ladder(self) -> Ladder | None:
        """The rungs of `promote`; None with another pruner."""
        pruner = self._study.pruner
        if not isinstance(pruner, PromotePruner):
            return None
        return Ladder(pruner, self._of_total(), 1 if self._study.direction.name == "MAXIMIZE" else -1)

    def _mark_place(self, trial: FrozenTrial, *, kept: bool) -> None:
        ladder = self._ladder()
        assert ladder is not None, "only `promote` pauses trials"
        mark_place(self._study, trial, trial.user_attrs[PAUSED], ladder.place(trial, kept=kept))

    def _of_total(self) -> list[FrozenTrial]:
        """The effective trials of the total, by index: all that have begun, and as many others as it has room for.

        A total that was lowered can have ended trials behind waiting ones that were too long for a time limit. The
        baseline always belongs to it, even if as many trials were imported.
        """
        trials = [trial for _, trial in sorted(effective_trials(self._trials()).items())]
        if (total := self._settings.total) is None:
            return trials
        begun = sum(map(has_begun, trials))
        waiting = (trial for trial in trials if not has_begun(trial))
        room = {trial.number for trial in islice(waiting, max(0, total - begun))}
        room |= {trial.number for trial in trials if is_baseline(trial) and trial_index_of(trial) < total}
        return [trial for trial in trials if has_begun(trial) or trial.number in room]

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.state == TrialState.RUNNING]

    def _interrupt(self, trial: FrozenTrial, *, crashed: bool) -> bool:
        """End an attempt and queue its index again; False if another process did, or after too many crashes."""
        # An attempt without parameters died before its configuration could be at fault.
        crashes = int(trial.user_attrs.get(CRASHES, 0)) + bool(crashed and trial.params)
        if crashes > self._settings.retries:
            self._give_up(trial, crashes)
            return False
        try:
            self._storage.set_trial_user_attr(trial_id(trial), INTERRUPTED, True)
        except UpdateFinishedTrialError:
            return False
        # If the process dies between these two, `ensure_trials` queues the index again.
        if not self._set_state(trial, TrialState.FAIL):
            return False
        self._queue_again(trial, crashes=crashes)
        return True

    def _give_up(self, trial: FrozenTrial, crashes: int) -> None:
        """End a trial whose process died too often: its configuration cannot be trained here."""
        reported = trial.intermediate_values
        values = [reported[max(reported)]] if reported else None  # as `Study.tell` does with a pruned trial
        storage, number = self._storage, trial_id(trial)
        try:
            storage.set_trial_user_attr(number, CRASHES, crashes)
            storage.set_trial_user_attr(number, FAILURE, "crashed")
            storage.set_trial_system_attr(number, f"{CONSTRAINT}{FAILURE}", 1.0)
            storage.set_trial_state_values(number, TrialState.PRUNED, values)
        except UpdateFinishedTrialError:  # another process was faster
            return
        self._drop_checkpoints(trial)
        logger.warning(
            "trial %d: %s at it died with the process, so it counts as failed to train; --retries N allows more",
            trial.number,
            count(crashes, "attempt"),
        )

    def _drop_checkpoints(self, trial: FrozenTrial) -> None:
        for checkpoint in self._paths.checkpoints_of(trial_index_of(trial)):
            self._files.drop_checkpoint(checkpoint)

    def _take(self, trial: FrozenTrial) -> bool:
        """Claim a waiting trial; False if another process did."""
        if not self._set_state(trial, TrialState.RUNNING):
            return False
        try:
            self._storage.set_trial_user_attr(trial_id(trial), LEASE, lease.own_lease())
        except UpdateFinishedTrialError:
            return False
        return True

    def _set_state(self, trial: FrozenTrial, state: TrialState) -> bool:
        """False if another process set it."""
        try:
            return bool(self._storage.set_trial_state_values(trial_id(trial), state))
        except UpdateFinishedTrialError:
            return False
