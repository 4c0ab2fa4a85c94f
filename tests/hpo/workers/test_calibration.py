"""The number of trials at once, chosen from measurements of simulated devices."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise

import pytest
import torch

from core.config import TrainConfig
from core.data import load_dataset, split
from hpo.workers.calibration import MARGIN, WORTHWHILE, Choice, Measured, _first_part, choose
from hpo.workers.capacity import Capacity

GB = 10**9


def room(memory_bytes: int, cores: int | None = None) -> Capacity:
    """A CPU with so many cores, or a GPU."""
    return Capacity(threads=1, cores=cores or 1, memory_bytes=memory_bytes, gpu_bytes=None if cores else memory_bytes)


NO_LIMIT = room(1000 * GB)


def device(
    curve: Callable[[int], float], tried: list[int] | None = None, *, noise: float = 0.0, peak: int = GB, seed: int = 0
) -> Callable[[int], Measured]:
    """A device whose images per second depend on how many trials run at once.

    Args:
        curve: number of trials -> images per second, relative to one alone.
        tried: collects the numbers that are measured.
        noise: relative standard deviation of a process's measurement.
        peak: memory of a process, in bytes.
        seed: of the noise.
    """
    draw = random.Random(seed)

    def measure(number: int) -> Measured:
        if tried is not None:
            tried.append(number)
        return Measured(5000 * curve(number) * draw.gauss(1, noise / number**0.5), peak)

    return measure


CURVES: Mapping[str, tuple[Callable[[int], float], int]] = {
    "one fills it": (lambda number: 1.0, 1),
    "one fills it, and company costs": (lambda number: 1 / number**0.2, 1),
    "a second is worth a third more, more are not": (lambda number: 1.0 if number == 1 else 1.35, 2),
    "two cores": (lambda number: min(number, 2) * 0.97, 2),
    "saturates at three": (lambda number: min(number, 3.0), 4),
    "linear up to 16": (lambda number: min(number, 16), 16),
    "too many thrash": (lambda number: number if number <= 8 else 4.0, 8),
}  # name -> (the curve, its best of 1, 2, 4, …)


@pytest.mark.parametrize("name", CURVES)
def test_the_best_number_of_a_noisy_device_is_found(name: str) -> None:
    curve, best = CURVES[name]
    for seed in range(20):
        assert choose(device(curve, noise=0.02, seed=seed), NO_LIMIT).trials == best


@pytest.mark.parametrize("seed", range(50))
def test_the_memory_is_never_exceeded_and_the_numbers_double_until_one_is_refused(seed: int) -> None:
    draw = random.Random(seed)
    peak, memory = draw.randint(1, 40) * GB, draw.randint(1, 160) * GB
    most = draw.choice([None, 1, 3, 8])
    full = draw.choice([2, 5, 9, 64])
    tried: list[int] = []
    measure = device(lambda number: float(min(number, full)), tried, noise=0.05, peak=peak, seed=seed)
    choice = choose(measure, room(memory, most))
    for last, number in pairwise(tried):
        assert number * peak * MARGIN <= memory
        assert number <= (most or number)
        assert last < number <= 2 * last
    assert choice.trials in tried
    assert choice.why
    assert choice.measured


@pytest.mark.parametrize(("gain", "kept"), [(WORTHWHILE + 0.01, 2), (WORTHWHILE - 0.01, 1)])
def test_a_number_is_kept_if_it_gains_a_tenth(gain: float, kept: int) -> None:
    assert choose(device(lambda number: 1.0 if number == 1 else gain), NO_LIMIT).trials == kept


def listed(*speeds: float) -> Callable[[int], float]:
    """The images per second of 1, 2, 4, … trials."""
    return lambda number: speeds[number.bit_length() - 1] / 5000


@pytest.mark.parametrize(
    ("speeds", "limit", "peak", "why"),
    [
        ((5300, 9100, 9200), NO_LIMIT, GB, "2 trials at once: 9,100 images/s against 5,300 with one; 4 gave 9,200"),
        ((5300, 5400), NO_LIMIT, GB, "1 trial at once: 5,300 images/s; 2 gave 5,400"),
        ((5300, 9100, 15000, 15100), NO_LIMIT, GB,
         "4 trials at once: 15,000 images/s against 5,300 with one; 2 gave 9,100; 8 gave 15,100"),
        ((5300, 9100), room(1000 * GB, 2), GB,
         "2 trials at once: 9,100 images/s against 5,300 with one; the CPU has 2 cores"),
        ((5300, 9100), room(80 * GB), 30 * GB,
         "2 trials at once: 9,100 images/s against 5,300 with one; "
         "the memory holds no more (30.0 GB per trial, 80.0 GB free)"),
        ((5300,), room(8 * GB, 4), 7 * GB,
         "1 trial at once: 5,300 images/s; the memory holds no more (7.0 GB per trial, 8.0 GB free)"),
        ((5300,), room(8 * GB, 1), GB, "1 trial at once: 5,300 images/s; the CPU has 1 core"),
    ],
)  # fmt: skip
def test_the_choice_is_explained_with_its_numbers(
    speeds: tuple[float, ...], limit: Capacity, peak: int, why: str
) -> None:
    assert choose(device(listed(*speeds), peak=peak), limit).why == why


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), BrokenProcessPool("killed"), threading.BrokenBarrierError()]
)
def test_a_number_that_does_not_fit_ends_the_measurement(error: Exception) -> None:
    def measure(number: int) -> Measured:
        if number > fits:
            raise error
        return Measured(1000.0 * number, GB)

    fits = 2
    why = "2 trials at once: 2,000 images/s against 1,000 with one; 4 did not fit"
    assert choose(measure, NO_LIMIT) == Choice(2, why)
    fits = 0
    choice = choose(measure, NO_LIMIT)
    assert (choice.trials, choice.measured) == (1, False)
    assert choice.why.startswith("--per-device auto: not measured, the baseline could not be timed (")


def test_another_error_is_not_taken_for_a_full_device() -> None:
    def measure(number: int) -> Measured:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        choose(measure, NO_LIMIT)


def test_a_part_of_the_images_has_every_class() -> None:
    config = TrainConfig()
    whole = split(load_dataset(config.data), config.data)
    part = _first_part(whole, 0.05, 10)
    assert len(part.train) <= 0.08 * len(whole.train)
    assert len(part.val) <= 0.08 * len(whole.val)
    assert set(part.train.tolist()) < set(whole.train.tolist())
    assert torch.equal(part.labels[part.train].unique(), whole.labels[whole.train].unique())
    assert _first_part(whole, 1.5, 10) is whole
