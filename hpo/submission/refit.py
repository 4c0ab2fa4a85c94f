"""A refit: train, decide, train again, open the test set, write the bundle.

Networks trained without the validation images take all decisions. The final training uses training and validation
images for as many epochs; the number of steps grows with the images. An ensemble of folds is not trained again. Only
then is the test set opened, and the opening is recorded: no decision depends on a test label.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from optuna.trial import TrialState

from core import metrics
from core.config import TrainConfig
from core.data import Dataset, Splits, folds, on_device
from core.data.decode import SIXTEEN_BIT_TOP
from core.text import count
from core.tta import passes
from hpo.confirmation.result import Confirmation
from hpo.confirmation.trials import search_epochs
from hpo.dashboard.pictures import learning_curves
from hpo.paths import StudyPaths, TrainingPaths
from hpo.search.held_out import OWN, half_lives
from hpo.search.training import Watch
from hpo.study import Study
from hpo.study.code import code_of, own_code
from hpo.study.results import append_line
from hpo.study.versions import versions
from hpo.submission import bundle
from hpo.submission.card import write_card
from hpo.submission.decision import ENSEMBLE, FREE, GREEDY_SOUP, ONE, UNIFORM_SOUP, Decision, Forced, decide
from hpo.submission.evidence import CONFIRMATION, OUT_OF_FOLD, VALIDATION, Evidence
from hpo.submission.ladder import Ladder
from hpo.submission.members import decide_members
from hpo.submission.networks import Network, Trainer, averaged, averaging_by, kept_epoch
from hpo.submission.onnx_export import check_onnx, export_onnx
from hpo.submission.peers import Library
from hpo.submission.selection import decide_selection
from hpo.submission.tested import Tested, full_scores
from hpo.trials import effective_trials, is_paused

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 64  # test images for the check of an ONNX file


@dataclass(frozen=True)
class Refitted:
    """The result of a refit."""

    dir: Path
    """The bundle."""
    number: int | None
    """Trial number; None if no trial has the configuration."""
    networks: int
    decision: Decision
    source: str
    """The images that the choices rest on: `validation`, `out-of-fold` or `confirmation`."""
    val: metrics.Scores
    """Scores of the decision's predictions."""
    test: metrics.Scores
    test_plain: metrics.Scores
    """Test scores with one view, without the temperature."""
    intervals: dict[str, tuple[float, float]]
    """95 % interval of each score of `test`."""
    test_per_class: list[dict[str, str | float | int]]
    openings: int
    """How often the test set has been opened, including this time: by the study or, without one, by recipes."""
    onnx_difference: float | None
    """Largest difference of a probability between the ONNX file and torch; None without such a file."""


@dataclass(frozen=True)
class Training:
    """What is trained on all images, and what its choices rest on."""

    epochs: int | None = None
    """None for the kept epoch of the training before, of several the mean."""
    length: int | None = None
    """Epochs of the schedule on all images, of which the same part is trained; None for the configuration's."""
    ensemble: int | None = None
    """Number of networks trained on different folds; None for no ensemble of folds."""
    members: int | None = None
    """Number of networks trained on all images with different seeds, validated on `data.val_fraction` even if the trial
    had folds; None for one network."""
    forced: Forced = FREE
    """Choices that are already made."""
    evidence: Evidence | None = None
    """Held-out predictions of this configuration, for one network; None trains it on a part of the images."""
    library: Library | None = None
    """Other configurations, with predictions of the same images; None tries no ensemble with them."""
    left_s: Callable[[int], float] | None = None
    """Seconds that are left for the training on all images, given how often each image passes a network when the model
    predicts; None without a limit."""


def refit(
    paths: StudyPaths,
    *,
    number: int | None,
    label: str,
    config: TrainConfig,
    training: Training,
    dataset: Dataset,
    metric: str,
    device: torch.device,
    recipe: str | None = None,
    onnx: bool = False,
    kept: TrainingPaths | None = None,
    confirmation: Confirmation | None = None,
    ladder: Ladder | None = None,
    search: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Refitted:
    """Train a configuration again and write the bundle.

    `recipe`, `confirmation`, `ladder` and `search` (see `search_summary`) are only written into `metrics.json`.

    Args:
        number: Trial with the configuration, perhaps of another length; None if there is none.
        label: Name of the bundle's folder.
        metric: The study's objective, which all choices are made by.
        kept: Folder with weights of the configuration, which are used if possible.
        watch: Called at the beginning of each training.

    Raises:
        StudyError: The trial's weights are damaged.
        BundleError: The model cannot be exported as ONNX.
        UserError: A class has fewer images than the ensemble has members.
    """
    if onnx:
        check_onnx()
    averages = _half_lives(config, training.forced)
    trainer = Trainer(paths, number, label, config, metric, device, watch, kept, averages=averages)
    trained = _trained(trainer, dataset, training)
    openings = _record_opening(paths, label, number, recipe)
    tested = Tested.by(trained.networks, trained.decision, dataset.open_test())
    report = {"trial": number, "recipe": recipe, "objective": metric, **_report(trained, tested, dataset)}
    report["search"] = None if search is None else dict(search)
    report["confirmation"] = None if confirmation is None else confirmation.to_json()
    report["length"] = None if ladder is None else ladder.to_json()
    report["test"]["opened"] = openings
    difference = _write(trainer, trained, tested, dataset, report, onnx=onnx)
    return _refitted(trainer, trained, tested, openings, difference)


def _half_lives(config: TrainConfig, forced: Forced) -> tuple[float, ...]:
    """The EMAs beside a training with held-out images."""
    if forced.average == OWN:
        return ()
    _, _, half_life = (forced.average or "").partition("_")
    return (float(half_life),) if half_life else half_lives(config)


def _refitted(
    trainer: Trainer, trained: _Trained, tested: Tested, openings: int, onnx_difference: float | None
) -> Refitted:
    decision = trained.decision
    return Refitted(
        dir=trainer.paths.refit(trainer.label),
        number=trainer.number,
        networks=len(trained.networks),
        decision=decision,
        source=trained.source,
        val=metrics.scores(decision.answers, decision.labels),
        test=metrics.scores(tested.answers, tested.labels),
        test_plain=metrics.scores(tested.plain, tested.labels),
        intervals=tested.intervals,
        test_per_class=metrics.per_class(tested.confusion, trained.networks[0].splits.classes),
        openings=openings,
        onnx_difference=onnx_difference,
    )


@dataclass(frozen=True)
class _Trained:
    """The model before the test set is opened."""

    decision: Decision
    networks: list[Network]
    members: int | None
    """Number of networks trained on all images, before any averaging of weights; None for one."""
    rows: tuple[dict[str, Any], ...]
    """Epochs of their trainings."""
    epochs: int | list[int]
    """Number of epochs; with folds, the kept epoch of each network."""
    in_folds: bool
    source: str
    """See `Evidence.source`."""
    elapsed_s: float


def _trained(trainer: Trainer, dataset: Dataset, training: Training) -> _Trained:
    config, epochs, evidence = trainer.config, training.epochs, training.evidence
    ensemble, members, forced, library = training.ensemble, training.members, training.forced, training.library
    if ensemble is not None or members is not None:
        config, evidence = config.override({"data.folds": ensemble}), None
    splits = on_device(folds(dataset, config.data), trainer.device)
    networks: list[Network] = []
    if evidence is None:
        networks = trainer.folds(config, splits) if members is None else trainer.members(config, splits[0], members)
        evidence = Evidence.of_networks(networks, [forced.views] if forced.views else [])
    images = count(evidence.distinct_images, "image")
    logger.info("choosing on %s held out by %s", images, count(evidence.networks, "training"))
    elapsed_s = sum(network.elapsed_s for network in networks)
    kept = [kept_epoch(config, rows, trainer.metric) for rows in evidence.rows]
    chosen: Sequence[int] = ()
    if members is not None:
        found = decide_members(networks, evidence, trainer.metric, forced)
        decision, chosen = found.decision, found.chosen
    else:
        form = ONE if ensemble is None else ENSEMBLE
        decision = decide(evidence, trainer.metric, forced, form=form, averaged_later=ensemble is not None)
        if library is not None:
            decision = decide_selection(decision, evidence, library, trainer.metric, forced.form)
    final = averaging_by(config, decision.average)
    if training.left_s is not None:
        trainer = replace(trainer, left_s=partial(training.left_s, _passes(decision, len(chosen))))
    if ensemble is None:
        epochs = int(fmean(kept) + 0.5) if epochs is None else epochs
        networks.clear()  # free the device's memory for the training
        if library is not None and decision.selection:
            decision = _with_winner(decision, trainer.number, epochs)
            networks = _selected(trainer, decision, final, splits[0].whole(), evidence, library)
        else:
            whole, rows = splits[0].whole(), evidence.rows[0]
            networks = trainer.on_all_images(final, whole, rows, epochs, chosen, length=training.length)
            epochs = len(networks[0].rows)
        elapsed_s += sum(network.elapsed_s for network in networks)
    else:
        networks = [replace(network.with_average(decision.average), config=final) for network in networks]
    all_rows = tuple(row for network in networks for row in network.rows)
    if decision.form in (UNIFORM_SOUP, GREEDY_SOUP):
        networks = [averaged(networks)]
    return _Trained(
        decision=decision,
        networks=networks,
        members=members,
        rows=all_rows,
        epochs=_epochs(decision, epochs) if ensemble is None and epochs is not None else kept,
        in_folds=ensemble is not None,
        source=evidence.source,
        elapsed_s=elapsed_s,
    )


def _passes(decision: Decision, members: int) -> int:
    """How often an image passes a network when the model predicts, at most: a soup is one network."""
    return sum(passes(each.views) for each in decision.selection) or max(1, members) * passes(decision.views)


def _epochs(decision: Decision, epochs: int) -> int | list[int]:
    """Those of one configuration, or of each network of a selection."""
    return [each.epochs or epochs for each in decision.selection] or epochs


def _with_winner(decision: Decision, number: int | None, epochs: int) -> Decision:
    """The decision with name, trial and epochs of the first network of its selection."""
    winner, *others = decision.selection
    name = winner.name if number is None else f"trial {number}"
    return replace(decision, selection=(replace(winner, name=name, trial=number, epochs=epochs), *others))


def _selected(
    trainer: Trainer, decision: Decision, winner: TrainConfig, whole: Splits, evidence: Evidence, library: Library
) -> list[Network]:
    """Train the networks of a selection on all images, each with its average."""
    of_name = {peer.name: peer for peer in library.peers}
    first, *others = decision.selection
    assert first.epochs is not None
    trainings = [(winner, evidence.rows[0], first.epochs)]
    for each in others:
        peer = of_name[each.name]
        trainings.append((averaging_by(peer.config, each.average), peer.evidence.rows[0], peer.epochs))
    return trainer.selected(trainings, whole)


def _record_opening(paths: StudyPaths, label: str, number: int | None, recipe: str | None) -> int:
    file = paths.test_openings
    file.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(file, {"opened": now, "label": label, "trial": number, "recipe": recipe})
    return sum(1 for line in file.read_text().splitlines() if json.loads(line))


def _report(trained: _Trained, tested: Tested, dataset: Dataset) -> dict[str, Any]:
    decision, classes = trained.decision, dataset.classes
    on_all = "the training images of each member's fold" if trained.in_folds else "training and validation images"
    return {
        "networks": len(trained.networks),
        "members": trained.members,
        "epochs": trained.epochs,
        "elapsed_s": round(trained.elapsed_s, 3),
        "data": {
            "train": len(dataset.labels),
            "own_test": dataset.has_own_test,
            "own_val": dataset.gives_val(trained.networks[0].config.data),
            "broken": len(dataset.report.broken),
            "content": dataset.report.plain(),
        },
        "decision": decision.metadata(),
        "temperature": decision.temperature.metadata(),
        "val": {
            "trained_on": _TRAINED_ON[trained.source],
            "images": decision.images,
            "networks": decision.networks,
            "without_tta": full_scores(decision.plain, decision.labels, classes),
            "with_tta": full_scores(decision.answers, decision.labels, classes),
        },
        "test": {"trained_on": on_all, **tested.report(classes)},
    }


_TRAINED_ON = {
    VALIDATION: "training images only",
    OUT_OF_FOLD: "the training images of each fold only",
    CONFIRMATION: "the training images of each replicate of the confirmation only",
}


def _write(
    trainer: Trainer, trained: _Trained, tested: Tested, dataset: Dataset, report: dict[str, Any], *, onnx: bool
) -> float | None:
    target, difference = trainer.paths.refit(trainer.label), None
    model = _model(trained, dataset, study=trainer.paths.study, number=trainer.number)
    with bundle.writing(target) as folder:
        model.write(folder, [network.model for network in trained.networks], report)
        tested.write(folder, dataset)
        learning_curves(trained.rows, folder / "learning_curves.png", title="refit", metric=trainer.metric)
        if onnx:
            loaded = bundle.load_bundle(folder, torch.device("cpu"))
            difference = export_onnx(loaded, folder / bundle.ONNX, tested.set.images[:CHECKED_IMAGES])
        write_card(folder, model, report)
    for checkpoint in trainer.paths.refit_checkpoints(trainer.label):
        checkpoint.unlink()
    return difference


def _model(trained: _Trained, dataset: Dataset, *, study: str | None, number: int | None) -> bundle.Bundle:
    return bundle.Bundle(
        config=trained.networks[0].config,
        parts=tuple(
            bundle.Part(network.config, each.weight, each.views)
            for network, each in zip(trained.networks, trained.decision.selection, strict=False)  # or empty
        ),
        classes=dataset.classes,
        in_channels=dataset.images.shape[1],
        image_size=(dataset.images.shape[2], dataset.images.shape[3]),
        normalizations=tuple(bundle.Normalization(each.splits.mean, each.splits.std) for each in trained.networks),
        views=trained.decision.views,
        temperature=trained.decision.temperature.value,
        data_name=dataset.name,
        fingerprint=dataset.fingerprint,
        versions=versions(),
        code=code_of(_code_to_load(trained)),
        study=study,
        trial=number,
        source=dataset.source,
        top=dataset.report.top or SIXTEEN_BIT_TOP,
    )


def _code_to_load(trained: _Trained) -> dict[str, str]:
    """The user's own networks; a loss, an optimizer and a transform are needed in training only."""
    named = {name: field for network in trained.networks for name, field in own_code(network.config).items()}
    return {name: field for name, field in named.items() if field == "model.name"}


def search_summary(study: Study) -> dict[str, Any]:
    """Summarize a search and its cost for the record of a refit."""
    counts, best = study.counts(), study.best_trial()
    over = [
        trial
        for trial in effective_trials(study.optuna.get_trials(deepcopy=False)).values()
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or is_paused(trial)
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
