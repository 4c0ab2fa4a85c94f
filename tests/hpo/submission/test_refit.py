"""A refit: what validation decides, the networks that it trains, and what it writes down. Real digits throughout."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

import core.loop.step
from core.averaging import mean_of, recalibrate
from core.calibration import HIGHEST, LOWEST, fit_temperature, scaled
from core.config import TrainConfig
from core.data import Dataset, load_dataset, split
from core.loop import EpochMetrics, TrainResult, train
from core.metrics import scores, value
from core.runtime import make_generator, normalize
from core.schedule import without_validation
from core.seeds import derive_seed
from core.tta import VIEWS, average, predict_logits
from hpo.api.refit import _FORMS, _VIEWS
from hpo.confirmation.result import Confirmation, Contender, identity_of, write_confirmation
from hpo.confirmation.statistics import Interval
from hpo.confirmation.trials import trainings
from hpo.paths import StudyPaths, refit_label
from hpo.study import Study, find_study
from hpo.submission.bundle import load_bundle
from hpo.submission.candidates import Candidate
from hpo.submission.decision import FORMS, Decision, Forced, decide
from hpo.submission.evidence import Evidence, of_confirmation
from hpo.submission.members import greedy_soup
from hpo.submission.networks import Trainer
from hpo.submission.refit import Refitted, Training, refit
from tests.hpo.commands import RunHpo
from tests.hpo.confirmation.simulated import some_confirmation, some_contender

CPU = torch.device("cpu")
SMALL = TrainConfig().override(
    {"model.widths": (16,), "model.blocks": (1,), "epochs": 2, "batch_size": 32, "augment.flip": 0.0,
     "augment.crop_pad_fraction": 0.0, "optim.lr_scale": 40.0}
)  # fmt: skip


def do_refit(folder: Path, dataset: Dataset, config: TrainConfig = SMALL, **options: Any) -> Refitted:
    names = [each.name for each in fields(Training) if each.name in options]
    training = Training(**{"epochs": config.epochs, **{name: options.pop(name) for name in names}})
    arguments: dict[str, Any] = {"number": None, "label": "best", "metric": "accuracy", "training": training}
    return refit(StudyPaths(folder / "own"), config=config, dataset=dataset, device=CPU, **(arguments | options))


def report_of(done: Refitted | Path) -> dict[str, Any]:
    folder = done.dir if isinstance(done, Refitted) else done
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def answers(results: list[TrainResult], images: Tensor, splits: Any, views: str = "none") -> Tensor:
    """(N, K): the log-probabilities of several networks, averaged."""
    prepare = lambda x: normalize(x, splits.mean, splits.std)  # noqa: E731
    return average(torch.stack([predict_logits(r.model, images, prepare=prepare, views=views) for r in results]))


def mean_by_hand(results: list[TrainResult], config: TrainConfig, splits: Any) -> torch.nn.Module:
    """The network of the mean weights, its batch norms shown the training images in the order that SWA shows them."""
    mean = mean_of([result.model for result in results])
    order = torch.randperm(len(splits.train), generator=make_generator(CPU, config.seed, "recalibrate"))
    rows = splits.train[order].split(512)
    recalibrate(mean, (normalize(splits.images[each], splits.mean, splits.std) for each in rows))
    return mean


# What validation decides --------------------------------------------------------------------------------------------


def logits_of(*choices: int, sure: float = 3.0) -> Tensor:
    """(N, 3) whose first choices are these."""
    return torch.eye(3)[list(choices)] * sure


LABELS = torch.tensor([0, 1, 2, 0] * 10)
RIGHT, ONE_WRONG, TWO_WRONG = (
    logits_of(*choices * 10)
    for choices in ((0, 1, 2, 0), (0, 1, 2, 1), (0, 1, 1, 1))  # of four
)


def evidence_of(
    logits: Tensor | dict[str, Tensor] | dict[str, dict[str, Tensor]], labels: Tensor = LABELS, replicates: int = 1
) -> Evidence:
    """Evidence of these logits, by views or by average and views; the plain ones alone if it is a tensor."""
    by_views = logits if isinstance(logits, dict) else {"none": logits}
    nested: Any = by_views if "own" in by_views else {"own": by_views}
    images = torch.arange(len(labels) // replicates).repeat(replicates)
    return Evidence(images, labels, nested, "validation", ((),) * replicates)


def candidates_of(decision: Decision, step: str) -> dict[str, Candidate]:
    return {each.name: each for each in decision.candidates if each.step == step}


def noisy(signal: float, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (M, 10): that of the label is higher by `signal`."""
    return torch.nn.functional.one_hot(labels, 10) * signal + torch.randn(len(labels), 10, generator=generator)


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
@pytest.mark.parametrize("replicates", [1, 5])
def test_of_equal_candidates_another_than_the_simplest_is_taken_in_one_of_twenty_at_most(
    metric: str, replicates: int
) -> None:
    """At each step of the ladder. The trainings of several replicates make the same mistakes on an image."""
    generator, studies, images = torch.Generator().manual_seed(0), 100, 200
    taken = dict.fromkeys(("average", "views"), 0)
    for _ in range(studies):
        labels = torch.randint(10, (images,), generator=generator)

        def answer(labels: Tensor = labels) -> Tensor:
            shared = noisy(3.0, labels, generator)
            return torch.cat([shared + 0.3 * torch.randn(images, 10, generator=generator) for _ in range(replicates)])

        logits = {
            average: {views: answer() for views in ("none", "flip", "flip_shift")}
            for average in ("own", "none", "ema_0.01", "ema_0.03", "ema_0.1")
        }
        found = decide(evidence_of(logits, labels.repeat(replicates), replicates), metric)
        taken["average"] += found.average != "own"
        taken["views"] += found.views != "none"
    # Two standard deviations above 5 %. The best score alone would take others in four of five.
    assert max(taken.values()) <= 0.05 * studies + 2 * (studies * 0.05 * 0.95) ** 0.5, taken


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "nll"])
def test_better_candidates_are_taken_step_by_step(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1000,), generator=generator)
    logits = {
        average: {"none": noisy(plain, labels, generator), "shift": noisy(shifted, labels, generator)}
        for average, (plain, shifted) in {"own": (3.0, 5.0), "ema_0.01": (3.2, 3.2), "ema_0.1": (3.5, 4.0)}.items()
    }
    found = decide(evidence_of(logits, labels), metric)
    assert (found.average, found.views) == ("ema_0.1", "shift")
    assert torch.equal(found.plain, logits["ema_0.1"]["none"])
    assert torch.equal(found.answers, scaled(logits["ema_0.1"]["shift"], found.temperature.value))
    gain = candidates_of(found, "average")["ema_0.1"].gain
    assert gain is not None
    assert gain.value > 3 * gain.error
    assert {name: each.passes for name, each in candidates_of(found, "views").items()} == {"none": 1, "shift": 5}
    assert candidates_of(found, "average")["ema_0.1"].verdict == "taken"
    less = noisy(3.4, labels, generator)
    sums = {"own": logits["own"]["none"], "ema_0.01": less, "ema_0.1": less + logits["ema_0.1"]["none"]}
    both = {name: {"none": each} for name, each in sums.items()}
    second = candidates_of(decide(evidence_of(both, labels), metric), "average")["ema_0.01"]
    assert second.verdict == "beyond chance, but another gains more"
    kept = decide(evidence_of(logits, labels), metric, Forced("own", "none"))
    assert (kept.average, kept.views) == ("own", "none")
    assert candidates_of(kept, "average")["ema_0.1"].gain == gain, "a forced choice shows the evidence all the same"


def test_repeated_predictions_of_an_image_are_no_further_evidence() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(10, (150,), generator=generator)
    plain, shifted = noisy(3.0, labels, generator), noisy(3.3, labels, generator)
    once = decide(evidence_of({"none": plain, "shift": shifted}, labels), "accuracy")
    repeated = {"none": plain.repeat(5, 1), "shift": shifted.repeat(5, 1)}
    again = decide(evidence_of(repeated, labels.repeat(5), 5), "accuracy")
    assert once.views == again.views == "none"
    assert candidates_of(once, "views")["shift"] == candidates_of(again, "views")["shift"]
    assert (again.images, len(again.labels), again.networks) == (150, 750, 5)


def test_candidates_that_compute_nothing_are_never_taken() -> None:
    broken = torch.full((len(LABELS), 3), math.nan)
    found = decide(evidence_of({"own": {"none": TWO_WRONG}, "ema_0.1": {"none": broken}}), "nll")
    assert found.average == "own"
    assert candidates_of(found, "average")["ema_0.1"].verdict == "not finite"


def test_by_the_loss_candidates_are_compared_at_the_temperature_of_each() -> None:
    """Undivided, the plain view loses for being far too sure; at its own temperature it wins, being right oftener."""
    too_sure, unsure = logits_of(*(0, 1, 2, 1) * 10, sure=40), logits_of(*(0, 1, 1, 1) * 10, sure=1)
    assert scores(too_sure, LABELS).loss > scores(unsure, LABELS).loss
    found = decide(evidence_of({"none": too_sure, "shift": unsure}), "nll")
    assert found.views == "none"
    assert candidates_of(found, "views")["none"].score == pytest.approx(found.temperature.after.loss)


@pytest.mark.parametrize(
    ("logits", "averaged_later", "temperature", "why"),
    [
        (ONE_WRONG, False, fit_temperature(ONE_WRONG, LABELS), None),
        (RIGHT, False, 1.0, "the validation images have no mistake"),
        (logits_of(*(1, 2, 0, 1) * 10), False, HIGHEST, "the bound of 20 or beyond"),
        (ONE_WRONG / 1000, False, LOWEST, "the bound of 0.05 or beyond"),
        (ONE_WRONG * 3, True, 1.0, "fits each single network, and their average is already less confident"),
        (ONE_WRONG / 2, True, fit_temperature(ONE_WRONG / 2, LABELS), None),
    ],
    ids=["fits", "all right", "all wrong", "hardly any logits", "folds, too sure", "folds, unsure"],
)  # fmt: skip
def test_the_temperature_is_the_best_fit_unless_that_is_unsafe(
    logits: Tensor, averaged_later: bool, temperature: float, why: str | None
) -> None:
    found = decide(evidence_of(logits), "accuracy", averaged_later=averaged_later).temperature
    assert found.value == temperature
    assert (why is None and found.why is None) or (why is not None and found.why is not None and why in found.why)
    assert found.before == scores(logits, LABELS)
    assert found.after == scores(scaled(logits, found.value), LABELS)
    assert found.after.loss <= found.before.loss


# One network --------------------------------------------------------------------------------------------------------


def test_the_report_of_a_refit_agrees_with_its_bundle(study: Study, digits: Dataset, run_hpo: RunHpo) -> None:
    """Every number of `metrics.json` is computed anew from the loaded bundle, the images and the study."""
    said, best = run_hpo("refit", "best", "--no-confirm"), study.best_trial()
    assert best is not None
    assert f"not confirmed: trial {best.number} is the best by its one validation score" in said
    bundle, report = load_bundle(study.paths.refit("best"), CPU), report_of(study.paths.refit("best"))
    test = digits.open_test()
    logits, told = bundle.logits(test.images), report["test"]
    assert told["with_tta"]["loss"] == pytest.approx(scores(logits, test.labels).loss, rel=1e-5)
    assert told["with_tta"]["accuracy"] == scores(logits, test.labels).accuracy
    assert bundle.meta.temperature == report["temperature"]["value"]
    assert report["temperature"]["val_nll_after"] <= report["temperature"]["val_nll_before"]
    assert report["val"]["with_tta"]["loss"] == report["temperature"]["val_nll_after"]
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "loss"):
        low, high = told["with_tta"]["intervals"][name]
        assert low <= told["with_tta"][name] <= high, name
    assert set(told["with_tta"]["intervals"]) == {"accuracy", "balanced_accuracy", "macro_f1", "loss", "ece"}
    assert "{:.4f}–{:.4f}".format(*told["with_tta"]["intervals"]["accuracy"]) in said

    table = np.array(told["confusion"])
    np.testing.assert_array_equal(table.sum(1), torch.bincount(test.labels))
    assert table.trace() / table.sum() == told["with_tta"]["accuracy"]
    probabilities, labels = logits.softmax(1), [digits.classes[label] for label in test.labels.tolist()]
    rows = {
        row["id"]: row["label"] for row in csv.DictReader((bundle.folder / "submission.csv").read_text().splitlines())
    }
    wrong = [name for name, label in zip(test.ids, labels, strict=True) if rows[name] != label]
    assert len(told["errors"]) == min(24, len(wrong))
    assert {error["id"] for error in told["errors"]} <= set(wrong)
    confidences = [error["confidence"] for error in told["errors"]]
    assert confidences == sorted(confidences, reverse=True)
    surest = max(float(probabilities[test.ids.index(name)].max()) for name in wrong)
    assert confidences[0] == pytest.approx(surest, abs=1e-5)
    for error in told["errors"]:
        assert (rows[error["id"]], labels[test.ids.index(error["id"])]) == (error["predicted"], error["true"])

    counts = study.counts()
    assert report["search"] == {
        "study": "own", "space": "own", "trials": 3, "complete": counts.complete, "pruned": 0, "failures": 0,
        "epochs": 6, "elapsed_s": pytest.approx(report["search"]["elapsed_s"]), "device": "CPU, 1 thread",
        "best_value": best.value,
    } | {"device": report["search"]["device"]}  # fmt: skip
    assert report["search"]["device"].startswith("CPU")
    assert (report["decision"]["form"], report["confirmation"], report["recipe"]) == ("one", None, None)
    assert {path.name for path in bundle.folder.iterdir()} >= {"README.md", "confident_errors.png", "confusion.png"}


def test_the_schedule_of_a_refit_is_the_trials_in_shares_of_its_own_more_steps(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up, falls and the end of mixing: to within one step, the same share of the run without validation images."""
    config = SMALL.override(
        {"epochs": 4, "schedule.name": "pieces", "schedule.pieces": ((0.5, 0.1), (0.75, 0.01)),
         "schedule.warmup_fraction": 0.25, "augment.mixup": 0.2, "augment.mix_off_fraction": 0.6}
    )  # fmt: skip
    runs: list[list[tuple[float, bool]]] = []
    one_step, mixes = core.loop.step.TrainStep.__call__, core.loop.step.mixes

    def step(self: Any, batch: Any, progress: float, factor: float, generator: Any) -> None:
        if progress == 0:
            runs.append([])
        runs[-1].append((factor, mixes(self.config.augment, progress)))
        one_step(self, batch, progress, factor, generator)

    monkeypatch.setattr(core.loop.step.TrainStep, "__call__", step)
    do_refit(tmp_path, digits, config)
    validated, whole = runs
    images = len(split(digits, config.data).train), len(digits.labels)
    assert (len(validated), len(whole)) == tuple(4 * math.ceil(count / 32) for count in images)
    for run in runs:
        shares = {
            "warm-up": sum(factor < 1 for factor, _ in run[: len(run) // 2]) / len(run),
            "at a tenth": sum(factor == 0.1 for factor, _ in run) / len(run),
            "at a hundredth": sum(factor == 0.01 for factor, _ in run) / len(run),
            "mixed": sum(mixed for _, mixed in run) / len(run),
        }
        expected = {"warm-up": 0.25, "at a tenth": 0.25, "at a hundredth": 0.25, "mixed": 0.6}
        assert shares == pytest.approx(expected, abs=1.01 / len(run))


# Members by seed ----------------------------------------------------------------------------------------------------


FORCED = Forced("own", "none", "ensemble")


@pytest.fixture(scope="module")
def two_members(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> tuple[Refitted, list[str]]:
    """A refit of two members, interrupted in the second one and resumed; and the labels of the resumed trainings."""
    folder, trained = tmp_path_factory.mktemp("members"), []

    def cut_off(label: str) -> Callable[[EpochMetrics], None]:
        def epoch_ended(epoch: EpochMetrics) -> None:
            if label == "member 2 of 2":
                raise KeyboardInterrupt

        return epoch_ended

    def count(label: str) -> Callable[[EpochMetrics], None]:
        return lambda epoch: trained.append(label)

    with pytest.raises(KeyboardInterrupt):
        do_refit(folder, digits, label="best.members2", members=2, watch=cut_off, forced=FORCED)
    assert not StudyPaths(folder / "own").test_openings.exists()
    return do_refit(folder, digits, label="best.members2", members=2, watch=count, forced=FORCED), trained


def test_members_are_trained_from_seeds_of_their_own_first_for_validation_and_then_on_all_images(
    two_members: tuple[Refitted, list[str]], digits: Dataset
) -> None:
    done, _ = two_members
    seeds = [SMALL.seed, derive_seed(SMALL.seed, "member", 2)]
    splits = split(digits, SMALL.data)
    judged = [train(SMALL.override({"seed": seed}), splits, device=CPU) for seed in seeds]
    val, labels = splits.images[splits.val], splits.labels[splits.val]
    ensemble = scores(answers(judged, val, splits), labels)
    mean = mean_by_hand(judged, SMALL, splits)
    prepare = lambda x: normalize(x, splits.mean, splits.std)  # noqa: E731
    of_mean = scores(predict_logits(mean, val, prepare=prepare), labels).accuracy
    report, tried = report_of(done), candidates_of(done.decision, "soup") | candidates_of(done.decision, "ensemble")
    assert report["decision"]["form"] == "ensemble"
    assert tried["ensemble"].score == ensemble.accuracy
    assert tried["uniform_soup"].score == of_mean < 0.5 * ensemble.accuracy  # between networks the loss is high
    each = [scores(answers([one], val, splits), labels).accuracy for one in judged]
    assert tried["one"].score == pytest.approx(sum(each) / 2)
    assert report["temperature"]["val_nll_before"] == pytest.approx(ensemble.loss, rel=1e-5)
    assert (report["networks"], report["members"], report["epochs"]) == (2, 2, 2)

    whole = splits.whole()
    for member, seed in enumerate(seeds, 1):
        expected = train(SMALL.override({"seed": seed}), whole, device=CPU).model.state_dict()
        kept = load_file(done.dir / f"member_{member}.safetensors")
        assert all(torch.equal(kept[name], weights) for name, weights in expected.items())


def test_interrupted_members_resume_from_their_checkpoints(two_members: tuple[Refitted, list[str]]) -> None:
    done, trained = two_members
    assert trained == ["member 2 of 2", *["all images, 1 of 2"] * 2, *["all images, 2 of 2"] * 2]
    assert not list(done.dir.parent.glob(".*.pt"))
    assert done.openings == 1


def test_the_loaded_members_reproduce_the_test_loss(two_members: tuple[Refitted, list[str]], digits: Dataset) -> None:
    done, _ = two_members
    test, bundle = digits.open_test(), load_bundle(done.dir, CPU)
    assert len(bundle.models) == 2
    assert scores(bundle.logits(test.images), test.labels).loss == pytest.approx(done.test.loss, rel=1e-5)


def test_members_fine_tuned_from_one_set_of_weights_become_one_network_of_their_mean(
    tmp_path: Path, tuned: TrainConfig
) -> None:
    dataset = load_dataset(tuned.data)
    done = do_refit(tmp_path, dataset, tuned, metric="nll", members=2, forced=Forced("own", "none", "uniform_soup"))
    report, tried = report_of(done), candidates_of(done.decision, "soup")
    assert report["decision"]["form"] == "uniform_soup"
    assert tried["uniform_soup"].score < tried["one"].score
    assert (report["networks"], report["members"]) == (1, 2)
    whole = split(dataset, tuned.data).whole()
    seeds = tuned.seed, derive_seed(tuned.seed, "member", 2)
    mean = mean_by_hand([train(tuned.override({"seed": s}), whole, device=CPU) for s in seeds], tuned, whole)
    kept = load_file(done.dir / "model.safetensors")
    for name, weights in mean.state_dict().items():
        torch.testing.assert_close(kept[name], weights, msg=name)
    test, bundle = dataset.open_test(), load_bundle(done.dir, CPU)
    assert value(scores(bundle.logits(test.images), test.labels), "accuracy") == done.test.accuracy > 0.7


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A configuration that trains for an epoch from weights pretrained on the digits."""
    config = TrainConfig().override(
        {"model.name": "timm/test_resnet", "data.image_size": 16, "epochs": 2, "batch_size": 64, "augment.flip": 0.0,
         "optim.lr_scale": 4.0}
    )  # fmt: skip
    weights = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    model = train(config, split(load_dataset(config.data), config.data), device=CPU).model
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    found = {"model.pretrained": True, "model.pretrained_file": str(weights), "epochs": 1, "optim.lr_scale": 0.3,
             "sampling.name": "balanced", "sampling.undersample": 0.4}  # fmt: skip
    return config.override(found)


def test_the_first_member_is_the_trials_own_and_folds_give_way_to_the_validation_images(
    study: Study, digits: Dataset, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    trained: list[TrainConfig] = []

    def counted(config: TrainConfig, *arguments: Any, **options: Any) -> TrainResult:
        trained.append(config)
        return train(config, *arguments, **options)

    monkeypatch.setattr("hpo.submission.networks.train", counted)
    said = run_hpo("refit", "0", "--members", "2", "--average", "own", "--form", "ensemble")
    own, other = study.trained(0).config.seed, derive_seed(study.trained(0).config.seed, "member", 2)
    assert [config.seed for config in trained] == [other, own, other]
    assert "as 2 networks from 2 seeds" in said
    assert report_of(study.paths.refit("00000.members2"))["confirmation"] is None

    trained.clear()
    folded = study.trained(0).config.override({"data.folds": 3})
    done = do_refit(study.paths.dir.parent, digits, folded, number=0, label="folded", members=2, forced=FORCED)
    assert len(trained) == 4
    assert load_bundle(done.dir, CPU).meta.config.data.folds is None


def test_the_temperature_of_an_ensemble_of_folds_is_not_above_1(tmp_path: Path, digits: Dataset) -> None:
    done = do_refit(tmp_path, digits, SMALL.override({"epochs": 1}), label="best.folds2", ensemble=2)
    assert report_of(done)["decision"]["form"] == "ensemble"
    assert done.decision.temperature.value <= 1


@pytest.mark.parametrize("seed", range(20))
def test_a_greedy_soup_is_that_of_a_plain_loop(seed: int) -> None:
    """Merits are drawn for each set of members; the reference follows Wortsman et al., algorithm 1."""
    drawn: dict[frozenset[int], float] = {}
    generator = torch.Generator().manual_seed(seed)

    def merit(members: Sequence[int]) -> float:
        key = frozenset(members)
        return drawn.setdefault(key, float(torch.randint(4, (), generator=generator)))

    found = greedy_soup(4, merit)
    ingredients: list[int] = []
    for member in sorted(range(4), key=lambda each: (-merit([each]), each)):
        if not ingredients or merit([*ingredients, member]) >= merit(ingredients):
            ingredients.append(member)
    assert found == ingredients
    assert all(merit(found) >= merit([member]) for member in range(4))


def test_the_names_of_choices_are_those_of_the_decisions() -> None:
    assert (tuple(VIEWS), FORMS) == (_VIEWS, _FORMS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--folds", "3", "--members", "3"], "give one of them"),
        (["--members", "1"], "--members 1: an ensemble has 2 to 20 networks"),
        (["--members", "21"], "--members 21: an ensemble has 2 to 20 networks"),
        (["--views", "sideways"], "--views sideways: give one of none, flip, shift, flip_shift"),
        (["--form", "ensemble"], "it is the form of several networks; give their number by --members or --ensemble"),
        (["--folds", "3", "--ensemble", "3"], "--folds and --ensemble each make several networks"),
        (["--members", "3", "--ensemble", "3"], "--members and --ensemble each make several networks"),
        (["--ensemble", "1"], "--ensemble 1: an ensemble has 2 to 20 networks"),
        (["--single", "--ensemble", "3"], "--single and --ensemble: one network or several; give one of them"),
        (["--single", "--members", "3"], "--single and --members: one network or several; give one of them"),
        (["--single", "--folds", "3"], "--single and --folds: one network or several; give one of them"),
        (["--ensemble", "2", "--form", "greedy_soup"], "weights of different configurations have no mean"),
        (["--members", "2", "--form", "soup"], "--form soup: give one of one, uniform_soup, greedy_soup, ensemble"),
        (["--average", "ema_0.9"], "--average ema_0.9: give own, none, or ema_H with a half-life H up to 0.5"),
    ],
)
def test_invalid_choices_are_one_line(study: Study, options: list[str], said: str, run_hpo: RunHpo) -> None:
    assert said in run_hpo.fails("refit", "best", "--no-confirm", *options)


@pytest.mark.parametrize(
    ("numbers", "label"),
    [
        ((None, None), "best"),
        ((5, None), "best.folds5"),
        ((None, 3), "best.members3"),
        ((None, None, 4), "best.ensemble4"),
    ],
)
def test_the_folder_is_named_by_the_number_of_networks(numbers: Sequence[Any], label: str) -> None:
    assert refit_label("best", *numbers) == label


# The winner of a confirmation ---------------------------------------------------------------------------------------


def confirm(study: Study, *contenders: Contender, evidence: bool, gap: Interval) -> Confirmation:
    """Write a confirmation of these contenders after all trials so far."""
    trials = study.counts().finished
    found = some_confirmation(*contenders, evidence=evidence, advantage=gap, study=study.name, search_trials=trials)
    write_confirmation(study.paths.confirmation, found)
    return found


def test_a_model_that_another_process_makes_is_left_to_it(study: Study, run_hpo: RunHpo) -> None:
    """Two processes would write the same checkpoints."""
    study.paths.refit("best").parent.mkdir(exist_ok=True)
    with FileLock(study.paths.refit_lock("best")):
        run_hpo("refit", "best", "--no-confirm", "--study", study.name, code=2)
    made = study.paths.refit("best")
    assert run_hpo.error.splitlines()[-1] == f"hpo: {made} is being made by another process; wait for its end"
    assert not made.exists()


def test_the_confirmed_winner_is_refitted_and_not_the_best_of_the_search(study: Study, run_hpo: RunHpo) -> None:
    best = study.best_trial()
    assert best is not None
    other = next(number for number in (1, 2) if number != best.number)
    challenger = some_contender(f"trial {other}", study.trained(other).config, 0.9)
    base = some_contender("baseline", study.trained(0).config, 0.8)
    found = confirm(study, challenger, base, evidence=True, gap=Interval(0.1, 0.02, 3))
    said = run_hpo("refit", "best")
    assert (
        f"the winner is trial {other}: accuracy 0.900 ± 0.020 (n = 3), better than the baseline by 0.100 ± 0.020"
        in said
    )
    report = report_of(study.paths.refit("best"))
    assert report["trial"] == other
    assert Confirmation.from_json(report["confirmation"]) == found
    assert load_bundle(study.paths.refit("best"), CPU).meta.config == study.trained(other).config

    said = run_hpo("refit", "best", "--no-confirm")
    assert "confirmation.json is ignored (--no-confirm)" in said
    assert report_of(study.paths.refit("best"))["trial"] == best.number


def test_the_best_bet_is_refitted_without_evidence(study: Study, run_hpo: RunHpo) -> None:
    challenger = some_contender("trial 1", study.trained(1).config, 0.81)
    base = some_contender("baseline", study.trained(0).config, 0.8)
    confirm(study, challenger, base, evidence=False, gap=Interval(0.01, 0.03, 3))
    said = run_hpo("refit", "best")
    assert (
        "the winner is trial 1: accuracy 0.810 ± 0.020 (n = 3), the best bet: +0.005 expected over the baseline; "
        "not a proven gain (0.010 ± 0.030)"
    ) in said
    assert "refitting trial 1 of study own" in said
    assert said.endswith("  hpo confirm own --budget 4  # twice the trainings, for more certainty\n")


def test_the_baseline_is_refitted_if_it_is_ahead(study: Study, run_hpo: RunHpo) -> None:
    challenger = some_contender("trial 1", study.trained(1).config, 0.79)
    base = some_contender("baseline", study.trained(0).config, 0.8)
    confirm(study, challenger, base, evidence=False, gap=Interval(-0.01, 0.03, 3))
    said = run_hpo("refit", "best")
    assert (
        "no significant gain: trial 1 is worse than the baseline by 0.010 ± 0.030 (n = 3)\nthe winner is the baseline"
    ) in said
    assert "refitting the baseline (trial 0) of study own" in said
    assert said.endswith(
        "  hpo confirm own --budget 4  # twice the trainings, for more certainty\n"
        "  hpo refit 1 --study own  # trial 1 without proof\n"
    )
    assert report_of(study.paths.refit("best"))["trial"] == 0


def test_a_recipe_that_won_and_was_no_trial_is_refitted_by_its_own_configuration_and_epochs(
    study: Study, run_hpo: RunHpo
) -> None:
    config = SMALL.override({"epochs": 3, "seed": 5})
    recipe = some_contender("recipe borrowed", config, 0.9, epochs=1)
    base = some_contender("baseline", study.trained(0).config, 0.8)
    confirm(study, recipe, base, evidence=True, gap=Interval(0.1, 0.02, 3))
    assert "refitting recipe borrowed of study own" in run_hpo("refit", "best", "--epochs", "3")
    folder = study.paths.refit("best")
    report, meta = report_of(folder), load_bundle(folder, CPU).meta
    assert (report["trial"], report["recipe"], report["epochs"], meta.trial) == (None, "borrowed", 1, None)
    assert meta.config == config
    [opening] = [json.loads(line) for line in study.paths.test_openings.read_text().splitlines()]
    assert (opening["label"], opening["trial"]) == ("best", None)


def test_best_is_confirmed_first(study: Study, run_hpo: RunHpo) -> None:
    said = run_hpo("refit", "best", "--epochs", str(study.space().baseline.epochs))
    assert "confirming the best trial of study own against the baseline first" in said
    report = report_of(study.paths.refit("best"))
    confirmation = json.loads(study.paths.confirmation.read_text())
    assert report["confirmation"] == confirmation
    winner = next(one for one in confirmation["contenders"] if one["key"] == confirmation["winner"])
    assert report["trial"] == winner["trial"]
    assert report["test"]["opened"] == 1

    assert report["decision"]["networks"] == len(next(iter(winner["scores"].values()))) * len(winner["scores"])
    assert "confirmation images, by networks that have not seen them" in said

    said = run_hpo.fails("refit", "best", "--study", "own.confirm")
    assert "study own.confirm is itself the confirmation of own; give that one" in said


def by_hand(model: torch.nn.Module, images: Tensor, splits: Any, views: str) -> Tensor:
    """(M, K): log of the mean probabilities over the image and, for `shift`, four moved by a pixel with reflection."""
    pixels = images.float()
    seen = [pixels]
    if views == "shift":
        wide = torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="reflect")
        side = images.shape[-1]
        seen += [wide[..., y : y + side, x : x + side] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    with torch.inference_mode():
        each = [model.eval()((view / 255 - splits.mean[0]) / splits.std[0]).softmax(1) for view in seen]
    return torch.stack(each).mean(0).log()


def test_the_evidence_of_a_confirmation_is_that_of_its_trainings_made_again(
    study: Study, digits: Dataset, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_hpo("confirm", "own")
    confirming = find_study("own.confirm")
    found = json.loads(study.paths.confirmation.read_text())
    winner = next(one for one in found["contenders"] if one["key"] == found["winner"])
    identity = identity_of(winner["config"])
    evidence = of_confirmation(study, identity, digits.labels)
    assert evidence is not None
    numbers = [each.number for each in trainings(confirming) if each.identity == identity and each.values]
    assert evidence.networks == len(numbers) > 1
    assert evidence.distinct_images == min(len(evidence.images), len(digits.labels)), "no image twice in a repeat"
    assert list(evidence.logits) == ["own", "ema_0.01", "ema_0.03", "ema_0.1"]
    begin = 0
    for number in numbers:
        config = confirming.trained(number).config
        splits = split(digits, config.data)
        trained = train(config, splits, device=CPU, averages=(0.01, 0.03, 0.1))
        rows = slice(begin, begin + len(splits.val))
        assert torch.equal(evidence.images[rows], splits.val)
        assert torch.equal(evidence.labels[rows], digits.labels[splits.val])
        for name, model in {"own": trained.model, **trained.averages}.items():
            assert list(evidence.logits[name]) == ["none", "shift"]
            for views in ("none", "shift"):
                expected = by_hand(model, splits.images[splits.val], splits, views)
                logits = evidence.logits[name][views][rows]
                torch.testing.assert_close(logits.log_softmax(1), expected, rtol=1e-4, atol=1e-4)
        begin = rows.stop
    assert begin == len(evidence.images)

    only: list[int] = []
    monkeypatch.setattr(
        "hpo.submission.networks.train",
        lambda config, splits, **options: only.append(len(splits.val)) or train(config, splits, **options),
    )
    same = ("refit", "best", "--epochs", str(winner["config"]["epochs"]))
    run_hpo(*same, "--average", "ema_0.1", "--views", "shift")
    assert only == [0], "nothing is trained for the decisions"
    meta = load_bundle(study.paths.refit("best"), CPU).meta
    assert (meta.config.averaging.name, meta.config.averaging.half_life_fraction) == ("ema", 0.1)
    assert meta.views == "shift"
    config = TrainConfig.model_validate_json(json.dumps(winner["config"]))
    whole = train(config, split(digits, config.data).whole(), device=CPU, averages=(0.1,), stop_after=winner["epochs"])
    kept = load_file(study.paths.refit("best") / "model.safetensors")
    weights = whole.averages["ema_0.1"].state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items())

    for file in confirming.paths.validation_outputs():
        file.unlink()
    only.clear()
    run_hpo(*same)
    assert only == [len(split(digits, config.data).val), 0], (
        "without the files, the configuration is trained for the decisions"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule.name": "plateau", "schedule.patience_fraction": 0.34, "schedule.gamma": 0.5},
        {"schedule.name": "cosine"},
    ],
)
def test_another_length_stretches_what_the_shorter_training_decided(
    changes: dict[str, Any], digits: Dataset, tmp_path: Path
) -> None:
    config = SMALL.override({"epochs": 3, **changes})
    found = split(digits, config.data)
    rows = [{"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.0}] + [
        {"epoch": epoch, "val_accuracy": 0.4, "val_loss": 1.0} for epoch in (2, 3)
    ]
    trainer = Trainer(StudyPaths(tmp_path / "s"), None, "x", config, "accuracy", CPU, None)
    [network] = trainer.on_all_images(config, found.whole(), rows, 2, length=6)
    assert len(network.rows) == 4, "two of three epochs are four of six"
    by_hand = without_validation(config, [0.5, 0.4, 0.4], [1.0] * 3, maximize=True).override({"epochs": 6})
    reference = train(by_hand, found.whole(), device=CPU, stop_after=4)
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], tensor)


# ONNX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "members", "expected"), [("none", None, 1), ("flip", None, 2), ("flip_shift", None, 6), ("shift", 2, 10)]
)
def test_the_time_of_a_refit_depends_on_the_passes_of_its_model(
    views: str, members: int | None, expected: int, tmp_path: Path, digits: Dataset
) -> None:
    asked: list[int] = []

    def left_s(passes: int) -> float:
        asked.append(passes)
        return 1e6

    forced = Forced(views=views, form="ensemble" if members else None)
    do_refit(tmp_path, digits, members=members, forced=forced, left_s=left_s)
    assert set(asked) == {expected}


def test_the_onnx_file_answers_as_the_bundle_with_its_views_and_temperature(tmp_path: Path, digits: Dataset) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    done = do_refit(tmp_path, digits, SMALL.override({"epochs": 1}), onnx=True)
    assert done.onnx_difference is not None
    assert done.onnx_difference < 1e-4
    images = digits.open_test().images
    session = onnxruntime.InferenceSession(str(done.dir / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), load_bundle(done.dir, CPU).probabilities(images), atol=1e-4, rtol=0
    )
    assert "model.onnx" in (done.dir / "README.md").read_text()


def test_a_missing_package_is_told_before_anything_is_trained(
    study: Study, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.setattr("hpo.submission.onnx_export.PACKAGES", ("no_such_package",))
    assert "ONNX needs no_such_package; install hpo-vision[onnx]" in run_hpo.fails("refit", "best", "--onnx")
    assert not study.paths.confirmation.exists()
    assert not study.paths.test_openings.exists()
