"""`hpo study top`: the state of a running study as lines and tables."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.live import View, look
from hpo.analysis.study_data import fold_steps
from hpo.cli.console import Screen, TableOf, console, live_screen, say_screen
from hpo.report.words import progress_text, resuming
from hpo.space.pruner import places_of, spared
from hpo.storage.lease import LEASE
from hpo.study import Study, find_study
from hpo.text import assignments, counted, duration, short_names
from hpo.trials import FAILURE, is_baseline, trial_index_of

_LATEST = 5  # finished trials in the table
_BAR = 12  # characters


def top_command(name: str | None, *, storage: str | None, every_s: float, once: bool) -> View:
    """Show a study until nothing runs or waits, or until Ctrl-C; only once without a terminal. Return the last view."""
    study = find_study(name, storage_url=storage)
    view = look(study)
    if once or console.stderr or not console.is_terminal:  # on stderr with --json, which has one answer
        say_screen(screen(view))
        return view
    with contextlib.suppress(KeyboardInterrupt), live_screen() as show:
        while True:
            show(screen(view))
            if view.over:
                break
            time.sleep(every_s)
            view = look(study)
    return view


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
    if view.elapsed_s is not None:
        lines.append(", ".join([f"{duration(view.elapsed_s)} since it began", *_speed(view)]))
    return lines


def _states(view: View) -> str:
    failures = sum(FAILURE in trial.user_attrs for trial in view.finished)
    complete = sum(trial.state == TrialState.COMPLETE for trial in view.finished)
    states = {
        "complete": complete,
        "pruned": len(view.finished) - complete - failures,
        "failed to train": failures,
        "running": len(view.running),
        "left by a dead process": len(view.abandoned),
        "paused": len(view.paused),
        "waiting": view.waiting,
    }
    return counted(states) or "none yet"


def _speed(view: View) -> list[str]:
    if view.over:
        return []
    if view.rate is None:
        return ["time left unknown yet"] if view.running else []
    images = "" if view.rate.images_per_s is None else f", {view.rate.images_per_s:,.0f} images/s"
    left = [] if view.left_s is None else [f"about {duration(view.left_s)} left"]
    return [f"{view.rate.trials_per_h:,.0f} trials/h{images}", *left]


def _running_row(view: View, trial: FrozenTrial, names: Mapping[str, str]) -> list[Any]:
    step = trial.last_step or 0
    return [
        _numbers(trial),
        _worker(trial),
        _device(view, trial),
        _bar(step, steps_of(view.study)),
        f"{trial.intermediate_values[step]:.4f}" if trial.intermediate_values else "",
        rung_of(trial),
        _parameters(trial, names),
    ]


def _finished_row(trial: FrozenTrial, steps: int, names: Mapping[str, str]) -> list[Any]:
    elapsed_s = trial.user_attrs.get("elapsed_s")
    state = str(trial.user_attrs.get(FAILURE, trial.state.name.lower()))
    if state == "pruned" and trial.last_step is not None:
        state = f"pruned at {trial.last_step}/{steps}"
    return [
        _numbers(trial),
        state,
        f"{trial.value:.4f}" if trial.state == TrialState.COMPLETE else "",
        "" if elapsed_s is None else duration(elapsed_s),
        _parameters(trial, names),
    ]


def _foot(view: View) -> list[str]:
    study = view.study
    if view.running:
        return []
    if view.over:
        line = "nothing runs or waits any more" if view.trials else "no trial is queued yet"
        missing = 0 if study.total is None else study.total - len(view.finished)
    else:
        line, missing = "no worker trains anything", view.waiting + len(view.paused) + len(view.abandoned)
    if missing <= 0 and view.trials:
        return [line]
    return [f"{line}; resume with", f"  {resuming(study)}"]


def _numbers(trial: FrozenTrial) -> str:
    """Its number, and its trial index if an earlier attempt had another number."""
    trial_index = trial_index_of(trial)
    return f"{trial.number}" if trial_index == trial.number else f"{trial.number} (index {trial_index})"


def steps_of(study: Study) -> int:
    """Return the epochs of a trial, all its folds together."""
    return math.prod(fold_steps(study))


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
    places = places_of(trial)
    return spared(trial) or (f"rung {max(places)}: {places[max(places)]}" if places else "")


def _parameters(trial: FrozenTrial, names: Mapping[str, str]) -> str:
    return assignments({names[path]: value for path, value in trial.params.items()})
