"""A refit from its first training to the written model, and the only place that opens the test set.

What validation decides is decided by networks that are trained without the validation images. Then the same is trained
again on training and validation images together: as many epochs, so the number of steps grows with the data, as the
schedule's fractions expect. An ensemble of folds is not trained again: each of its networks was trained without another
part of the images, to be validated on, for early stopping and a plateau. Only then is the test set opened, and the
opening written down: nothing that is kept depends on a test label.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optuna.trial import TrialState
from torch import Tensor

from core import metrics
from core.calibration import scaled
from core.config import TrainConfig
from core.data import Dataset, TestSet, folds, on_device
from core.runtime import make_generator
from hpo.confirmation.result import Confirmation
from hpo.confirmation.trials import search_epochs
from hpo.dashboard.pictures import confident_errors, confusion_matrix, learning_curves
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.search.training import Watch
from hpo.study import Study
from hpo.study.results import append_line
from hpo.study.versions import versions
from hpo.submission import bundle
from hpo.submission.card import write_card
from hpo.submission.decision import AVERAGED, Decision, decide_alone, decide_folds, decide_members
from hpo.submission.networks import Network, Trainer, averaged, together
from hpo.submission.onnx_export import check_onnx, export_onnx
from hpo.submission.predictions import write_submission
from hpo.text import count
from hpo.trials import effective_trials

logger = logging.getLogger(__name__)

# Of the test images that are wrong, those that the model was surest of: four rows of six.
SHOWN_ERRORS = 24
# Test images that an ONNX file is checked on.
CHECKED_IMAGES = 64


@dataclass(frozen=True)
class Refitted:
    """What a refit wrote and found."""

    dir: Path
    number: int | None
    """The trial's; None of a configuration that is none."""
    networks: int
    """More than one are an ensemble."""
    decision: Decision
    val: metrics.Scores
    """As the model answers. With folds, out-of-fold: each image by the network that had not seen it."""
    test: metrics.Scores
    """As the model answers: with its views and its temperature."""
    test_plain: metrics.Scores
    """In one view, undivided by the temperature."""
    intervals: dict[str, tuple[float, float]]
    """Of `test`: score -> where it lies in 95 % of drawings of as many test images."""
    test_per_class: list[dict[str, str | float | int]]
    """Of `test`."""
    openings: int
    """How often this study's test set has been opened, this time included."""
    onnx_difference: float | None
    """How far a probability of the ONNX file lies from torch's at most; None where there is no file."""

    @property
    def views(self) -> str:
        """The name of the views that were chosen."""
        return self.decision.views

    @property
    def candidates(self) -> dict[str, float]:
        """Each TTA candidate's validation score by the study's metric."""
        return self.decision.candidates

    @property
    def temperature(self) -> float:
        """What the logits are divided by."""
        return self.decision.temperature.value


def refit(
    paths: StudyPaths,
    *,
    number: int | None,
    label: str,
    config: TrainConfig,
    epochs: int,
    dataset: Dataset,
    metric: str,
    device: torch.device,
    recipe: str | None = None,
    ensemble: int | None = None,
    members: int | None = None,
    onnx: bool = False,
    confirmation: Confirmation | None = None,
    search: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Refitted:
    """Trains the configuration anew, and writes the bundle.

    Args:
        number: the trial's; its weights are taken where it kept them, and trained again where not. None: no trial has
            this configuration.
        label: the bundle's folder.
        epochs: those that the trial kept, for the training on all images: fewer than the configuration's where it
            stopped early; of folds, the mean.
        metric: the study's objective, by which views and form are chosen.
        recipe: the name of the recipe that the configuration is, for the record.
        ensemble: how many networks, each trained without another part of the images; None: not in folds. As many as the
            trial had folds are the trial's own.
        members: how many networks, each trained on all images from another seed, validated on `data.val_fraction` even
            where the trial had folds; None is one network.
        onnx: whether the model is written as ONNX too.
        confirmation: what the configuration was chosen by, for the record.
        search: what the search was and cost, for the record; see `search_summary`.
        watch: told of each training.

    Raises:
        StudyError: the trial's weights are damaged, or both `ensemble` and `members` are given.
        BundleError: the model cannot be written as ONNX.
        UserError: a class has fewer images than the ensemble members.
    """
    if ensemble is not None and members is not None:
        raise StudyError("--folds and --members: networks by fold or by seed; give one of them")
    if onnx:
        check_onnx()
    trainer = Trainer(paths, number, label, config, metric, device, watch)
    trained = _trained(trainer, dataset, epochs=epochs, ensemble=ensemble, members=members)

    # Everything that is kept is decided: from here on the test set may be seen.
    openings = _write_down_opening(paths, label, number)
    tested = _Tested.by(trained, dataset.open_test())

    report = {
        "trial": number,
        "recipe": recipe,
        "objective": metric,
        **_record(trained, tested, dataset),
        "search": None if search is None else dict(search),
        "confirmation": None if confirmation is None else confirmation.to_json(),
    }
    report["test"]["opened"] = openings
    with bundle.writing(paths.refit(label)) as folder:
        model = _model(trained, dataset, study=paths.name, number=number)
        model.write(folder, [network.model for network in trained.networks], report)
        tested.write(folder, dataset)
        learning_curves(trained.rows, folder / "learning_curves.png", title="refit", metric=metric)
        difference = None
        if onnx:
            whole = bundle.load_bundle(folder, torch.device("cpu"))
            difference = export_onnx(whole, folder / bundle.ONNX, tested.set.images[:CHECKED_IMAGES])
        write_card(folder, model, report)
    for checkpoint in paths.refit_checkpoints(label):
        checkpoint.unlink()
    return Refitted(
        dir=paths.refit(label),
        number=number,
        networks=len(trained.networks),
        decision=trained.decision,
        val=metrics.scores(trained.decision.answers, trained.decision.labels),
        test=metrics.scores(tested.answers, tested.labels),
        test_plain=metrics.scores(tested.plain, tested.labels),
        intervals=tested.intervals,
        test_per_class=metrics.per_class(tested.confusion, dataset.classes),
        openings=openings,
        onnx_difference=difference,
    )


def search_summary(study: Study) -> dict[str, Any]:
    """What a search was, and what it cost: each slot counted once."""
    counts, best = study.counts(), study.best_trial()
    over = [
        trial
        for trial in effective_trials(study.optuna.get_trials(deepcopy=False)).values()
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    devices = Counter(str(trial.user_attrs["device"]) for trial in over if "device" in trial.user_attrs)
    return {
        "study": study.name,
        "space": study.space_name,
        "trials": counts.finished,
        "complete": counts.complete,
        "pruned": counts.pruned,
        "failures": counts.failures,
        "epochs": search_epochs(study),
        "elapsed_s": round(sum(float(trial.user_attrs.get("elapsed_s", 0.0)) for trial in over), 3),
        "device": ", ".join(device for device, _ in devices.most_common()) or None,
        "best_value": None if best is None else best.value,
    }


# What is trained ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """All of a refit but what the test set says of it."""

    decision: Decision
    networks: list[Network]
    """The model's own."""
    members: int | None
    """How many networks were trained on all images, whatever became of them; None: one."""
    rows: tuple[dict[str, Any], ...]
    """Of the trainings that the model was made of."""
    epochs: int | list[int]
    """Of each of them; in folds, those whose weights are kept."""
    in_folds: bool
    """Whether the networks are those of an ensemble of folds."""
    folds: int
    """How many parts the validation images were judged in, each by another network."""
    elapsed_s: float

    @property
    def config(self) -> TrainConfig:
        return self.networks[0].config


def _trained(trainer: Trainer, dataset: Dataset, *, epochs: int, ensemble: int | None, members: int | None) -> _Trained:
    """Trains what decides, decides, and trains what is kept."""
    config = trainer.config
    if ensemble is not None or members is not None:
        config = config.override({"data.folds": ensemble})
    splits = on_device(folds(dataset, config.data), trainer.device)
    judged = trainer.folds(config, splits) if members is None else trainer.members(config, splits[0], members)
    images = count(sum(len(each.val) for each in splits), "validation image")
    logger.info("choosing views and temperature on %s", images)
    choose = decide_folds if ensemble is not None else decide_alone if members is None else decide_members
    decision = choose(judged, trainer.metric)
    rows, elapsed_s = judged[0].rows, sum(network.elapsed_s for network in judged)
    networks = judged
    if ensemble is None:
        del judged, networks  # which the training would otherwise have to fit beside
        networks = trainer.on_all_images(config, splits[0].whole(), rows, epochs, members)
        elapsed_s += sum(network.elapsed_s for network in networks)
    all_rows = tuple(row for network in networks for row in network.rows)
    if decision.form == AVERAGED:
        networks = [averaged(networks)]
    return _Trained(
        decision=decision,
        networks=networks,
        members=members,
        rows=all_rows,
        epochs=epochs if ensemble is None else [network.kept_epoch(trainer.metric) for network in networks],
        in_folds=ensemble is not None,
        folds=len(splits),
        elapsed_s=elapsed_s,
    )


def _model(trained: _Trained, dataset: Dataset, *, study: str, number: int | None) -> bundle.Bundle:
    return bundle.Bundle(
        config=trained.config,
        classes=dataset.classes,
        in_channels=dataset.images.shape[1],
        image_size=(dataset.images.shape[2], dataset.images.shape[3]),
        normalizations=tuple(bundle.Normalization(each.splits.mean, each.splits.std) for each in trained.networks),
        views=trained.decision.views,
        temperature=trained.decision.temperature.value,
        data_name=dataset.name,
        fingerprint=dataset.fingerprint,
        versions=versions(),
        study=study,
        trial=number,
        source=dataset.source,
    )


# What the test set says of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tested:
    """The model's answers to the test images."""

    set: TestSet
    labels: Tensor
    """(N,) int64, as all here on the CPU."""
    plain: Tensor
    """(N, K): in one view, undivided by the temperature."""
    answers: Tensor
    """(N, K): as the model gives them."""
    seed: int
    """Draws the images that the intervals are of."""

    @classmethod
    def by(cls, trained: _Trained, test: TestSet) -> _Tested:
        """Asks the networks."""
        decision = trained.decision
        logits = {
            views: together(network.logits(test.images, views) for network in trained.networks).cpu()
            for views in dict.fromkeys(("none", decision.views))
        }
        answers = scaled(logits[decision.views], decision.temperature.value)
        return cls(test, test.labels.cpu(), logits["none"], answers, trained.config.seed)

    @cached_property
    def confusion(self) -> Tensor:
        """(K, K) int64, rows true."""
        return metrics.confusion(self.answers, self.labels)

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each score of the answers."""
        generator = make_generator(torch.device("cpu"), self.seed, "bootstrap")
        return metrics.bootstrap_intervals(self.answers, self.labels, generator=generator)

    @cached_property
    def wrong(self) -> Tensor:
        """Positions of the images that are wrong, the surest first: (n,) int64, n at most `SHOWN_ERRORS`."""
        sure, choice = self.answers.softmax(1).max(1)
        wrong = (choice != self.labels).nonzero().squeeze(1)
        return wrong[sure[wrong].argsort(descending=True, stable=True)][:SHOWN_ERRORS]

    def errors(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Those images: `id`, `true`, `predicted` and the `confidence` in that."""
        sure, choice = self.answers.softmax(1).max(1)
        return [
            {
                "id": self.set.ids[position],
                "true": classes[int(self.labels[position])],
                "predicted": classes[int(choice[position])],
                "confidence": float(sure[position]),
            }
            for position in self.wrong.tolist()
        ]

    def metadata(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """As `metrics.json` has it."""
        return {
            "images": len(self.labels),
            "without_tta": _full_scores(self.plain, self.labels, classes),
            "with_tta": _full_scores(self.answers, self.labels, classes) | {"intervals": self.intervals},
            "confusion": self.confusion.tolist(),
            "errors": self.errors(classes),
        }

    def write(self, folder: Path, dataset: Dataset) -> None:
        """Writes the answers, and draws what is mistaken for what."""
        classes, name = dataset.classes, dataset.name
        confusion_matrix(self.confusion, classes, folder / "confusion.png", title=f"{name}, test images")
        confident_errors(
            self.set.images[self.wrong.to(self.set.images.device)].cpu(),
            self.errors(classes),
            classes,
            folder / "confident_errors.png",
            title=f"{name}, test images",
        )
        write_submission(folder / "submission.csv", self.set.ids, self.answers.argmax(1), classes)


# The record ---------------------------------------------------------------------------------------------------------


def _record(trained: _Trained, tested: _Tested, dataset: Dataset) -> dict[str, Any]:
    """What `metrics.json` has of the model itself: how it was made, what was decided, and what it scores."""
    decision, classes = trained.decision, dataset.classes
    on_fewer = "the training images of each fold only" if trained.folds > 1 else "training images only"
    on_all = "the training images of each member's fold" if trained.in_folds else "training and validation images"
    return {
        "networks": len(trained.networks),
        "members": trained.members,
        "epochs": trained.epochs,
        "elapsed_s": round(trained.elapsed_s, 3),
        "data": {
            "train": len(dataset.labels),
            "own_test": dataset.has_own_test,
            "broken": len(dataset.report.broken),
        },
        "tta": {"chosen": decision.views, "val_candidates": decision.candidates},
        "averaging": decision.averaging_record(),
        "temperature": decision.temperature.metadata(),
        "val": {
            "trained_on": on_fewer,
            "images": len(decision.labels),
            "without_tta": _full_scores(decision.plain, decision.labels, classes),
            "with_tta": _full_scores(decision.answers, decision.labels, classes),
        },
        "test": {"trained_on": on_all, **tested.metadata(classes)},
    }


def _full_scores(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores over all images, and a row a class."""
    return {
        **asdict(metrics.scores(logits, labels)),
        "per_class": metrics.per_class(metrics.confusion(logits, labels), classes),
    }


def _write_down_opening(paths: StudyPaths, label: str, number: int | None) -> int:
    """Adds a line to the record of the test set's openings; returns how many there are."""
    metadata = paths.test_openings
    metadata.parent.mkdir(parents=True, exist_ok=True)
    append_line(metadata, {"opened": datetime.now(UTC).isoformat(timespec="seconds"), "label": label, "trial": number})
    return sum(1 for line in metadata.read_text().splitlines() if json.loads(line))
