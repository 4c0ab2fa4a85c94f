"""The progress of a study in the terminal, read from its storage: bars, and a line for each finished trial.

It reads the same view as `hpo study top`, and shows trials of all processes and machines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState
from rich.progress import TaskID

from hpo.analysis.live import View, look
from hpo.analysis.study_data import fold_steps
from hpo.cli.console import bars, console, epoch_note, is_verbose, say
from hpo.cli.monitor import rung_of, steps_of
from hpo.search.training import trial_label
from hpo.space import CANDIDATE
from hpo.space.pruner import spared
from hpo.study import Study
from hpo.text import assignments, short_names
from hpo.trials import FAILURE, PAUSED, REASON, REPLICATE_OF, STOPPED, is_baseline, is_paused

if TYPE_CHECKING:
    from core.loop import EpochMetrics

_EVERY_S = 0.25  # seconds between two readings of the storage that nothing forces


class StudyProgress:
    """A bar for the study, one for each running trial, and a line for each trial that finishes or pauses."""

    def __init__(self, study: Study) -> None:
        self.study = study
        view = look(study)
        self._printed = {_end_of(trial) for trial in (*view.finished, *view.paused)}
        self._read_at = time.monotonic()
        self._running: dict[int, TaskID] = {}
        self.progress = bars()
        self._total = self.progress.add_task("study", total=None, note="")
        self._update_total(view)

    def __enter__(self) -> StudyProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.refresh(force=True)
        self.progress.stop()

    def refresh(self, *, force: bool = False) -> None:
        """Read the storage, unless it has just been read, and show the changes."""
        now = time.monotonic()
        if not force and now - self._read_at < _EVERY_S:
            return
        self._read_at = now
        view = look(self.study)
        for trial in (*reversed(view.finished), *view.paused):
            if _end_of(trial) not in self._printed:
                self._printed.add(_end_of(trial))
                whole = is_verbose() or not console.is_terminal
                say(trial_line(self.study, trial, width=None if whole else console.width))
        self._update_total(view)
        if console.is_terminal:
            self._update_running(view)

    def training(self, label: str, *, epochs: int) -> Callable[[EpochMetrics], None]:
        """Add a bar for a training that is not a trial; the returned function is called after each epoch."""
        task = self.progress.add_task(label, total=epochs, note="")

        def epoch_ended(epoch: EpochMetrics) -> None:
            note = epoch_note(epoch, self.study.metric)
            self.progress.update(task, completed=epoch.epoch, note=note, visible=epoch.epoch < epochs)

        return epoch_ended

    def _update_total(self, view: View) -> None:
        best = None if self.study.confirms is not None else self.study.best_trial()  # of repeated runs: the luckiest
        parts = [] if best is None else [f"best {self.study.metric} {best.value:.4f}"]
        note = "  ".join(parts + ([f"{len(view.paused)} paused"] if view.paused else []))
        self.progress.update(self._total, total=self.study.total, completed=len(view.finished), note=note)

    def _update_running(self, view: View) -> None:
        running = {trial.number: trial for trial in view.running}
        for number in self._running.keys() - running.keys():
            self.progress.remove_task(self._running.pop(number))
        epochs, folds = fold_steps(self.study)
        for number, trial in running.items():
            if number not in self._running:
                self._running[number] = self.progress.add_task("", total=steps_of(self.study), note="")
            self.progress.update(
                self._running[number],
                description=trial_label(trial, epochs=epochs, folds=folds),
                completed=trial.last_step or 0,
                note=self._note(trial),
            )

    def _note(self, trial: FrozenTrial) -> str:
        """The last epoch, as far as its files are on this machine, and its place at the last rung."""
        row = _last_row(self.study, trial)
        parts = [
            f"loss {row['train_loss']:.3f}" if "train_loss" in row else "",
            f"{self.study.metric} {trial.intermediate_values[trial.last_step]:.4f}" if trial.last_step else "",
            f"{row['images_per_s']:,.0f} images/s" if "images_per_s" in row else "",
            rung_of(trial),
        ]
        return "  ".join(filter(None, parts))


def _last_row(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """The last whole line of a trial's `metrics.jsonl`; empty if there is none here."""
    try:
        lines = study.paths.trial_metrics(trial.number).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole = [line for line in lines if line.endswith("\n")]
    row: dict[str, Any] = json.loads(whole[-1]) if whole else {}
    return row


def _end_of(trial: FrozenTrial) -> tuple[int, int | None, str | None]:
    """Identifies the line of a trial; one that is pruned where it paused has the same."""
    return trial.number, trial.last_step, trial.user_attrs.get(FAILURE)


def trial_line(study: Study, trial: FrozenTrial, *, width: int | None = None) -> str:
    """Describe a finished or paused trial in one line, with the parameters in which it differs from the baseline.

    Args:
        width: Of the terminal; longer parameters are cut. None for lines of any length.
    """
    attributes, failure, paused = trial.user_attrs, trial.user_attrs.get(FAILURE), is_paused(trial)
    score = trial.intermediate_values[attributes[PAUSED]] if paused else trial.value
    value = "      " if failure or score is None else f"{score:.4f}"
    how = failure or ("complete" if trial.state == TrialState.COMPLETE else _where_stopped(study, trial))
    took = f"{attributes['elapsed_s']:6.1f} s" if "elapsed_s" in attributes else "        "
    shown = _shown(study, trial)
    reason = attributes.get(REASON) or attributes.get(STOPPED)
    detail = f"  ({reason})" if reason else ""
    if REPLICATE_OF in attributes:
        detail += f"  (replicate of trial index {attributes[REPLICATE_OF]})"
    head = f"trial {trial.number:3d}  {study.metric} {value}  {how:<18} {took}  "
    room = len(shown) if width is None else max(1, width - len(head) - len(detail))
    return head + (shown if len(shown) <= room else f"{shown[: room - 1]}…") + detail


def _shown(study: Study, trial: FrozenTrial) -> str:
    """What distinguishes a trial: its candidate, its recipe, or the parameters that differ from the baseline's."""
    if name := spared(trial):
        return name
    if CANDIDATE in trial.user_attrs:
        return assignments({**trial.params, CANDIDATE: trial.user_attrs[CANDIDATE]})
    baseline = next(filter(is_baseline, study.optuna.get_trials(deepcopy=False)), None)
    same = {} if baseline is None else baseline.params
    names = short_names(trial.params)
    differing = {names[path]: value for path, value in trial.params.items() if path not in same or same[path] != value}
    return assignments(differing) or "as the baseline"


def _where_stopped(study: Study, trial: FrozenTrial) -> str:
    if not trial.last_step:
        return "stopped before it began"
    epochs, folds = fold_steps(study)
    fold, epoch = divmod(trial.last_step - 1, epochs)
    how = "paused" if is_paused(trial) else "pruned"
    return f"{how} at {f'fold {fold + 1}, ' if folds > 1 else ''}epoch {epoch + 1}"
