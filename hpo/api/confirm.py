"""`hpo confirm`: the best configurations, the recipes and the base are trained again, and compared."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

from core.data import Dataset, Division
from core.errors import UserError
from hpo.api.common import joining, open_dataset, say_data, say_patience
from hpo.cli.console import say, table
from hpo.cli.progress import StudyProgress
from hpo.confirmation.conclusion import conclude
from hpo.confirmation.result import Confirmation, is_current, read_confirmation, write_confirmation
from hpo.confirmation.trials import Plan, open_confirmation
from hpo.dashboard.notes import note_study
from hpo.errors import StudyError
from hpo.paths import StudyPaths, confirmation_of
from hpo.report.words import unproven
from hpo.search.interrupts import Interrupts
from hpo.search.loop import estimate_s, wait_for_others
from hpo.storage import is_masked
from hpo.study import CONFIRMATION, Study, find_study
from hpo.text import duration
from hpo.workers.placement import Placement, place
from hpo.workers.work import Work

logger = logging.getLogger(__name__)


def confirm_command(
    study_name: str | None,
    *,
    storage: str | None,
    data: Path | None,
    budget: float | None,
    device_name: str | None,
    devices: str | None,
    workers: int | None,
    per_device: str | None,
) -> None:
    """Trains what the budget allows, and says who won."""
    if budget is not None and budget <= 0:
        raise UserError(f"--budget {budget:g}: give a share above 0, such as 0.33")
    placement = place(device_name, devices, workers, per_device)
    study = find_study(study_name, storage_url=storage)
    _check_is_search(study)
    options = {
        "--data": data,
        "--budget": None if budget is None else f"{budget:g}",
        "--device": device_name,
        "--devices": devices,
        "--workers": workers,
        "--per-device": per_device,
    }
    with Interrupts(told=say_patience) as interrupts:
        confirmation = _Confirm(study, placement, data=data, budget=budget, interrupts=interrupts, options=options).go()
    say()
    for line in confirmation.lines():
        say(line)
    say()
    say("next:")
    usual = [f"{what} {_named(study)}" for what in ("hpo refit best --study", "hpo report")]
    for command in (*usual, *unproven(study, confirmation)):
        say(f"  {command}")


def confirmed(
    study: Study,
    *,
    data: Path | None,
    device_name: str | None,
    interrupts: Interrupts,
    dataset: Dataset | None = None,
) -> Confirmation:
    """The confirmation of a search as it stands, trained as far as it is missing, on one device.

    Args:
        data: what `--data` is; None is what it was for the search.
        dataset: the search's images, where they are at hand.

    Raises:
        StudyError: the search has no complete trial, or is itself a confirmation; or nothing could be trained.
        KeyboardInterrupt: a person's Ctrl-C, or SIGTERM; what was trained is safe.
    """
    _check_is_search(study)
    known = read_confirmation(study.paths.confirmation)
    if known is not None and is_current(known, study.counts().finished) and not _is_unfinished(study):
        return known
    placement = place(device_name, None, None, None)
    return _Confirm(study, placement, data=data, budget=None, interrupts=interrupts, dataset=dataset).go()


def _check_is_search(study: Study) -> None:
    if study.confirms is not None:
        raise StudyError(f"study {study.name} is itself the confirmation of {study.confirms}; give that one")


def _is_unfinished(search: Study) -> bool:
    """Whether trainings of its confirmation wait or run: the result that is there was made without them."""
    name = confirmation_of(search.name)
    if not StudyPaths.of(name).study_yaml.exists():
        return False
    counts = find_study(name, storage_url=search.storage_url).counts()
    return counts.waiting + counts.running > 0


def _named(study: Study, options: Mapping[str, object] | None = None) -> str:
    """The study and the options that were given, for a command line.

    Its storage is there where that has a password, which is to be given again.
    """
    storage = study.storage_shown if is_masked(study.storage_shown) else None
    words = [study.name]
    for option, value in {"--storage": storage, **(options or {})}.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


class _Confirm:
    """One confirmation, from the choice of the candidates to the result."""

    def __init__(
        self,
        search: Study,
        placement: Placement,
        *,
        data: Path | None,
        budget: float | None,
        interrupts: Interrupts,
        dataset: Dataset | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._search, self._placement, self._interrupts = search, placement, interrupts
        self._data, self._dataset = data or search.data_path, dataset
        self._space = search.space()
        share = self._space.confirm.budget if budget is None else budget
        self._plan = Plan(search, self._space, share=share)
        self._command = f"hpo confirm {_named(search, options)}"

    def go(self) -> Confirmation:
        """Trains what is missing, and writes down what it came to."""
        known = read_confirmation(self._search.paths.confirmation)
        if known is not None and self._is_what_is_asked(known):
            return known
        self._say_search()
        study = self._trained() if self._plan.challengers else None
        confirmation = conclude(self._plan, study)
        write_confirmation(self._search.paths.confirmation, confirmation)
        self._search.optuna.set_user_attr(CONFIRMATION, confirmation.verdict)
        note_study(self._search, self._space)
        return confirmation

    def _is_what_is_asked(self, known: Confirmation) -> bool:
        plan = self._plan
        same = is_current(known, plan.search_trials) and known.budget_epochs == plan.budget_epochs
        return same and not _is_unfinished(self._search)

    def _say_search(self) -> None:
        """That the search is not over, where it is not."""
        total, finished = self._search.total, self._plan.search_trials
        if total is not None and finished < total:
            say(f"the search has {finished} of {total} trials; its result is confirmed as it stands")

    def _trained(self) -> Study:
        """The confirmation's study, with all that the budget allows trained."""
        search, space = self._search, self._space
        for candidate in self._plan.chosen:
            search.check_weights(candidate.config)
        dataset = self._dataset
        if dataset is None:
            dataset = open_dataset(space.baseline.data, self._data, skip_broken=search.skip_broken)
        search.check_data(dataset)
        search.use_depot(None)
        division = Division(dataset)
        splits = division.here(space.baseline.data)
        study = open_confirmation(search, space, dataset, splits, data_path=self._data)
        study.remember_command(self._command)
        if study.queue.reap():
            logger.info("what a process that died was training goes on")
        self._plan.queue(study, dataset)
        say_data(dataset, splits[0])
        self._say_plan(study)
        work = Work(
            study,
            study.space(),
            division,
            self._placement,
            data=self._data,
            skip_broken=search.skip_broken,
            interrupts=self._interrupts,
            say=say,
        )
        if waiting := study.queue.waiting():
            self._say_estimate(work, waiting)
        try:
            with StudyProgress(study) as progress:
                self._work_off(study, work, progress, dataset)
        except KeyboardInterrupt:
            say(f"stopped: {study.counts().finished} of {study.total} trainings are done and safe; go on with")
            say(f"  {self._command}")
            raise
        for number, host, since in study.queue.held_elsewhere():
            say(f"training {number} is held by a process on {host} since {since:%Y-%m-%d %H:%M}, and is left out")
        return study

    def _work_off(self, study: Study, work: Work, progress: StudyProgress, dataset: Dataset) -> None:
        """Trains what waits, and what is queued then: early stopping leaves something over for those still in."""
        while True:
            while study.queue.waiting() or wait_for_others(study, self._interrupts) or study.queue.requeue_lost():
                work.run(progress)
            more = self._plan.queue(study, dataset)
            if not more and not study.queue.waiting() and not study.queue.at_work():
                return
            if more:
                logger.info("early stopping has saved %d trainings, which go to those that may still win", more)

    def _say_plan(self, study: Study) -> None:
        plan = self._plan
        table(
            ["to be confirmed", "searched", "because it is"],
            [
                [one.key, "" if one.search_value is None else f"{one.search_value:.4f}", ", ".join(one.chosen_for)]
                for one in plan.chosen
            ],
            right=(1,),
        )
        for what in plan.left_out:
            say(f"left out: {what}")
        configurations, replicates = plan.allocation.candidates, plan.allocation.replicates
        epochs = plan.allocation.trainings * plan.cost_epochs
        say(
            f"each is trained on {replicates} other seeds and splits, n = {replicates}: "
            f"{configurations} × {replicates} trainings, {epochs:,} epochs at most; "
            f"the budget is {plan.budget_epochs:,}, the search trained {plan.search_epochs:,}"
        )
        if plan.is_over_budget:
            say("that is more than the budget, and the least that says anything")
        done = f"{study.counts().finished} of {study.total} trainings done"
        say(f"study {study.name}: {done}; {self._placement.described()}")

    def _say_estimate(self, work: Work, waiting: int) -> None:
        """How long it takes, from a few timed steps of the base."""
        with self._interrupts.let_through():
            seconds, _ = estimate_s(work.space, work.images(), trials=waiting, recipes=0, device=work.device)
        otherwise = "" if work.inline else ", one training at a time"
        say(f"this will take up to {duration(seconds)}{otherwise}; what cannot win any more is stopped early")
        say(f"Ctrl-C stops it, and the same command goes on; others can join by: {joining(work.study)}")
