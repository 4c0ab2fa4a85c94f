"""The temperature matches a general optimizer, and scaling has the effects described by Guo et al."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from core.calibration import HIGHEST, LOWEST, calibrated_loss, fit_temperature, scaled
from core.metrics import scores
from core.tta import average


def drawn(n: int, classes: int, *, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Calibrated logits (n, classes), and labels (n,) drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def loss(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return F.cross_entropy(logits.double() / temperature, labels).item()


@pytest.mark.parametrize("distortion", [0.2, 0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("n", "classes"), [(60, 3), (500, 10), (300, 100)])
def test_the_temperature_matches_scipys_minimizer(n: int, classes: int, distortion: float) -> None:
    logits, labels = drawn(n, classes)
    logits = logits * distortion
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    theirs = minimize_scalar(lambda t: loss(logits, labels, math.exp(t)), bounds=bounds, options={"xatol": 1e-9})
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(math.exp(theirs.x), rel=1e-5)
    assert loss(logits, labels, found) <= theirs.fun + 1e-12


@pytest.mark.parametrize("distortion", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_the_temperature_recovers_the_scale_of_calibrated_logits(distortion: float) -> None:
    """Within 5 %, of 20,000 images."""
    logits, labels = drawn(20_000, 10)
    assert fit_temperature(logits * distortion, labels) == pytest.approx(distortion, rel=0.05)


@pytest.mark.parametrize("distortion", [0.3, 4.0])
def test_scaling_lowers_loss_and_calibration_error_on_held_out_images(
    distortion: float,
) -> None:
    logits, labels = drawn(4_000, 10)
    logits = logits * distortion
    temperature = fit_temperature(logits[:2000], labels[:2000])
    before, after = scores(logits[2000:], labels[2000:]), scores(scaled(logits[2000:], temperature), labels[2000:])
    assert after.loss < before.loss
    assert after.ece < 0.5 * before.ece


def test_logits_and_log_probabilities_have_the_same_temperature() -> None:
    logits, labels = drawn(500, 10)
    from_logs = fit_temperature((3 * logits).log_softmax(1), labels)
    assert from_logs == pytest.approx(fit_temperature(3 * logits, labels), rel=1e-5)


def test_half_precision_is_fitted_as_its_float_values() -> None:
    logits, labels = drawn(500, 10)
    half = logits.to(torch.bfloat16)
    assert fit_temperature(half, labels) == fit_temperature(half.float(), labels)


@pytest.mark.parametrize(
    ("case", "expected"),
    [("all right", LOWEST), ("all wrong", HIGHEST), ("all alike", 1.0), ("one image that is right", LOWEST)],
)
def test_without_an_optimum_the_result_is_a_bound_or_1(case: str, expected: float) -> None:
    logits, labels = drawn(200, 5)
    if case == "all right":
        labels = logits.argmax(1)
    elif case == "all wrong":
        labels = logits.argmin(1)
    elif case == "all alike":
        logits = torch.full_like(logits, 0.3)
    else:
        logits, labels = logits[:1], logits[:1].argmax(1)
    assert fit_temperature(logits, labels) == expected


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(broken: float) -> None:
    logits, labels = drawn(20, 5)
    logits[3, 2] = broken
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(logits, labels)


# ---- the calibrated loss


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_calibrated_loss_is_the_lowest_over_all_temperatures(factor: float) -> None:
    logits, labels = drawn(300, 10)
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    lowest = minimize_scalar(lambda t: loss(logits, labels, math.exp(t)), bounds=bounds, options={"xatol": 1e-9}).fun
    assert calibrated_loss(factor * logits, labels) == pytest.approx(lowest, abs=1e-6)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_without_finite_logits_there_is_no_calibrated_loss(broken: float) -> None:
    logits, labels = drawn(20, 5)
    logits[3, (labels[3] + 1) % 5] = broken
    assert math.isnan(calibrated_loss(logits, labels))


# ---- scaling


@pytest.mark.parametrize("temperature", [LOWEST, 0.7, 1.0, 1.6, HIGHEST])
def test_scaling_keeps_labels_and_divides_logits(temperature: float) -> None:
    logits, _ = drawn(2_000, 10)
    found = scaled(logits, temperature)
    assert torch.equal(found.argmax(1), logits.argmax(1))
    torch.testing.assert_close(found.softmax(1), (logits / temperature).softmax(1))


def test_scaled_log_probabilities_sum_to_one() -> None:
    views = torch.stack([drawn(50, 4, seed=seed)[0] for seed in (1, 2, 3)])
    found = scaled(average(views), 2.5)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(50))
    powers = views.softmax(2).mean(0) ** (1 / 2.5)
    torch.testing.assert_close(found.exp(), powers / powers.sum(1, keepdim=True))


def test_a_temperature_of_1_returns_its_input() -> None:
    logits, _ = drawn(20, 5)
    assert scaled(logits, 1.0) is logits
