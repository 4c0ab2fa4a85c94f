"""`hpo confirm`: train the best configurations, the recipes and the baseline again, and compare them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from core.data import Dataset, Division
from core.errors import UserError
from core.text import count
from core.weights import weights_in
from hpo.api.common import open_dataset, report_data, report_estimate, resumable, train_all, weights_of
from hpo.api.options import ConfirmOptions
from hpo.confirmation.conclusion import conclude
from hpo.confirmation.plan import Plan
from hpo.confirmation.result import Confirmation, is_current, read_confirmation, write_confirmation
from hpo.confirmation.trials import open_confirmation
from hpo.dashboard.notes import note_study
from hpo.errors import StudyError, TimeLimitError
from hpo.paths import StudyPaths, confirmation_of
from hpo.report.words import joining
from hpo.reporter import Reporter, Silent, StudyView
from hpo.search.interrupts import Interrupts
from hpo.search.options import TrialOptions
from hpo.storage import is_masked
from hpo.study import Study, find_study
from hpo.text import duration, held_by
from hpo.workers.placement import place
from hpo.workers.work import Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConfirmResult:
    """The outcome of `confirm`."""

    study: Study
    """The search."""
    confirmation: Confirmation


def confirm(
    options: ConfirmOptions,
    reporter: Reporter | None = None,
    interrupts: Interrupts | None = None,
    *,
    part_of: str | None = None,
) -> ConfirmResult:
    """Train the finalists of a search and its baseline on new seeds and splits, as far as budget and time allow.

    Args:
        part_of: The command that the confirmation is a part of, as its resuming command; it has described the data.

    Raises:
        StudyError: There is no such study, it is a confirmation itself, or it has no complete trial.
        CoreError: The data or a device cannot be used, or the budget is 0.
        KeyboardInterrupt: Stopped; finished trainings and checkpoints are kept.
    """
    if options.budget == 0:
        raise UserError("--budget 0: give a share above 0, such as 0.33")
    study = find_study(options.study, storage_url=options.storage)
    run = _Confirm(study, options, reporter or Silent(), interrupts or Interrupts(), part_of=part_of)
    return ConfirmResult(study, run.run())


def confirmed(
    study: Study, options: ConfirmOptions, reporter: Reporter | None = None, interrupts: Interrupts | None = None
) -> Confirmation:
    """Return the confirmation of a search, with any budget or time; train it where it is missing or not current.

    Raises:
        As `confirm`.
    """
    known = read_confirmation(study.paths.confirmation)
    current = known is not None and is_current(known, study.counts().finished)
    if known is not None and current and (known.out_of_time or not _is_unfinished(study)):
        return known
    return _Confirm(study, options, reporter or Silent(), interrupts or Interrupts()).run()


def check_is_search(study: Study) -> None:
    """Raise StudyError if the study is a confirmation."""
    if study.confirms is not None:
        raise StudyError(f"study {study.name} is itself the confirmation of {study.confirms}; give that one")


def _is_unfinished(search: Study) -> bool:
    """Whether trainings of its confirmation are waiting or running."""
    name = confirmation_of(search.name)
    if not StudyPaths.of(name).study_yaml.exists():
        return False
    counts = find_study(name, storage_url=search.storage_url).counts()
    return counts.waiting + counts.running > 0


class _Confirm:
    """One confirmation, from the choice of the candidates to the result."""

    def __init__(
        self,
        search: Study,
        options: ConfirmOptions,
        reporter: Reporter,
        interrupts: Interrupts,
        *,
        part_of: str | None = None,
    ) -> None:
        check_is_search(search)
        self._search, self._reporter, self._interrupts = search, reporter, interrupts
        self._placement = place(options.device, options.devices, options.workers, options.per_device)
        self._data = options.data or search.data_path
        self._weights = weights_of(search, options.weights)
        self._space = search.space()
        self._is_on_given_val = False
        share = self._space.confirm.budget if options.budget is None else options.budget
        self._limit_s, self._out_of_time, self._alone = options.limit_s, False, part_of is None
        self._plan = Plan(search, self._space, share=share, within_s=self._limit_s)
        # A storage is found by the study's name, but for its password.
        storage = search.storage_shown if is_masked(search.storage_shown) else None
        own = options.model_copy(update={"study": search.name, "storage": storage}).command()
        self._command = part_of or own

    def run(self) -> Confirmation:
        known = read_confirmation(self._search.paths.confirmation)
        if known is not None and self._is_asked_for(known):
            return known
        total, finished = self._search.total, self._plan.search_trials
        if total is not None and finished < total:
            self._reporter.say(f"the search has only {finished} of {total} trials; confirming its result so far")
        with weights_in(self._weights):
            study = self._trained() if self._plan.challengers else None
        confirmation = conclude(self._plan, study, out_of_time=self._out_of_time)
        if self._out_of_time and confirmation.advantage is None:
            raise TimeLimitError(
                f"study {self._search.name}: the time limit ended the confirmation before it could compare anything; "
                "continue with a larger --minutes or without"
            )
        write_confirmation(self._search.paths.confirmation, confirmation)
        self._search.settings.verdict = confirmation.verdict
        note_study(self._search, self._space)
        return confirmation

    def _is_asked_for(self, known: Confirmation) -> bool:
        plan = self._plan
        same = is_current(known, plan.search_trials) and known.budget_epochs == plan.budget_epochs
        return same and not _is_unfinished(self._search)

    def _trained(self) -> Study:
        work, dataset = self._open()
        study = work.study
        if self._alone and (waiting := study.queue.waiting()):
            ending = "; candidates that cannot win stop early"
            report_estimate(work, self._reporter, trials=waiting, noun="training", ending=ending)
            self._reporter.say(f"other workers can join with: {joining(study)}")
        with resumable(study, "training", self._command, self._reporter), self._reporter.study(study) as view:
            try:
                self._train(work, view, dataset)
            finally:
                study.deadline.record(force=True)
        for number, host, since in study.queue.held_elsewhere():
            self._reporter.say(f"{held_by(f'training {number}', host, since)}, and is left out")
        return study

    def _open(self) -> tuple[Work, Dataset]:
        search, space = self._search, self._space
        for candidate in self._plan.chosen:
            search.check_sources(candidate.train_config)
        dataset = open_dataset(space.baseline.data, self._data, skip_broken=search.skip_broken, reporter=self._reporter)
        search.check_data(dataset)
        search.files.use_store(None)
        division = Division(dataset)
        splits = division.here(space.baseline.data)
        study = open_confirmation(search, space, dataset, splits, data_path=self._data)
        self._is_on_given_val = dataset.gives_val(space.baseline.data)
        study.settings.command = self._command
        study.deadline.begin(self._limit_s)
        study.settings.weights = None if self._weights is None else str(self._weights)
        if study.queue.reclaim():
            logger.info("resuming trainings of a process that died")
        study.queue.drop_finished_checkpoints()
        self._plan.queue(study, dataset)
        if self._alone:
            report_data(dataset, splits[:1], self._reporter)
        self._report_plan(study)
        work = Work(
            study,
            study.space(),
            division,
            self._placement,
            data=self._data,
            skip_broken=search.skip_broken,
            interrupts=self._interrupts,
            say=self._reporter.say,
            options=TrialOptions(weights=self._weights),
        )
        return work, dataset

    def _train(self, work: Work, view: StudyView, dataset: Dataset) -> None:
        """Run the queue, including trainings added when early stopping saved others, up to the time limit."""
        while True:
            if not train_all(work, view):
                self._out_of_time = True
                return
            more = self._plan.queue(work.study, dataset)
            if not more and not work.study.queue.waiting() and not work.study.queue.at_work():
                return
            if more:
                logger.info("early stopping saved %d trainings, used for candidates that can still win", more)

    def _report_plan(self, study: Study) -> None:
        plan, say = self._plan, self._reporter.say
        self._reporter.table(
            ["to be confirmed", "searched", "because it is"],
            [
                [one.key, "" if one.search_value is None else f"{one.search_value:.4f}", ", ".join(one.chosen_for)]
                for one in plan.chosen
            ],
            right=(1,),
        )
        for name in plan.left_out:
            say(f"left out: {name}")
        configurations, replicates = plan.allocation.candidates, plan.allocation.replicates
        what = "seeds" if self._is_on_given_val else "seeds and splits"
        epochs = count(plan.allocation.trainings * plan.cost_epochs, "epoch")
        seconds = "" if plan.seconds is None else f", {duration(plan.seconds)} at the speed of the search"
        say(
            f"each is trained on {replicates} other {what}, n = {replicates}: "
            f"{configurations} × {replicates} trainings, at most {epochs}{seconds}"
        )
        searched = "" if plan.search_s is None else f" in {duration(plan.search_s)}"
        say(f"the budget is {plan.budget_epochs:,} epochs, the search trained {plan.search_epochs:,}{searched}")
        if self._is_on_given_val:
            say("the data give the validation images, so the intervals do not include the choice of these images")
        if plan.is_over_budget:
            say("that exceeds the budget, but fewer trainings could not show a difference")
        done = f"{study.counts().finished} of {study.total} trainings done"
        say(f"study {study.name}: {done}; {self._placement.described()}")
