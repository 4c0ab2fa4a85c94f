"""Scores equal scikit-learn's and explicit sums."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from core import metrics
from core.metrics import (
    METRICS,
    Scores,
    bootstrap_intervals,
    confusion,
    paired_gain,
    per_class,
    scores,
    standard_error,
    standard_error_at,
    value,
)

CLASSES = 5


def _predictions(n: int = 400, *, labels: tuple[int, ...] = (0, 1, 2, 3, 4), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mostly correct logits (n, 5), and labels (n,) drawn from the given ones."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor(labels)[torch.randint(len(labels), (n,), generator=generator)]
    logits = torch.randn(n, CLASSES, generator=generator)
    logits[torch.arange(n), truth] += 1.5
    return logits, truth


def _never(logits: Tensor, classes: tuple[int, ...]) -> Tensor:
    logits = logits.clone()
    logits[:, list(classes)] = -20.0
    return logits


LOGITS, LABELS = _predictions()
CASES = {
    "all classes": (LOGITS, LABELS),
    "a class without images": _predictions(labels=(0, 1, 3, 4)),
    "a class never predicted": (_never(LOGITS, (2,)), LABELS),
    "a class neither there nor predicted": (
        _never(_predictions(labels=(0, 1, 3))[0], (4,)),
        _predictions(labels=(0, 1, 3))[1],
    ),
    "all right": (torch.eye(CLASSES)[LABELS] * 9, LABELS),
    "all wrong": (torch.eye(CLASSES)[(LABELS + 1) % CLASSES] * 9, LABELS),
    "one image": (LOGITS[:1], LABELS[:1]),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case: str) -> None:
    logits, labels = CASES[case]
    got = scores(logits, labels)
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without images
        balanced = sklearn_metrics.balanced_accuracy_score(truth, predicted)
    assert got.accuracy == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert got.balanced_accuracy == pytest.approx(balanced)
    assert got.macro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="macro", zero_division=0))
    probabilities = logits.double().softmax(1).numpy()
    assert got.loss == pytest.approx(sklearn_metrics.log_loss(truth, probabilities, labels=range(CLASSES)))


@pytest.mark.parametrize("case", CASES)
def test_confusion_and_per_class_equal_scikit_learn(case: str) -> None:
    logits, labels = CASES[case]
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    counts = confusion(logits, labels)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts, sklearn_metrics.confusion_matrix(truth, predicted, labels=range(CLASSES)))
    names = tuple("abcde")
    columns = sklearn_metrics.precision_recall_fscore_support(truth, predicted, labels=range(CLASSES), zero_division=0)
    for row, name, *expected in zip(per_class(counts, names), names, *columns, strict=True):
        assert row["class"] == name
        assert [row[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(expected)


def test_the_rows_of_the_confusion_are_the_true_classes() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert confusion(logits, torch.tensor([0, 0, 0])).tolist() == [[1, 2], [0, 0]]


def test_calibration_error_matches_guo_et_al() -> None:
    confidence, predicted = LOGITS.double().softmax(1).max(1)
    expected = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            accuracy = (predicted == LABELS)[inside].double().mean()
            expected += inside.double().mean() * (accuracy - confidence[inside].mean()).abs()
    assert scores(LOGITS, LABELS).ece == pytest.approx(float(expected))


def test_calibration_error_of_certain_predictions_is_0_or_1() -> None:
    certain = torch.eye(CLASSES)[LABELS] * 1e3
    assert scores(certain, LABELS).ece == 0
    assert scores(certain, (LABELS + 1) % CLASSES).ece == 1


def test_log_probabilities_score_as_their_logits() -> None:
    from_logits, from_logs = scores(LOGITS, LABELS), scores(LOGITS.double().log_softmax(1), LABELS)
    assert dataclasses.astuple(from_logs) == pytest.approx(dataclasses.astuple(from_logits))


def test_a_diverged_network_has_a_nan_loss() -> None:
    assert np.isnan(scores(torch.full((4, CLASSES), float("nan")), LABELS[:4]).loss)


def test_half_precision_logits_score_as_their_float_values() -> None:
    half = LOGITS.to(torch.bfloat16)
    assert scores(half, LABELS) == scores(half.float(), LABELS)


@pytest.mark.parametrize(
    ("metric", "field", "direction"),
    [
        ("accuracy", "accuracy", "maximize"),
        ("balanced_accuracy", "balanced_accuracy", "maximize"),
        ("macro_f1", "macro_f1", "maximize"),
        ("nll", "loss", "minimize"),
    ],
)
def test_a_metric_names_a_score_and_its_direction(metric: str, field: str, direction: str) -> None:
    found = Scores(loss=0.1, accuracy=0.2, balanced_accuracy=0.3, macro_f1=0.4, ece=0.5)
    assert value(found, metric) == getattr(found, field)
    assert METRICS[metric] == direction
    assert len(METRICS) == 4


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="'recall' is not a metric; choose from accuracy"):
        value(scores(LOGITS, LABELS), "recall")


@pytest.mark.gpu
def test_on_cuda_scores_equal_the_cpus_with_a_single_transfer() -> None:
    logits, labels = LOGITS.cuda(), LABELS.cuda()
    assert dataclasses.astuple(scores(logits, labels)) == pytest.approx(dataclasses.astuple(scores(LOGITS, LABELS)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            scores(logits, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught) == 1
    assert torch.equal(confusion(logits, labels).cpu(), confusion(LOGITS, LABELS))


# ---- intervals


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at_once", [1, 1_000_000], ids=["drawing by drawing", "all at once"])
def test_intervals_are_percentiles_of_resampled_scores(
    case: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with scores of every resample and numpy's percentiles, apart from Wilson's intervals, tested below."""
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", at_once)
    logits, labels = CASES[case]
    found = bootstrap_intervals(logits, labels, generator=_seeded(7), resamples=60)
    drawings = torch.randint(len(labels), (60, len(labels)), generator=_seeded(7))
    table = np.array([dataclasses.astuple(scores(logits[rows], labels[rows])) for rows in drawings])
    expected = np.percentile(table, [2.5, 97.5], axis=0).T
    names = [field.name for field in dataclasses.fields(Scores)]
    assert list(found) == names
    is_varied = 0 < (logits.argmax(1) == labels).sum() < len(labels)
    for name, interval in zip(names, expected, strict=True):
        if is_varied or name in ("loss", "ece"):
            np.testing.assert_allclose(found[name], interval, rtol=1e-9, atol=1e-12)


def test_intervals_match_scipy() -> None:
    """With 4,000 resamples, bounds of accuracy, loss and macro-F1 agree within a tenth of the width."""
    logits, labels = CASES["all classes"]
    hits = (logits.argmax(1) == labels).double().numpy()
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()

    def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
        return float(sklearn_metrics.f1_score(truth, predicted, average="macro"))

    options = {"method": "percentile", "n_resamples": 4000, "rng": np.random.default_rng(0)}
    theirs = {
        "accuracy": bootstrap((hits,), np.mean, **options),
        "loss": bootstrap((losses,), np.mean, **options),
        "macro_f1": bootstrap(
            (labels.numpy(), logits.argmax(1).numpy()), macro_f1, paired=True, vectorized=False,
            **(options | {"n_resamples": 400}),
        ),
    }  # fmt: skip
    ours = bootstrap_intervals(logits, labels, generator=_seeded(), resamples=4000)
    for name, result in theirs.items():
        low, high = result.confidence_interval
        assert ours[name] == pytest.approx((low, high), abs=(high - low) / 10), name


def test_intervals_cover_the_true_accuracy_at_95_percent() -> None:
    """At least 180 of 200 sets of 300 images with accuracy 0.9 (binomial, 1 %)."""
    generator, held = _seeded(1), 0
    for _ in range(200):
        labels = torch.randint(2, (300,), generator=generator)
        right = torch.rand(300, generator=generator) < 0.9
        logits = torch.eye(2)[torch.where(right, labels, 1 - labels)] * 3
        low, high = bootstrap_intervals(logits, labels, generator=generator, resamples=200)["accuracy"]
        held += low <= 0.9 <= high
    assert held >= 180


def test_four_times_the_images_halve_the_interval_and_more_confidence_widens_it() -> None:
    def width(images: int, confidence: float) -> float:
        logits, labels = _predictions(images)
        found = bootstrap_intervals(logits, labels, generator=_seeded(), resamples=2000, confidence=confidence)
        return found["accuracy"][1] - found["accuracy"][0]

    assert width(4 * 400, 0.95) == pytest.approx(width(400, 0.95) / 2, rel=0.15)
    assert width(400, 0.8) < width(400, 0.95) < width(400, 0.99)


@pytest.mark.parametrize(("images", "bound"), [(1, 0.2065), (4, 0.5101), (10, 0.7225), (400, 0.9905)])
def test_a_perfect_or_a_zero_score_has_wilsons_interval(images: int, bound: float) -> None:
    """Bounds by the formula n / (n + z²), with z = 1.96."""
    labels = torch.arange(images) % 2
    right = bootstrap_intervals(torch.eye(2)[labels], labels, generator=_seeded(), resamples=10)
    wrong = bootstrap_intervals(torch.eye(2)[1 - labels], labels, generator=_seeded(), resamples=10)
    assert right["accuracy"] == pytest.approx((bound, 1), abs=1e-4)
    assert wrong["accuracy"] == pytest.approx((0, 1 - bound), abs=1e-4)
    for name in ("balanced_accuracy", "macro_f1"):
        assert right[name][0] <= right["accuracy"][0] + 1e-9
        assert right[name][1] == pytest.approx(1)
        assert wrong[name][1] >= wrong["accuracy"][1] - 1e-9


def test_one_mistake_leaves_the_bootstrap_interval() -> None:
    labels = torch.arange(10) % 2
    logits = torch.eye(2)[torch.cat([1 - labels[:1], labels[1:]])]
    assert bootstrap_intervals(logits, labels, generator=_seeded())["accuracy"] == pytest.approx((0.7, 1.0))


def test_one_seed_gives_one_interval() -> None:
    first, again, other = (
        bootstrap_intervals(LOGITS, LABELS, generator=_seeded(seed), resamples=50) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_invalid_resamples_or_confidence_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="resamples with a confidence"):
        bootstrap_intervals(LOGITS, LABELS, generator=_seeded(), **wrong)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_cuda_intervals_equal_the_cpus() -> None:
    on_cuda = bootstrap_intervals(LOGITS.cuda(), LABELS.cuda(), generator=_seeded(), resamples=50)
    on_cpu = bootstrap_intervals(LOGITS, LABELS, generator=_seeded(), resamples=50)
    for name, ends in on_cpu.items():
        assert on_cuda[name] == pytest.approx(ends), name


# Paired gains


def test_the_chance_of_a_gain_is_that_of_the_exact_sign_test() -> None:
    """Images on which both are right or both are wrong do not count: 9 against 2 of the others (McNemar 1947)."""
    labels = torch.zeros(60, dtype=torch.int64)
    right, wrong = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    ours = torch.stack([right] * 9 + [wrong] * 2 + [right] * 40 + [wrong] * 9)
    theirs = torch.stack([wrong] * 9 + [right] * 2 + [right] * 40 + [wrong] * 9)
    found = paired_gain(ours, theirs, labels, "accuracy", generator=torch.Generator().manual_seed(0), draws=20_000)
    assert found.value == pytest.approx(7 / 60)
    assert found.error == pytest.approx(math.sqrt(11) / 60, rel=0.02)
    assert found.chance == pytest.approx(binomtest(9, 11, alternative="greater").pvalue, rel=0.1)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_predictions_gain_nothing(metric: str) -> None:
    logits, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 4
    found = paired_gain(logits, logits, labels, metric, generator=torch.Generator().manual_seed(0))
    assert (found.value, found.error) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert found.chance == 1.0


@pytest.mark.parametrize("metric", METRICS)
def test_a_gain_is_the_difference_of_the_scores_towards_better(metric: str) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 80, 4, generator=generator)
    labels = torch.arange(80) % 4
    found = paired_gain(first, second, labels, metric, generator=generator)
    difference = value(scores(first, labels), metric) - value(scores(second, labels), metric)
    assert found.value == pytest.approx(difference if METRICS[metric] == "maximize" else -difference)


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_standard_error_is_that_of_the_bootstrap(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (400,), generator=generator)
    logits = torch.randn(400, 6, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 6)
    low, high = bootstrap_intervals(logits, labels, generator=generator)["loss" if metric == "nll" else metric]
    assert standard_error(logits, labels, metric) == pytest.approx((high - low) / (2 * 1.96), rel=0.15)


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_standard_error_is_positive_where_all_predictions_are_right(metric: str) -> None:
    labels = torch.arange(8) % 2
    assert standard_error(200.0 * torch.nn.functional.one_hot(labels, 3), labels, metric) > 0


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
def test_the_standard_error_at_a_level_is_that_of_predictions_at_that_level(metric: str) -> None:
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 40)
    wrong = torch.arange(160) % 4 == 0  # a quarter of each class
    logits = torch.nn.functional.one_hot((labels + wrong) % 3, 3).double()
    assert standard_error_at(0.75, labels, metric) == pytest.approx(standard_error(logits, labels, metric))


def test_predictions_of_one_image_are_exchanged_together() -> None:
    """Four equal copies of each image are no more evidence than one."""
    labels = torch.zeros(40, dtype=torch.int64)
    first, second = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(3))
    first[:8, 0] += 2.0
    once = paired_gain(first, second, labels, "accuracy", generator=torch.Generator().manual_seed(0), draws=5000)
    repeated = [each.repeat(4, 1) for each in (first, second)]
    images = torch.arange(40).repeat(4)
    seed = torch.Generator().manual_seed(0)
    found = paired_gain(*repeated, labels.repeat(4), "accuracy", generator=seed, images=images, draws=5000)
    assert (found.value, found.error, found.chance) == pytest.approx((once.value, once.error, once.chance))
    apart = paired_gain(*repeated, labels.repeat(4), "accuracy", generator=torch.Generator().manual_seed(0), draws=5000)
    assert apart.error == pytest.approx(once.error / 2, rel=0.1)
