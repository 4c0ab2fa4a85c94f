"""The state of a running study, read from its storage alone.

The time left follows from the rate of the last finished trials, in time in which any trial ran: parallel workers count
together, and pauses do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.costs import covered_s, own
from hpo.storage.lease import dead_of
from hpo.study import Study
from hpo.trials import effective_trials, is_paused

_RECENT = 20  # finished trials of the rate: fewer are noisy, more are outdated
_FEWEST = 3  # finished trials that a rate needs


class Rate(NamedTuple):
    """Recent speed of a study."""

    trials_per_h: float
    images_per_s: float | None
    """Training images of all workers together; None if no trial recorded it."""


@dataclass(frozen=True)
class View:
    """A study at one moment."""

    study: Study
    trials: tuple[FrozenTrial, ...]
    """The effective trial of each trial index."""
    running: tuple[FrozenTrial, ...]
    """Those of living processes, as far as this machine can tell."""
    abandoned: tuple[FrozenTrial, ...]
    """Those of dead processes: of this machine, or without heartbeats."""
    paused: tuple[FrozenTrial, ...]
    """Those that wait at a rung to be promoted."""
    waiting: int
    """Number of trials that have not begun."""
    finished: tuple[FrozenTrial, ...]
    """Latest first."""
    rate: Rate | None
    """None before three trials have finished."""
    now: datetime
    """Local time without a zone, as in Optuna."""

    @property
    def over(self) -> bool:
        return not (self.running or self.paused or self.waiting or self.abandoned)

    @property
    def left_s(self) -> float | None:
        """Seconds to the total at the present rate; None if no trial runs, or the rate is unknown."""
        if self.rate is None or not self.running:
            return None
        missing = len(self.running) + len(self.abandoned) + len(self.paused) + self.waiting
        return 3600 * missing / self.rate.trials_per_h

    @property
    def elapsed_s(self) -> float | None:
        """Seconds since the first trial began, up to the last end if none runs; None before."""
        starts = [trial.datetime_start for trial in own(self.trials) if trial.datetime_start]
        if not starts:
            return None
        ends = [trial.datetime_complete for trial in self.finished if trial.datetime_complete]
        until = self.now if self.running else max(ends, default=self.now)
        return max(0.0, (until - min(starts)).total_seconds())  # another machine's clock may be ahead


def look(study: Study, now: datetime | None = None) -> View:
    """Read the state, at the present time by default."""
    now = datetime.now() if now is None else now
    attempts = study.optuna.get_trials(deepcopy=False)
    trials = tuple(trial for _, trial in sorted(effective_trials(attempts).items()))
    claimed = [trial for trial in trials if trial.state == TrialState.RUNNING]
    finished = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    finished.sort(key=lambda trial: (trial.datetime_complete or datetime.min, trial.number), reverse=True)
    dead = dead_of(study.optuna, claimed)
    abandoned = tuple(trial for trial in claimed if trial.number in dead)
    running = tuple(trial for trial in claimed if trial.number not in dead)
    paused = tuple(filter(is_paused, trials))
    waiting, rate = study.queue.waiting() - len(paused), rate_of(attempts, now)
    return View(study, trials, running, abandoned, paused, waiting, tuple(finished), rate, now)


def rate_of(attempts: Sequence[FrozenTrial], now: datetime) -> Rate | None:
    """The rate, interrupted trials included; None before three finished."""
    begun = [(trial, start, trial.datetime_complete) for trial in own(attempts) if (start := trial.datetime_start)]
    ended = [(end, start, trial) for trial, start, end in begun if end and trial.state != TrialState.FAIL]
    if len(ended) < _FEWEST:
        return None
    ended.sort(key=lambda item: item[0], reverse=True)
    recent = ended[:_RECENT]
    begin = ended[_RECENT][0] if len(ended) > _RECENT else min(start for _, start, _ in recent)
    at_work = ((start, end or (now if trial.state == TrialState.RUNNING else start)) for trial, start, end in begun)
    busy_s = covered_s(at_work, begin, now)
    if busy_s <= 0:
        return None
    attributes = [trial.user_attrs for _, _, trial in recent if "images_per_s" in trial.user_attrs]
    images = sum(each["images_per_s"] * each["elapsed_s"] for each in attributes)
    return Rate(3600 * len(recent) / busy_s, images / busy_s if attributes else None)
