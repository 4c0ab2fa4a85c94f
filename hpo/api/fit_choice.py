"""What `hpo fit` trains: the search space, the size of the images and the epochs that fit the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from core.config import TrainConfig
from core.data import Dataset, Splits, folds, image_sizes
from core.errors import MissingWeightsError, SizesError, UserError
from core.loop import seconds_per_epoch
from core.models import has_weights
from core.text import count
from core.tta import MOST_PASSES
from hpo.api.common import open_dataset
from hpo.api.fit_plan import BUNDLE_S, END_S, REPORT_S, SLOWER, Plan, Timed, divide, least_s
from hpo.api.networks import advice, with_weights
from hpo.api.options import FitOptions, setting_texts
from hpo.errors import TimeLimitError
from hpo.paths import data_root
from hpo.reporter import Reporter
from hpo.search.length import MIN_TRAININGS
from hpo.space import SearchSpace, list_spaces, load_space
from hpo.text import duration

PHOTOS, PROBE = "photos", "probe"
"""Spaces with pretrained networks: to fine-tune them, and where that is too slow to take them as they are."""
FINE_EPOCHS = 4
"""Epochs of a fine-tuning that are worth its time."""
INPUT_SIDE = 96
"""The network's input where that of the space's baseline is too slow."""
PRETRAINED_SIDE = 32
"""Smaller images are trained from scratch."""
LARGE, SCRATCH = "stl10_small", "scratch"
"""Spaces that train from scratch: for images of 48² and more with a GPU, and for any others."""
LARGE_SIDE = 48
MOST_SIDE = 96
"""Images are brought to at most this side for a training from scratch."""
SMALLER_SIDES = (64, 48, 32)
"""Sides to try where the images are too slow."""
STRIDE_SIDE = 48
"""Larger images are halved by the first layer of `scratch`."""
ENOUGH_EPOCHS = 15
"""A space with shorter trials is not chosen if there is another."""
ENOUGH_PART = 0.5
"""A size whose refit has fewer of the space's epochs is not chosen if there is a smaller one: on TrashNet from scratch
47 epochs at 64² reached 0.77, and 13 at 96² 0.64."""
TIMED_BATCH = 8
"""Batch size to time a large network with on a CPU, where a step of 64 images may take 10 s."""
DECODE_S = 0.003
"""Seconds to read an image to label."""
MOST_SLOW = 4.0
"""A busy machine counts as at most so many times slower; waiting for a disk looks alike."""
PASS = 1 / 3
"""Time of a pass of an image through a network, relative to that of training on it once."""


@dataclass(frozen=True)
class Choice:
    """A space with its settings, and the time of each stage."""

    space: str
    settings: tuple[str, ...]
    """`KEY=VALUE`, as `--set` takes them."""
    why: tuple[str, ...]
    """Lines for the user."""
    plan: Plan
    trials: int
    """Total of the search, which time may end earlier."""
    whole: float
    """Images outside the test set as a multiple of the training images."""
    epochs: int
    """Of the space's baseline: the trials may be shorter, to fit the time."""
    end_s: float
    """See `Timed`."""
    pass_s: float
    """See `Timed`."""


@dataclass(frozen=True)
class _Candidate:
    space: SearchSpace
    name: str
    settings: tuple[str, ...]
    dataset: Dataset
    splits: tuple[Splits, ...]
    timed: Timed

    @property
    def side(self) -> int:
        return min(self.dataset.images.shape[-2:])

    def resized(self, side: int) -> _Candidate:
        """With another input of the network; the time goes with its area."""
        setting = f"model.input_size={side}"
        share = (side / (self.space.baseline.model.input_size or self.side)) ** 2
        space = replace(self.space, baseline=self.space.baseline.override({"model.input_size": side}))
        timed = replace(self.timed, epoch_s=self.timed.epoch_s * share)
        return replace(self, space=space, settings=(*self.settings, setting), timed=timed)


class Chooser:
    """Chooses by the images and by a few timed steps of the baseline.

    Args:
        to_predict: Number of images that will be labelled.
    """

    def __init__(self, options: FitOptions, device: torch.device, reporter: Reporter, *, to_predict: int) -> None:
        self._options, self._device, self._reporter, self._to_predict = options, device, reporter, to_predict
        self._measured: dict[tuple[object, ...], float] = {}
        self._began = time.monotonic(), time.process_time()
        self._builtin = options.path is None
        self.data = options.path
        """The value of `--data`; None for a built-in set."""
        self._given = tuple(setting_texts(options.set))

    def choose(self, left_s: float) -> tuple[Choice, Dataset, tuple[Splits, ...]]:
        """Choose what fits these seconds, and return it with the images as it loads them.

        Raises:
            TimeLimitError: Not even one epoch fits.
            HpoError: There is no such space, or a setting has faults.
            CoreError: The images cannot be used.
        """
        why: list[str] = []
        if self._options.space is None and not self._builtin and self._side >= PRETRAINED_SIDE:
            try:
                found, lines = self._pretrained(left_s)
            except MissingWeightsError:
                _, _, how = advice(sorted(load_space(PHOTOS).names("model.name"))).partition("; ")
                why += ["no pretrained weights are here, so from scratch; fine-tuning is usually better:", f"  {how}"]
            else:
                return self._choice(found, left_s, lines)
        *large, last = self._spaces()
        for name in large:
            found = self._candidate(name, quick=True)
            epochs = self._epochs(found, left_s)
            if epochs >= min(ENOUGH_EPOCHS, found.space.baseline.epochs):
                return self._choice(self._exactly_timed(found), left_s, why)
            why.append(f"not {name}: its network is too slow here, {count(epochs, 'epoch')} to a trial")
        found = self._candidate(last)
        if (smaller := self._smaller(found, left_s)) is not None:
            why.append(f"images of {smaller}²: larger ones are too slow here")
            found = self._candidate(last, side=smaller)
        return self._choice(found, left_s, why)

    def _pretrained(self, left_s: float) -> tuple[_Candidate, list[str]]:
        """The space `photos`, with smaller inputs if it is too slow; `probe` if it still is.

        Raises:
            MissingWeightsError: No network has its weights here.
        """
        found = self._candidate(PHOTOS, quick=True)
        if self._epochs(found, left_s) >= FINE_EPOCHS:
            return self._exactly_timed(found), []
        side = found.space.baseline.model.input_size
        if side is not None and "model.input_size" not in _names(self._given):
            smaller = found.resized(INPUT_SIDE)
            if self._epochs(smaller, left_s) >= FINE_EPOCHS:
                return self._exactly_timed(smaller), [f"inputs of {INPUT_SIDE}²: larger ones are too slow here"]
        why = f"no fine-tuning: {count(FINE_EPOCHS, 'epoch')} of it do not fit, the features of frozen networks do"
        return self._candidate(PROBE), [why]

    def _spaces(self) -> Iterator[str]:
        """The spaces to try in order; the last one is taken."""
        if self._options.space is not None:
            yield self._options.space
            return
        if self._builtin:
            own = [entry.name for entry in list_spaces() if entry.kind == "space" and self._is_of(entry.name)]
            yield from own[:1]
            if own and self._options.data == "digits":
                return
        elif self._side >= LARGE_SIDE:
            yield LARGE
        yield SCRATCH

    def _settings(self, name: str) -> tuple[str, ...]:
        """The settings of the command line, and the built-in set that the space does not name itself."""
        other = self._builtin and not self._is_of(name)
        return (*([f"data.name={self._options.data}"] if other else []), *self._given)

    def _is_of(self, name: str) -> bool:
        return load_space(name).baseline.data.name == self._options.data

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """Sizes of some images, before any is resized."""
        config = load_space(SCRATCH, self._settings(SCRATCH)).baseline.data
        found = image_sizes(config, data_path=self.data, data_root=data_root())
        if not found:
            raise UserError(f"{self._options.data}: none of its images that were tried can be read")
        return found

    @property
    def _side(self) -> int:
        """The shorter side of the images; the median if they differ."""
        return int(statistics.median(min(size) for size in self._sizes))

    # A candidate

    def _candidate(self, name: str, *, side: int | None = None, quick: bool = False) -> _Candidate:
        """Load the images for a space, and time its baseline."""
        if name in (PHOTOS, PROBE) and "data.image_size" not in _names(self._given):
            kept = load_space(name).baseline.data.image_size or self._side
            if self._side < kept:  # the network enlarges them
                side = self._side
        elif side is None and self._sizes_itself(name):
            native = len(set(self._sizes)) == 1 and self._side <= MOST_SIDE
            side = None if native else min(self._side, MOST_SIDE)
        try:
            return self._sized(name, side, quick=quick)
        except SizesError:
            if "data.image_size" in _names(self._given):
                raise
            return self._sized(name, min(self._side, MOST_SIDE), quick=quick)

    def _sizes_itself(self, name: str) -> bool:
        """Whether neither the user nor the space gives the images a size."""
        return not self._builtin and load_space(name, self._settings(name)).baseline.data.image_size is None

    def _sized(self, name: str, side: int | None, *, quick: bool) -> _Candidate:
        settings = [*self._settings(name), *([] if side is None else [f"data.image_size={side}"])]
        space, _ = with_weights(load_space(name, settings), None)
        dataset = open_dataset(
            space.baseline.data, self.data, skip_broken=self._options.skip_broken, reporter=self._reporter
        )
        if (
            name == SCRATCH
            and min(dataset.images.shape[-2:]) > STRIDE_SIDE
            and "model.stem_stride" not in _names(settings)
        ):
            settings.append("model.stem_stride=2")
            space = load_space(name, settings)
        splits = folds(dataset, space.baseline.data)
        found = _Candidate(space, name, tuple(settings), dataset, splits, Timed(0.0, 1.0))
        return replace(found, timed=self._timed(found, quick=quick))

    def _exactly_timed(self, found: _Candidate) -> _Candidate:
        """With the time of whole batches: that of few images is up to a third too long."""
        return replace(found, timed=self._timed(found))

    def _timed(self, found: _Candidate, *, quick: bool = False) -> Timed:
        split, folds = found.splits[0], len(found.splits)
        epoch_s = self._epoch_s(found.space.baseline, split, quick=quick)
        probes = [recipe.config for recipe in found.space.recipes if recipe.config.is_probe]
        beside_s = sum(self._epoch_s(probe, split) for probe in probes if has_weights(probe.model.name))
        whole = len(found.dataset.labels) / len(split.train)
        image_s = PASS * epoch_s / len(split.train)
        pass_s = image_s * (found.dataset.n_test + self._to_predict)
        end_s = DECODE_S * self._to_predict + self._slow * (BUNDLE_S + REPORT_S + END_S)
        after_s = end_s + MOST_PASSES * (pass_s + image_s * len(split.val))
        return Timed(epoch_s * folds, whole, beside_s * folds, after_s, end_s, pass_s)

    @property
    def _slow(self) -> float:
        """How much longer work takes since other processes use the processors, by the choice's own time so far."""
        wall_s, cpu_s = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        return min(MOST_SLOW, max(1.0, wall_s / cpu_s)) if cpu_s else 1.0

    def _epoch_s(self, config: TrainConfig, split: Splits, *, quick: bool = False) -> float:
        """Seconds of an epoch, measured once for a configuration; `quick` on a CPU by one step of few images."""
        key = (config.model.model_dump_json(), config.is_probe, tuple(split.images.shape), quick)
        if key not in self._measured:
            small = quick and self._device.type == "cpu"
            timed = config.override({"batch_size": min(TIMED_BATCH, config.batch_size)}) if small else config
            self._measured[key] = seconds_per_epoch(timed, split, device=self._device, steps=1 if small else 3)
        return self._measured[key]

    # A choice

    def at_length(self, choice: Choice, advised: int, left_s: float) -> Choice:
        """Divide the time anew, for trials with the epochs that the length probe advises.

        The refit has no fewer than the space's own.
        """
        plan = divide(left_s, self._chosen.timed, advised)
        assert plan is not None, "there was time for a length probe"
        own = choice.epochs
        settings = [each for each in choice.settings if not each.startswith("epochs=")]
        if plan.epochs != own:
            settings.append(f"epochs={plan.epochs}")
        why = (*choice.why, *plan.left_out)
        return replace(choice, settings=tuple(settings), why=why, plan=plan, epochs=max(own, advised))

    def probes(self, choice: Choice) -> bool:
        """Whether the search has time for a length probe, and its length is not given."""
        training_s = choice.epochs * self._chosen.timed.epoch_s
        return "epochs" not in _names(self._given) and choice.plan.search_s >= MIN_TRAININGS * training_s

    @property
    def baseline(self) -> TrainConfig:
        """Of the chosen space."""
        return self._chosen.space.baseline

    def _epochs(self, found: _Candidate, left_s: float) -> int:
        """Epochs of a trial in these seconds; 0 if not one fits."""
        plan = divide(left_s, found.timed, found.space.baseline.epochs)
        return 0 if plan is None else plan.epochs

    def _smaller(self, found: _Candidate, left_s: float) -> int | None:
        """The largest smaller side with enough epochs of the refit, the time going with the area; None: this size."""
        wanted, timed = found.space.baseline.epochs, found.timed
        plan = divide(left_s, timed, wanted)
        epochs = 0.0 if plan is None else plan.refit_s / (SLOWER * timed.whole * timed.epoch_s)
        sides = [side for side in SMALLER_SIDES if side < found.side]
        if not sides or not self._sizes_itself(found.name) or "epochs" in _names(self._given):
            return None
        enough = ENOUGH_PART * wanted
        if epochs >= enough:
            return None
        return next((side for side in sides if epochs * (found.side / side) ** 2 >= enough), sides[-1])

    def _choice(self, found: _Candidate, left_s: float, why: list[str]) -> tuple[Choice, Dataset, tuple[Splits, ...]]:
        self._chosen = found
        wanted, timed = found.space.baseline.epochs, found.timed
        given = "epochs" in _names(self._given)
        plan = divide(left_s, timed, wanted, fewest_epochs=wanted if given else None)
        if plan is None or (given and plan.epochs < wanted):
            least = least_s(timed, wanted if given else 1)
            what = count(wanted, "epoch") if given else "one epoch"
            minutes = (self._options.time_s - left_s + least) / 60
            raise TimeLimitError(
                f"hpo fit {self._options.data}: {duration(max(left_s, 0))} are left, and a training of {what} with its "
                f"refit takes about {duration(least)}; give --minutes {minutes:.1f} or more"
            )
        settings = found.settings if plan.epochs == wanted else (*found.settings, f"epochs={plan.epochs}")
        lines = [*why, *plan.left_out]
        trials = found.space.trials
        choice = Choice(
            found.name, settings, tuple(lines), plan, trials, timed.whole, wanted, timed.end_s, timed.pass_s
        )
        return choice, found.dataset, found.splits


def _names(settings: tuple[str, ...] | list[str]) -> set[str]:
    return {text.partition("=")[0] for text in settings}
