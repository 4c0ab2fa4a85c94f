"""Chooses the configuration to refit, and refits it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from torch import Tensor

from core.config import TrainConfig
from core.data import Dataset
from core.runtime import describe_device, select_device
from hpo.api.common import explained_memory_errors, open_dataset, watching
from hpo.api.confirm import confirmed
from hpo.api.options import RefitOptions
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.confirmation.words import NO_GAIN
from hpo.errors import StudyError
from hpo.paths import refit_label
from hpo.reporter import Reporter
from hpo.search.interrupts import Interrupts
from hpo.study import Study
from hpo.submission import Refitted, refit, search_summary
from hpo.submission.onnx_export import check_onnx


@dataclass(frozen=True)
class _Choice:
    """The configuration to refit."""

    name: str
    """For example `trial 12`, or `recipe NAME`."""
    label: str
    """Start of the name of the bundle's folder."""
    number: int | None
    """Of the trial; None if no trial has this configuration."""
    recipe: str | None
    config: TrainConfig
    epochs: int
    confirmation: Confirmation | None = None
    """The confirmation that chose it."""


@dataclass(frozen=True)
class RefitResult:
    """The outcome of `refit`."""

    study: Study
    refitted: Refitted
    confirmation: Confirmation | None
    """The confirmation that the configuration was chosen by."""
    validation: str
    """The images that the decisions were made on: `validation` or `out-of-fold`."""
    labels: Tensor = field(repr=False)
    """(N,) int64: labels of the images outside the test set."""
    test_images: int


class Refit:
    """One refit of a study that was found."""

    def __init__(self, study: Study, options: RefitOptions, reporter: Reporter, interrupts: Interrupts) -> None:
        self.study, self.options, self.reporter, self.interrupts = study, options, reporter, interrupts
        self.device = select_device(options.device)

    def run(self) -> RefitResult:
        """Choose, load the images, and retrain."""
        study, options = self.study, self.options
        if options.onnx:
            check_onnx()
        choice = self._choose()
        study.files.use_store(None)
        if choice.number is not None:
            study.files.fetch_trial(choice.number, folds=choice.config.data.folds or 1)
        dataset = open_dataset(choice.config.data, options.data or study.data_path, skip_broken=study.skip_broken)
        study.check_data(dataset)
        study.check_weights(choice.config)
        self.reporter.say(
            f"refitting {choice.name} of study {study.name}{self._networks(choice)}; {describe_device(self.device)}"
        )
        try:
            refitted = self._retrain(choice, dataset)
        except KeyboardInterrupt:
            self.reporter.say("stopped; the same command resumes from the last checkpoint")
            raise
        in_folds = options.folds is not None or (options.members is None and choice.config.data.folds is not None)
        validation = "out-of-fold" if in_folds else "validation"
        return RefitResult(study, refitted, choice.confirmation, validation, dataset.labels, dataset.n_test)

    def _retrain(self, choice: _Choice, dataset: Dataset) -> Refitted:
        study, options = self.study, self.options
        alone = options.folds is None and options.members is None
        epochs = choice.epochs if alone else choice.config.epochs
        bars = watching(self.reporter, "refit", epochs=epochs, metric=study.metric, interrupts=self.interrupts)
        with explained_memory_errors(), self.interrupts.patient(), bars as watch:
            return refit(
                study.paths,
                number=choice.number,
                label=refit_label(choice.label, options.folds, options.members),
                config=choice.config,
                epochs=choice.epochs,
                dataset=dataset,
                metric=study.metric,
                device=self.device,
                recipe=choice.recipe,
                ensemble=options.folds,
                members=options.members,
                onnx=options.onnx,
                confirmation=choice.confirmation,
                search=search_summary(study),
                watch=watch,
            )

    def _choose(self) -> _Choice:
        """Choose a trial by its number, the best by its validation score, or the confirmed winner.

        Raises:
            StudyError: The study is a confirmation, or has no such complete trial.
        """
        study, trial, say = self.study, self.options.trial, self.reporter.say
        if trial != "best":
            return self._trial(int(trial), f"trial {int(trial)}", f"{int(trial):05d}")
        if study.confirms is not None:
            raise StudyError(
                f"study {study.name} is the confirmation of {study.confirms}; give --study {study.confirms}"
            )
        best = study.best_trial()
        if best is None:
            raise StudyError(f"study {study.name} has no complete trial yet; resume it with hpo run")
        if self.options.confirm:
            return self._winner()
        score = f"{study.metric} {best.value:.4f}"
        say(f"not confirmed: trial {best.number} is the best by its one validation score, {score}")
        if study.paths.confirmation.exists():
            say(f"  {study.paths.confirmation} is ignored (--no-confirm)")
        return self._trial(best.number, f"trial {best.number}", "best")

    def _winner(self) -> _Choice:
        """Choose the confirmed winner; train the confirmation first where it is missing or not current."""
        study, say = self.study, self.reporter.say
        known = read_confirmation(study.paths.confirmation)
        current = known is not None and is_current(known, study.counts().finished)
        if not current:
            say(f"confirming the best trial of study {study.name} against the baseline first (skip with --no-confirm)")
        confirmation = confirmed(
            study,
            data=self.options.data,
            device=self.options.device,
            reporter=self.reporter,
            interrupts=self.interrupts,
        )
        winner = confirmation.contender(confirmation.winner)
        if not current:
            for line in ("", *confirmation.lines(), ""):
                say(line)
        if confirmation.verdict.startswith(NO_GAIN):
            say(f"{NO_GAIN}: the baseline is refitted")
            if current:
                say(f"  {confirmation.verdict.removeprefix(NO_GAIN).removeprefix(': ')}")
        elif current:
            say(f"confirmed: {winner.name}, {confirmation.metric} {confirmation.verdict}")
        if winner.trial is not None:
            return self._trial(winner.trial, winner.name, "best", winner.recipe, confirmation)
        config = TrainConfig.model_validate_json(json.dumps(winner.config))
        return _Choice(winner.name, "best", None, winner.recipe, config, winner.epochs, confirmation)

    def _trial(
        self,
        number: int,
        name: str,
        label: str,
        recipe: str | None = None,
        confirmation: Confirmation | None = None,
    ) -> _Choice:
        trained = self.study.trained(number)
        return _Choice(name, label, number, recipe, trained.config, trained.epochs, confirmation)

    def _networks(self, choice: _Choice) -> str:
        """Describe an ensemble; nothing for one network."""
        folds, members = self.options.folds, self.options.members
        if folds is not None:
            return f" as {folds} networks, each without another part of the images"
        if members is None:
            return ""
        validation = ", validated on data.val_fraction instead of folds" if choice.config.data.folds is not None else ""
        return f" as {members} networks from {members} seeds{validation}"
