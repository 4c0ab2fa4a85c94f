"""The state of a running study, read from its storage alone, whether it is trained here or on other machines.

The time left follows from the rate of the last finished trials, in time in which any trial ran: so parallel workers
count together, pauses do not count, and a resumed study is measured on its present machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.cli.console import Screen, TableOf
from hpo.report.words import progress_text, run_again
from hpo.space.pruner import places_of, spared
from hpo.storage.lease import LEASE, is_abandoned
from hpo.study import Study
from hpo.text import assignments, duration, short_names
from hpo.trials import FAILURE, TAKEN_FROM, effective_trials, is_baseline, trial_index_of

_RECENT = 20  # finished trials of the rate: fewer are noisy, more are outdated
_FEWEST = 3  # finished trials that a rate needs
_LATEST = 5  # finished trials in the table
_BAR = 12  # characters


@dataclass(frozen=True)
class Rate:
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
    """Those of dead processes of this machine."""
    waiting: int
    """Number of waiting trials."""
    finished: tuple[FrozenTrial, ...]
    """Latest first."""
    rate: Rate | None
    """None before three trials have finished."""
    now: datetime

    @property
    def over(self) -> bool:
        """Whether no trial runs or waits."""
        return not self.running and not self.waiting and not self.abandoned

    @property
    def left_s(self) -> float | None:
        """Seconds to the total at the present rate; None if no trial runs, or the rate is unknown."""
        if self.rate is None or not self.running:
            return None
        return 3600 * (len(self.running) + len(self.abandoned) + self.waiting) / self.rate.trials_per_h


def look(study: Study, now: datetime | None = None) -> View:
    """Read a study from its storage.

    Args:
        study: to read.
        now: local time without a zone, as in Optuna; by default the present.
    """
    now = datetime.now() if now is None else now
    attempts = study.optuna.get_trials(deepcopy=False)
    trials = tuple(trial for _, trial in sorted(effective_trials(attempts).items()))
    claimed = [trial for trial in trials if trial.state == TrialState.RUNNING]
    abandoned = tuple(trial for trial in claimed if is_abandoned(trial))
    finished = sorted(
        (trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)),
        key=lambda trial: (trial.datetime_complete or datetime.min, trial.number),
        reverse=True,
    )
    return View(
        study,
        trials,
        running=tuple(trial for trial in claimed if trial not in abandoned),
        abandoned=abandoned,
        waiting=study.queue.waiting(),
        finished=tuple(finished),
        rate=rate_of(attempts, now),
        now=now,
    )


def rate_of(attempts: Sequence[FrozenTrial], now: datetime) -> Rate | None:
    """Compute the rate of the last finished trials, in time in which any attempt ran; None before three finished.

    Args:
        attempts: all trials of the storage, interrupted ones too.
        now: as in `look`.
    """
    spans = [(trial, trial.datetime_start, trial.datetime_complete) for trial in attempts]
    own = [
        (trial, start, end) for trial, start, end in spans if TAKEN_FROM not in trial.user_attrs and start is not None
    ]
    ended = sorted(
        ((end, start, trial) for trial, start, end in own if end is not None and trial.state != TrialState.FAIL),
        key=lambda item: item[0],
        reverse=True,
    )
    if len(ended) < _FEWEST:
        return None
    recent = ended[:_RECENT]
    begin = ended[_RECENT][0] if len(ended) > _RECENT else min(start for _, start, _ in recent)
    at_work = ((start, end or (now if trial.state == TrialState.RUNNING else start)) for trial, start, end in own)
    busy_s = _covered(at_work, begin, now).total_seconds()
    if busy_s <= 0:
        return None
    images = [
        trial.user_attrs["images_per_s"] * trial.user_attrs["elapsed_s"]
        for _, _, trial in recent
        if "images_per_s" in trial.user_attrs
    ]
    return Rate(3600 * len(recent) / busy_s, sum(images) / busy_s if images else None)


def _covered(spans: Iterable[tuple[datetime, datetime]], begin: datetime, end: datetime) -> timedelta:
    """The part of the time from `begin` to `end` that the spans cover together."""
    total, reached = timedelta(), begin
    for start, stop in sorted(spans):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            total, reached = total + (stop - start), stop
    return total


# On the screen


def screen(view: View) -> Screen:
    """Lay the view out as lines and tables."""
    names = short_names(dict.fromkeys(path for trial in view.trials for path in trial.params))
    parts: list[str | TableOf] = [*_head(view), ""]
    if view.running:
        rows = [_running_row(view, trial, names) for trial in view.running]
        columns = ["trial", "worker", "device", "epoch", view.study.metric, "rung", "parameters"]
        parts += [TableOf(columns, rows, right=(0, 4)), ""]
    if view.finished:
        rows = [_finished_row(trial, steps_of(view.study), names) for trial in view.finished[:_LATEST]]
        parts += [TableOf(["last", "state", view.study.metric, "time", "parameters"], rows, right=(0, 2, 3)), ""]
    parts += _foot(view)
    return parts[:-1] if parts[-1] == "" else parts


def _head(view: View) -> list[str]:
    study = view.study
    lines = [
        f"study {study.name} (space {study.space_name}): {progress_text(study, len(view.finished))}: {_states(view)}"
    ]
    best = study.best_trial()
    if best is not None:
        what = ", the baseline" if is_baseline(best) else ""
        lines.append(f"best {study.metric} {best.value:.4f}: trial {best.number}{what}")
    starts = [
        trial.datetime_start for trial in view.trials if trial.datetime_start and TAKEN_FROM not in trial.user_attrs
    ]
    if starts:
        ends = [trial.datetime_complete for trial in view.finished if trial.datetime_complete]
        until = view.now if view.running else max(ends, default=view.now)
        since_s = max(0.0, (until - min(starts)).total_seconds())  # another machine's clock may be ahead
        lines.append(", ".join([f"{duration(since_s)} since it began", *_speed(view)]))
    return lines


def _states(view: View) -> str:
    failures = sum(FAILURE in trial.user_attrs for trial in view.finished)
    complete = sum(trial.state == TrialState.COMPLETE for trial in view.finished)
    counted = (
        (complete, "complete"),
        (len(view.finished) - complete - failures, "pruned"),
        (failures, "failed to train"),
        (len(view.running), "running"),
        (len(view.abandoned), "left by a dead process"),
        (view.waiting, "waiting"),
    )
    return ", ".join(f"{number} {state}" for number, state in counted if number) or "none yet"


def _speed(view: View) -> list[str]:
    if view.over:
        return []
    if view.rate is None:
        return ["time left unknown yet"] if view.running else []
    images = "" if view.rate.images_per_s is None else f", {view.rate.images_per_s:,.0f} images/s"
    left = [] if view.left_s is None else [f"about {duration(view.left_s)} left"]
    return [f"{view.rate.trials_per_h:,.0f} trials/h{images}", *left]


def _running_row(view: View, trial: FrozenTrial, names: Mapping[str, str]) -> list[Any]:
    reported = trial.intermediate_values
    step = trial.last_step or 0
    value = "" if not reported else f"{reported[step]:.4f}"
    return [
        _numbers(trial),
        _worker(trial),
        _device(view, trial),
        _bar(step, steps_of(view.study)),
        value,
        rung_of(trial),
        _parameters(trial, names),
    ]


def _finished_row(trial: FrozenTrial, steps: int, names: Mapping[str, str]) -> list[Any]:
    elapsed_s = trial.user_attrs.get("elapsed_s")
    state = str(trial.user_attrs.get(FAILURE, trial.state.name.lower()))
    if state == "pruned" and trial.last_step is not None:
        state = f"pruned at {trial.last_step}/{steps}"
    value = trial.value if trial.state == TrialState.COMPLETE else None
    return [
        _numbers(trial),
        state,
        "" if value is None else f"{value:.4f}",
        "" if elapsed_s is None else duration(elapsed_s),
        _parameters(trial, names),
    ]


def _foot(view: View) -> list[str]:
    """Whether it is finished, or how to resume it."""
    study = view.study
    if view.running:
        return []
    if view.over:
        lines = ["nothing runs or waits any more"] if view.trials else ["no trial is queued yet"]
        missing = 0 if study.total is None else study.total - len(view.finished)
    else:
        missing = view.waiting + len(view.abandoned)
        lines = ["no worker trains anything"]
    if missing <= 0 and view.trials:
        return lines
    return [f"{lines[0]}; go on with", f"  {run_again(study)}"]


def _numbers(trial: FrozenTrial) -> str:
    """Its number, and its trial index if an earlier attempt had another number."""
    trial_index = trial_index_of(trial)
    return f"{trial.number}" if trial_index == trial.number else f"{trial.number} (index {trial_index})"


def fold_steps(study: Study) -> tuple[int, int]:
    """Return the epochs of a fold, and the number of folds."""
    base = study.metadata["base"]
    return int(base["epochs"]), int(base["data"].get("folds") or 1)


def steps_of(study: Study) -> int:
    """Return the epochs of a trial, all its folds together."""
    epochs, folds = fold_steps(study)
    return epochs * folds


def _worker(trial: FrozenTrial) -> str:
    """Host and process ID; empty while it is being claimed."""
    lease = trial.user_attrs.get(LEASE)
    return "" if lease is None else f"{lease['host']}:{lease['pid']}"


def _device(view: View, trial: FrozenTrial) -> str:
    """The device of the worker's last finished trial."""
    worker = _worker(trial)
    before = (other for other in view.finished if worker and _worker(other) == worker)
    return next((str(other.user_attrs["device"]) for other in before if "device" in other.user_attrs), "")


def _bar(done: int, of: int) -> str:
    full = math.floor(_BAR * min(1.0, done / of))
    return f"{'█' * full}{'░' * (_BAR - full)} {done}/{of}"


def rung_of(trial: FrozenTrial) -> str:
    """The trial's place among the others at its last rung."""
    if why := spared(trial):
        return why
    places = places_of(trial)
    return f"rung {max(places)}: {places[max(places)]}" if places else ""


def _parameters(trial: FrozenTrial, names: Mapping[str, str]) -> str:
    return assignments({names[path]: value for path, value in trial.params.items()})
