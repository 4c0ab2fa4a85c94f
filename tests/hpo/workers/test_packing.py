"""How many trials at once: decided from measurements alone, so tried on simulated devices here."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest

from hpo.workers.packing import MARGIN, WORTHWHILE, Limit, Packing, Reading, Window, gain

GB = 10**9


def reading(**rates: float) -> Reading:
    """Each training by a worker of its own."""
    return Reading(rates, sum(rates.values()))


class Device:
    """A device whose throughput depends on how many trials run at once, and on what each of them costs.

    Args:
        curve: number of trials -> how many times as fast they are together as one alone.
        noise: the standard deviation of a measured rate, relative.
        lasting: whether trials last through both windows.
    """

    def __init__(
        self, curve: Callable[[int], float], *, seed: int, noise: float = 0.0, cost: float = 1.0, lasting: bool = True
    ) -> None:
        self.curve, self.noise, self.cost, self.lasting = curve, noise, cost, lasting
        self.draw = random.Random(seed)
        self.alone: list[float] = []
        """Trial -> its images a second when it runs alone."""
        self.tried: list[int] = [1]

    def rate(self, trial: int, number: int) -> float:
        while len(self.alone) <= trial:
            self.alone.append(5000 * self.draw.uniform(1, self.cost))
        return self.alone[trial] * self.curve(number) / number * self.draw.gauss(1, self.noise)

    def window(self, number: int, *, first: int = 0) -> Reading:
        return reading(**{f"trial {first + place}": self.rate(first + place, number) for place in range(number)})

    def measure(self, packing: Packing, *, memory_bytes: int = 0) -> None:
        """Lets the packing choose."""
        packing.saw(memory_bytes)
        running, before = 1, self.window(1)
        packing.alone(before)
        while (number := packing.next) is not None:
            self.tried.append(number)
            before = self.window(running)
            after = self.window(number, first=0 if self.lasting else 100)
            packing.joined(number, before, after)
            running = number


CURVES: Mapping[str, tuple[Callable[[int], float], int]] = {
    "one fills it": (lambda number: 1.0, 1),
    "one fills it, and company costs": (lambda number: 1 / number**0.2, 1),
    "a second is worth a third more, more are not": (lambda number: 1.0 if number == 1 else 1.35, 2),
    "two cores": (lambda number: min(number, 2) * 0.97, 2),
    "saturates at three": (lambda number: min(number, 3.0), 4),
    "as many as you like, up to 16": (lambda number: min(number, 16), 16),
    "too many thrash": (lambda number: number if number <= 8 else 4.0, 8),
}  # name -> (the curve, its best of 1, 2, 4, …)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("seed", range(20))
def test_the_best_number_of_a_noisy_device_is_found_whatever_its_trials_cost(name: str, seed: int) -> None:
    curve, best = CURVES[name]
    packing = Packing(Limit(80 * GB))
    Device(curve, seed=seed, noise=0.02, cost=8.0).measure(packing)
    assert packing.best == best


@pytest.mark.parametrize("name", CURVES)
def test_without_a_trial_in_both_windows_the_totals_are_compared(name: str) -> None:
    curve, best = CURVES[name]
    packing = Packing(Limit(80 * GB))
    Device(curve, seed=0, lasting=False).measure(packing)
    assert packing.best == best


def test_a_cheaper_neighbour_is_no_gain() -> None:
    """The device is full; the second trial has a network that is ten times as fast."""
    before = reading(old=1000.0)
    after = reading(old=500.0, new=5000.0)
    assert gain(before, after, factor=2) == 1.0


def test_a_costly_neighbour_is_no_loss() -> None:
    before = reading(old=1000.0)
    after = reading(old=950.0, new=95.0)
    assert gain(before, after, factor=2) == pytest.approx(1.9)


@pytest.mark.parametrize("seed", range(50))
def test_the_memory_is_never_exceeded_and_the_numbers_double_until_one_is_refused(seed: int) -> None:
    draw = random.Random(seed)
    peak, memory = draw.randint(1, 40) * GB, draw.randint(1, 160) * GB
    most = draw.choice([None, 1, 3, 8])
    full = draw.choice([2, 5, 9, 64])
    device = Device(lambda number: float(min(number, full)), seed=seed, noise=0.05)
    packing = Packing(Limit(memory, most, "that is all"))
    device.measure(packing, memory_bytes=peak)
    for last, number in pairwise(device.tried):
        assert number * peak * MARGIN <= memory
        assert number <= (most or number)
        assert last < number <= 2 * last
    assert packing.next is None
    assert packing.best in device.tried
    assert packing.said()


def test_a_trial_that_needs_more_memory_than_those_before_stops_the_growth() -> None:
    packing = Packing(Limit(100 * GB))
    packing.saw(10 * GB)
    packing.alone(reading(a=1000.0))
    packing.joined(2, reading(a=1000.0), reading(a=1000.0, b=1000.0))
    assert packing.next == 4
    packing.saw(30 * GB)
    assert packing.next is None
    assert packing.best == 2


def test_what_the_memory_holds_is_tried_where_it_is_no_power_of_two() -> None:
    packing = Packing(Limit(100 * GB))
    packing.saw(25 * GB)
    packing.alone(reading(a=1000.0))
    packing.joined(2, reading(a=1000.0), reading(a=1000.0, b=1000.0))
    assert packing.next == 3


@pytest.mark.parametrize(("speed", "kept"), [(WORTHWHILE + 0.01, 2), (WORTHWHILE - 0.01, 1)])
def test_a_number_is_kept_if_it_gains_a_tenth(speed: float, kept: int) -> None:
    packing = Packing(Limit(80 * GB))
    packing.alone(reading(a=1000.0))
    packing.joined(2, reading(a=1000.0), reading(a=500 * speed, b=500 * speed))
    assert packing.best == kept


def packed(*speeds: float, limit: Limit | None = None, peak_bytes: int = GB) -> Packing:
    """What 1, 2, 4, … trials at once came to."""
    packing = Packing(limit or Limit(1000 * GB))
    packing.saw(peak_bytes)
    packing.alone(reading(a=speeds[0]))
    for step, (before, after) in enumerate(pairwise(speeds)):
        number = 2 ** (step + 1)
        packing.joined(number, reading(a=2 * before / number), reading(a=after / number))
    return packing


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        (packed(5300, 9100, 9200), "2 trials at once: 9,100 images/s against 5,300 with one; 4 gave 9,200"),
        (packed(5300, 5400), "1 trial at once: 5,300 images/s; 2 gave 5,400"),
        (packed(5300, 9100, 15000, 15100),
         "4 trials at once: 15,000 images/s against 5,300 with one; 2 gave 9,100; 8 gave 15,100"),
        (packed(5300, 9100, limit=Limit(1000 * GB, 2, "the CPU has 2 cores")),
         "2 trials at once: 9,100 images/s against 5,300 with one; the CPU has 2 cores"),
        (packed(5300, 9100, limit=Limit(80 * GB), peak_bytes=30 * GB),
         "2 trials at once: 9,100 images/s against 5,300 with one; "
         "the memory holds no more (30.0 GB a trial at most, 80.0 GB free)"),
        (packed(5300, limit=Limit(8 * GB, 4, "the CPU has 4 cores"), peak_bytes=7 * GB),
         "1 trial at once: 5,300 images/s; the memory holds no more (7.0 GB a trial at most, 8.0 GB free)"),
        (Packing(Limit(8 * GB, 1, "the CPU has 1 core")), "1 trial at once: the CPU has 1 core"),
    ],
)  # fmt: skip
def test_the_choice_is_said_with_its_numbers(packing: Packing, said: str) -> None:
    assert packing.next is None
    assert packing.said() == said


# Windows


def test_an_epoch_counts_if_the_one_before_it_ended_in_the_window_too() -> None:
    window = Window([0], epochs=2, seconds=0)
    window.add(0, "a", epoch=7, images=100, elapsed_s=70.0)  # began before the window did
    window.add(0, "a", epoch=8, images=100, elapsed_s=71.0)
    assert not window.full
    window.add(0, "a", epoch=9, images=100, elapsed_s=73.0)
    assert window.full
    assert window.reading() == Reading({"a": 200 / 3}, 200 / 3)


def test_a_trainings_first_epoch_never_counts() -> None:
    window = Window([0], epochs=2, seconds=0)
    window.add(0, "a", epoch=9, images=100, elapsed_s=9.0)
    window.add(0, "a", epoch=10, images=100, elapsed_s=10.0)
    window.add(0, "b", epoch=1, images=100, elapsed_s=60.0)
    window.add(0, "b", epoch=2, images=100, elapsed_s=63.0)
    assert window.reading() == Reading({"a": 100.0, "b": 100 / 3}, 50.0)


def test_a_window_waits_for_every_worker_and_for_its_seconds() -> None:
    window = Window([0, 1], epochs=1, seconds=1.0)
    for epoch, elapsed_s in ((1, 0.5), (2, 1.0), (3, 1.5)):
        window.add(0, "a", epoch=epoch, images=10, elapsed_s=elapsed_s)
    window.add(1, "b", epoch=1, images=30, elapsed_s=1.0)
    assert not window.full  # worker 1 has no epoch in it
    window.add(1, "b", epoch=2, images=30, elapsed_s=1.5)
    assert not window.full  # it has one, of half a second
    window.add(1, "b", epoch=3, images=30, elapsed_s=2.0)
    assert window.full
    assert window.reading() == Reading({"a": 20.0, "b": 60.0}, 80.0)


def test_a_worker_that_the_window_is_not_about_is_not_counted() -> None:
    window = Window([0], epochs=1, seconds=0)
    for worker in (0, 1):
        window.add(worker, f"of {worker}", epoch=1, images=10, elapsed_s=1.0)
        window.add(worker, f"of {worker}", epoch=2, images=10, elapsed_s=2.0)
    assert window.reading() == Reading({"of 0": 10.0}, 10.0)
