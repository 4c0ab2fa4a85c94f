"""Which trial of a study with the pruner `promote` to claim next: a new one, or the best that waits at a rung.

New trials enter in batches, run to the first rung and pause there. Then ceil(n / eta) of the n trials that have reached
a rung continue to the next one, from the best that wait, the lowest rung first: a trial that was passed over may
continue later. So with N trials a rung k is filled up to ceil(N / eta^k), as in successive halving (Jamieson and
Talwalkar 2016, arXiv 1502.07943), but asynchronously (Li et al. 2018, arXiv 1810.05934): a worker that finds nothing to
promote starts the next new trial.

The decision depends only on the trials in the storage. A process may die between any two writes: a trial that it ran is
queued again at its last rung, and the same decision continues it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

from optuna.trial import FrozenTrial, TrialState

from hpo.space.pruner import Place, PromotePruner, goodness_at, spared
from hpo.trials import PAUSED, TAKEN_FROM, has_begun, is_paused, trial_index_of

FIRST_BATCH = 40
"""New trials before the first is promoted."""
BATCH = 20
"""New trials in each later batch."""


class Ladder:
    """The rungs of a study, and the trials at each. The baseline, recipes and imported trials are never paused.

    Args:
        trials: The effective trials of the study's total, by index.
        sign: 1 if the value is maximized, -1 if it is minimized.
    """

    def __init__(self, pruner: PromotePruner, trials: Sequence[FrozenTrial], sign: int) -> None:
        self._trials, self._sign, self._factor = trials, sign, pruner.reduction_factor
        self._climbing = [trial for trial in trials if not spared(trial) and TAKEN_FROM not in trial.user_attrs]
        self.rungs = pruner.used(len(self._climbing))

    def claimable(self) -> list[FrozenTrial]:
        """Return the trials that can be claimed now, in this order."""
        new = [trial for trial in self._trials if not has_begun(trial)]
        entered = sum(map(has_begun, self._climbing))
        batch_is_full = entered >= FIRST_BATCH and (entered - FIRST_BATCH) % BATCH == 0
        return [*self._promoted(), *new] if batch_is_full or not new else new

    def furthest(self) -> list[FrozenTrial]:
        """Return the paused trials, the best of the last rung first."""
        paused = sorted(filter(is_paused, self._trials), key=_reached, reverse=True)
        return [best for rung, same in groupby(paused, key=_reached) for best in self._ranked(list(same), rung)]

    def next_rung(self, trial: FrozenTrial) -> int | None:
        """Return the step at which a trial pauses next; None if it runs to its end."""
        if spared(trial):
            return None
        return next((rung for rung in self.rungs if rung > trial.user_attrs.get(PAUSED, 0)), None)

    def place(self, trial: FrozenTrial, *, kept: bool) -> Place:
        """Return the rank of a paused trial among all that have reached its rung."""
        rung = trial.user_attrs[PAUSED]
        others = [one for one in self._climbing if rung in one.intermediate_values and one.number != trial.number]
        own, *theirs = goodness_at([trial, *others], rung, self._sign)
        return Place(1 + sum(goodness > own for goodness in theirs), 1 + len(theirs), kept)

    def _promoted(self) -> list[FrozenTrial]:
        """The trials to continue now."""
        found: list[FrozenTrial] = []
        for rung, above in pairwise((*self.rungs, math.inf)):
            reached = [trial for trial in self._climbing if _reached(trial) >= rung]
            beyond = sum(_reached(trial) >= above or trial.state == TrialState.RUNNING for trial in reached)
            waiting = [trial for trial in reached if is_paused(trial) and trial.user_attrs[PAUSED] < above]
            room = math.ceil(len(reached) / self._factor) - beyond
            found += self._ranked(waiting, rung)[: max(0, room)]
        return found

    def _ranked(self, trials: Sequence[FrozenTrial], rung: float) -> list[FrozenTrial]:
        """The best at a rung first; of equals the lower index."""
        order = goodness_at(trials, int(rung), self._sign)
        ranked = sorted(zip(order, trials, strict=True), key=lambda pair: (-pair[0], trial_index_of(pair[1])))
        return [trial for _, trial in ranked]


def _reached(trial: FrozenTrial) -> float:
    """The last rung or step that counts as reached; a running trial is on its way from its last rung to the next."""
    if trial.state == TrialState.COMPLETE:
        return math.inf
    if trial.state == TrialState.PRUNED:
        return trial.last_step or 0
    return float(trial.user_attrs.get(PAUSED, 0))
