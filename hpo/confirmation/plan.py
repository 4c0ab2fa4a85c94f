"""The plan of a confirmation: which configurations are trained how often, within its budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from filelock import FileLock

from core.data import Dataset
from hpo.confirmation.candidates import best_trial, candidates, confirmed_before
from hpo.confirmation.result import BASELINE, Candidate, dump
from hpo.confirmation.statistics import (
    MAX_CANDIDATES,
    MAX_REPLICATES,
    MAX_TRAININGS,
    MIN_REPLICATES,
    Allocation,
    allocate,
)
from hpo.confirmation.trials import (
    Race,
    Training,
    in_parts,
    race,
    replicated,
    search_epochs,
    search_seconds,
    seconds_per_epoch,
    trainings,
)
from hpo.space import CANDIDATE, REPLICATE, ConfirmationSpace
from hpo.study import Study
from hpo.trials import CONFIG

if TYPE_CHECKING:
    from hpo.space import SearchSpace

DEFAULT_TRAININGS = 12
"""At least, by default: two challengers and the baseline four times each."""


class Plan:
    """The trainings of a confirmation: the candidates and replicates that the budget allows.

    The budget is a share of the epochs trained by the search. By default it is a third, but at least
    `DEFAULT_TRAININGS` trainings, and at most the epochs and the time of the search unless `within_s` is given. That
    limits any budget to the trainings that fit these seconds. Times are those of one training at a time, at each
    configuration's speed in the search.
    """

    def __init__(
        self, search: Study, space: SearchSpace, *, share: float | None, within_s: float | None = None
    ) -> None:
        best_trial(search)  # raises an error if there is none
        self.search, self.margin = search, space.confirm.margin
        self.cost_epochs = space.baseline.epochs * (space.baseline.data.folds or 1)
        """Maximum number of epochs of one training."""
        self.search_trials, self.search_epochs = search.counts().finished, search_epochs(search)
        self.search_s = search_seconds(search)
        """Time of the search's finished trials; None if it is not known."""
        self._epoch_s = seconds_per_epoch(search)
        unpriced = share is None and within_s is None
        if share is None:
            enough = max(self.search_epochs // 3, DEFAULT_TRAININGS * self.cost_epochs)
            self.budget_epochs = min(enough, self.search_epochs) if unpriced else enough
        else:
            self.budget_epochs = int(share * self.search_epochs + 1e-9)  # less a rounding error: 0.1 × 30 is 3
        limits = (self.search_s if unpriced else None, within_s)
        self._most_s = min((limit for limit in limits if limit is not None), default=math.inf)
        if self._epoch_s is not None and math.isfinite(self._most_s):
            self.budget_epochs = min(self.budget_epochs, int(self._most_s / self._epoch_s + 1e-9))
        self._preferred = candidates(search, space)
        self._speeds = self._epoch_seconds()
        self.allocation = self._allocated(least=1 if unpriced else MIN_REPLICATES)
        self.chosen = tuple(self._preferred[: self.allocation.candidates])
        self.seconds = self._seconds(self.allocation)
        """Longest time of the planned trainings; None if it is not known."""
        why = "the budget is too small for it"
        if self.allocation.candidates == MAX_CANDIDATES:
            why = f"more than {MAX_CANDIDATES} would only widen all intervals"
        self.left_out = tuple(
            f"{candidate.key} ({', '.join(candidate.chosen_for)}): {why}"
            for candidate in self._preferred[self.allocation.candidates :]
        )

    def _allocated(self, *, least: int) -> Allocation:
        """The largest allocation within the budget's epochs and seconds; the smallest if none is."""
        for budget in range(min(self.budget_epochs // self.cost_epochs, MAX_TRAININGS), 0, -1):
            found = allocate(budget_trainings=budget, candidates=len(self._preferred), least=least)
            if (self._seconds(found) or 0.0) <= self._most_s:
                return found
        return allocate(budget_trainings=0, candidates=len(self._preferred), least=least)

    def _epoch_seconds(self) -> list[float]:
        """Seconds of an epoch of each preferred candidate that may be chosen; the mean where its own are not known."""
        if (mean := self._epoch_s) is None:
            return []
        chosen = self._preferred[:MAX_CANDIDATES]
        return [mean if one.trial is None else seconds_per_epoch(self.search, one.trial) or mean for one in chosen]

    def _seconds(self, allocation: Allocation) -> float | None:
        if not self._speeds:
            return None
        return allocation.replicates * self.cost_epochs * sum(self._speeds[: allocation.candidates])

    @property
    def challengers(self) -> tuple[Candidate, ...]:
        """The chosen candidates without the baseline."""
        return tuple(candidate for candidate in self.chosen if candidate.key != BASELINE)

    @property
    def is_over_budget(self) -> bool:
        epochs, seconds = self.allocation.trainings * self.cost_epochs, self.seconds or 0.0
        return epochs > self.budget_epochs or seconds > self._most_s

    def queue(self, study: Study, dataset: Dataset) -> int:
        """Queue the missing trainings, replicate by replicate, and return their number.

        If all planned trainings are over, those saved by early stopping go to the remaining candidates,
        significant or not: a test repeated until it finds something finds it too often.
        """
        study.paths.dir.mkdir(parents=True, exist_ok=True)
        with FileLock(study.paths.queueing):  # two processes would queue the same trainings
            return self._queue(study, dataset)

    def _queue(self, study: Study, dataset: Dataset) -> int:
        known, space = trainings(study), study.space()
        assert isinstance(space, ConfirmationSpace)
        state = race(known, space)
        remaining = self._remaining(state)
        missing = _missing(known, remaining, range(self.allocation.replicates))
        if not missing and all(training.is_over for training in known):
            missing = self._saved(known, state, remaining)
        places = {identity: place for place, identity in enumerate(dict.fromkeys(t.identity for t in known))}
        queued = []
        for candidate, replicate in missing:
            place = places.setdefault(candidate.identity, len(places))
            config = replicated(
                candidate.train_config, replicate, seed=self.search.seed, dataset=dataset, parts=in_parts(known)
            )
            attributes = {CANDIDATE: candidate.key, REPLICATE: replicate, CONFIG: dump(config)}
            queued.append(({CANDIDATE: place, REPLICATE: replicate}, attributes))
        study.queue.enqueue(queued)  # also an empty list: a process may have died before it raised the total
        return len(queued)

    def _saved(
        self, known: Sequence[Training], state: Race, remaining: Sequence[Candidate]
    ) -> list[tuple[Candidate, int]]:
        """Further replicates of the remaining candidates, up to the planned number of trainings."""
        identities = {candidate.identity for candidate in self.chosen}
        if len(remaining) < 2:
            return []
        trained = sum(one.values is not None for one in state.counted if one.identity in identities)
        more: list[tuple[Candidate, int]] = []
        for replicate in range(self.allocation.replicates, MAX_REPLICATES):
            missing = _missing(known, remaining, [replicate])
            if trained + len(more) + len(missing) > self.allocation.trainings:
                break
            more += missing
        return more

    def _remaining(self, state: Race) -> list[Candidate]:
        """The candidates neither stopped nor failed; none if all challengers are."""
        out = {*state.left, *(training.identity for training in state.counted if training.failure)}
        remaining = [candidate for candidate in self.chosen if candidate.identity not in out]
        return remaining if any(candidate.key != BASELINE for candidate in remaining) else []

    def earlier(self, known: Sequence[Training]) -> list[Candidate]:
        """Return the candidates of an earlier confirmation that are not chosen now; they may win too."""
        left = {training.identity for training in known if training.values} - {one.identity for one in self.chosen}
        preferred = [one for one in self._preferred if one.identity in left]
        return preferred + confirmed_before(self.search, left - {one.identity for one in preferred})


def _missing(
    known: Sequence[Training], remaining: Sequence[Candidate], replicates: Iterable[int]
) -> list[tuple[Candidate, int]]:
    existing = {(training.identity, training.replicate) for training in known}
    return [(one, number) for number in replicates for one in remaining if (one.identity, number) not in existing]
