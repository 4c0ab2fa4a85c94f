"""What the trainer is worth on the device at hand: speed, memory and start-up against what people use otherwise.

    uv run --group bench python tests/benchmarks/bench_trainer.py [--only loop,memory] [--json PATH]

The sides of a comparison take turns in an order that alternates, so that whatever else the machine does falls on all of
them; a ratio is the median over pairs that ran side by side. Every promise gets a line with its number, held or not.
Promises about two CPU cores are judged on a CPU, and those about an H200 on an H200; elsewhere the numbers stand alone.

augment     Crop with padding, flip, RandAugment(2, 9), normalisation, erasing, from uint8, of 96² photographs: ours;
            torchvision v2 image by image, of tensors and of PIL images, on the CPU as a DataLoader's worker does it;
            torchvision v2 on the whole batch, where all images get one draw; and kornia, with an operation an image, as
            ours, and with its own RandAugment, which has one for the whole batch.
loop        `core.loop.train` over `bare_loop.py`, whose steps are bitwise the same: on a CPU, so are the losses.
            There, seconds are those of whole calls; on a GPU, of all epochs but the first, which captures graphs.
dataloader  `core.loop.train` over `dataloader_loop.py`, images/s of all epochs but the first, without validation. Its
            number of workers and the kind of its images are those that were fastest when tried beforehand.
memory      The most memory of a training in a fresh process: on a CPU what the process holds above what it held after
            its imports, on CUDA what torch's allocator gave out. That of ours may be the data set's bytes plus 1.5
            times what the bare loop holds beside the data set.
trials      Many small trainings in one process, each with a bare one and one that its callback prunes beside it. The
            first fifth is warm-up. Seconds (as a ratio to the bare one's) of the last quarter over the first quarter's,
            at most 1.10; growth of the process by least squares, at most 0.1 MiB a training; on CUDA, growth of what
            torch has allocated, at most 0.01 MiB a training.
startup     Seconds from the call in a fresh process, whose imports are done, to the end of the first step: the first
            epoch less what its other steps take later, so that capturing graphs counts. Then the same in the same
            process once more. The first one sets the device up, and takes the data set there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from common import cores, finish, machine, parser, positive, quarters, table
from dataloader_loop import Loading
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image
from trainer_sides import (
    MIB,
    Side,
    Timing,
    flops_an_image,
    in_fresh_process,
    noise_splits,
    peak_resident,
    photograph_splits,
    photographs,
    resident,
    run_bare,
    run_core,
    run_dataloader,
)

from core.augment import Augment
from core.config import AugmentConfig, TrainConfig
from core.data import Splits, load_dataset, split
from core.errors import UserError
from core.loop import train
from core.runtime import select_device, synchronize

FULL = {"augment.ops": 2, "augment.strength": 9 / 30, "augment.erase": 0.25}  # beside the default crop and flip
BASE = TrainConfig().override({"optim.name": "adamw", "loss.smoothing": 0.1})
SIDES: dict[str, Side] = {"core.loop": run_core, "bare loop": run_bare}

# What issue 4 promises. An H200's are images/s of ResNet-18 (3×3 stem, no max-pool) by (side, batch size), and how many
# times the DataLoader's by side.
OVER_TORCHVISION, OVER_KORNIA = 3.0, 4.0
OVER_BARE = 1.03
MEMORY_FACTOR = 1.5
H200_RATES = {(96, 256): 12_600.0, (96, 64): 0.7 * 12_600, (96, 32): 0.7 * 12_600, (32, 256): 100_000.0}
H200_OVER_DATALOADER = {96: 5.0, 32: 10.0}
H200_STARTUP_S = 3.0
# What "flat" means: see `trials` above. 0.1 MiB is 20 MiB in a search of 200 trials.
FLAT_SECONDS, FLAT_MIB, FLAT_DEVICE_MIB = 1.10, 0.1, 0.01

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the sections share."""

    device: torch.device
    repeats: int
    quick: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def h200(self) -> bool:
        return self.cuda and "H200" in torch.cuda.get_device_name(self.device)

    @property
    def few(self) -> int:
        """Repeats of what takes seconds and hardly varies."""
        return max(2, self.repeats // 3)

    @property
    def processes(self) -> int:
        """Fresh processes of each side."""
        return max(1, self.repeats // 5)

    def size(self, usual: int, quick: int) -> int:
        return quick if self.quick else usual


@dataclass(frozen=True)
class Verdict:
    """A promise, and what was measured."""

    promise: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        said, word = "held" if self.held else "NOT held", "at least" if self.at_least else "at most"
        value, limit = (f"{n:,.0f}" if n >= 1000 else f"{n:.4g}" for n in (self.value, self.limit))
        return f"- {said}: {self.promise}: {value} ({word} {limit})"


@dataclass
class Section:
    """What a section found."""

    about: str
    table: str
    verdicts: list[Verdict] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)


def in_turns(sides: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each side returned, turn by turn; the order alternates, and no side's garbage falls into another's turn."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in sides if repeat % 2 == 0 else reversed(sides):
            gc.collect()
            found[name].append(sides[name]())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def columns(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows that all have the same columns."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def resnet18(batch_size: int, epochs: int) -> TrainConfig:
    """The network of the GPU's promises, with full augmentation."""
    return BASE.override({**FULL, "batch_size": batch_size, "epochs": epochs})


def narrow(widths: tuple[int, ...], batch_size: int, epochs: int, **fields: Any) -> TrainConfig:
    """A network for two CPU cores: a residual block a stage."""
    shape = {"model.widths": widths, "model.blocks": (1,) * len(widths)}
    return BASE.override({**shape, "batch_size": batch_size, "epochs": epochs, **fields})


# ---- augment

PAD = 12
BATCHES_A_TURN = 14
"""An epoch of scenes5k's. What kornia's own RandAugment takes depends on the pair of operations that a batch draws."""
MEAN, STD = (0.45, 0.46, 0.42), (0.25, 0.25, 0.28)  # of scenes5k, rounded


def measure_augment(settings: Settings) -> Section:
    device, count = settings.device, settings.size(256, 32)
    images, _, source = photographs(count, 96)
    on_device = images.to(device)
    pictures = [to_pil_image(image) for image in images]
    ours = Augment(AugmentConfig(ops=2, strength=9 / 30, erase=0.25), MEAN, STD, device)
    generator = torch.Generator(device).manual_seed(0)
    theirs, theirs_pil = torchvision_transform(pil=False), torchvision_transform(pil=True)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(on_device, generator),
        "torchvision v2, image by image, tensors": lambda: torch.stack([theirs(image) for image in images]),
        "torchvision v2, image by image, PIL": lambda: torch.stack([theirs_pil(picture) for picture in pictures]),
        "torchvision v2, whole batch, one draw": lambda: theirs(on_device),
    }
    missing = ""
    theirs_by_policy = kornia_transforms(device)
    if theirs_by_policy is None:
        missing = "; kornia is not installed, so its side is skipped: uv run --group bench …"
    else:
        sides |= {f"kornia, {policy}": lambda f=f: f(on_device.float() / 255) for policy, f in theirs_by_policy.items()}
    torch.manual_seed(0)
    calls = settings.size(BATCHES_A_TURN, 2)
    # Each ends with what a network takes at its best.
    ends = {name: lambda run=run: run().contiguous(memory_format=torch.channels_last) for name, run in sides.items()}
    turns = {name: lambda run=run: steady(run, device, calls) for name, run in ends.items()}
    taken = in_turns(turns, settings.repeats)
    over = {name: ratios(values, taken["ours"]) for name, values in taken.items()}
    rows = [
        {
            "side": name,
            "images/s": quarters([count / s for s in values], 0),
            "ours is faster by": "" if name == "ours" else quarters(over[name], 2),
        }
        for name, values in taken.items()
    ]
    section = Section(
        f"{calls} batches a turn of {count} images of 96²×3 ({source}), crop with padding {PAD}, flip, "
        f"RandAugment(2, 9), normalise, erase 0.25{missing}",
        columns(rows),
        measured={"seconds": taken, "images": count, "source": source},
    )
    if not settings.cuda:
        for name in taken:
            if "image by image" in name or "kornia" in name:
                limit = OVER_KORNIA if "kornia" in name else OVER_TORCHVISION
                promise = f"augmentation over {name}, times"
                section.verdicts.append(Verdict(promise, statistics.median(over[name]), limit, at_least=True))
    return section


def torchvision_transform(*, pil: bool) -> v2.Compose:
    """The same operations in torchvision's own words, for one image, or for a batch that shares its draw."""
    return v2.Compose(
        [
            v2.RandomCrop(96, padding=PAD),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR),
            *([v2.ToImage()] if pil else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.25),
        ]
    )


def kornia_transforms(device: torch.device) -> dict[str, nn.Module] | None:
    """The same in kornia's, of floats in [0, 1]; None where it is not installed.

    Its own RandAugment draws one pair of operations for all images of a batch. An operation an image is, in its words,
    every operation with a probability: one in fourteen, twice over.
    """
    try:
        import kornia.augmentation as K
        from kornia.augmentation.auto import RandAugment
    except ImportError:
        return None

    def operations() -> list[nn.Module]:
        """Thirteen of RandAugment's fourteen, the identity left out, at magnitude 9 of 30."""
        change = (1 - 0.27, 1 + 0.27)
        return [
            K.RandomShear((-5.2, 5.2, 0.0, 0.0), p=1 / 14),  # degrees: 0.09 is the slope
            K.RandomShear((0.0, 0.0, -5.2, 5.2), p=1 / 14),
            K.RandomTranslate((-0.136, 0.136), None, p=1 / 14),
            K.RandomTranslate(None, (-0.136, 0.136), p=1 / 14),
            K.RandomRotation(9.0, p=1 / 14),
            K.RandomBrightness(change, p=1 / 14),
            K.RandomSaturation(change, p=1 / 14),
            K.RandomContrast(change, p=1 / 14),
            K.RandomSharpness(0.27, p=1 / 14),
            K.RandomPosterize((7, 7), p=1 / 14),
            K.RandomSolarize(0.3, 0.0, p=1 / 14),
            K.RandomAutoContrast(p=1 / 14),
            K.RandomEqualize(p=1 / 14),
        ]

    policies = {
        "an operation an image": [*operations(), *operations()],
        "an operation a batch": [RandAugment(n=2, m=9)],
    }
    return {
        policy: nn.Sequential(
            K.RandomCrop((96, 96), padding=PAD, cropping_mode="slice", same_on_batch=False),
            K.RandomHorizontalFlip(same_on_batch=False),
            *modules,
            K.Normalize(torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)),
            K.RandomErasing(p=0.25, same_on_batch=False),
        ).to(device)
        for policy, modules in policies.items()
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def steady(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of a call among others like it, as in a training: the first one of a turn takes its memory anew."""
    run()
    return sum(seconds(run, device) for _ in range(calls)) / calls


# ---- loop


@dataclass(frozen=True)
class Case:
    """A training that both loops make."""

    name: str
    config: TrainConfig
    splits: Splits
    target: float | None = None
    """Images/s that are promised on an H200."""
    turns: int = 1
    """How many times as often as asked for it is repeated: a short one tells little at a time."""


def loop_cases(settings: Settings) -> Iterator[Case]:
    """Overhead shows in small steps; large ones are what people train."""
    if settings.cuda:
        for side in (96, 32):
            splits = photograph_splits(settings.size(4864, 1024), 64, side).to(settings.device)
            for batch_size in (256, 64, 32):
                config = resnet18(batch_size, epochs=10 if batch_size == 256 and not settings.quick else 4)
                name = f"ResNet-18, {side}², batch {batch_size}"
                yield Case(name, config, splits, H200_RATES.get((side, batch_size)))
        return
    digits = split(load_dataset(BASE.data), BASE.data)
    if settings.quick:
        digits = replace(digits, train=digits.train[:256], val=digits.val[:64])
    yield Case("digits, widths 16-32, batch 64", narrow((16, 32), 64, epochs=2), digits, turns=4)
    yield Case("digits, widths 64-128, batch 128", narrow((64, 128), 128, epochs=2), digits, turns=2)
    photos = photograph_splits(settings.size(128, 64), 64, 96)
    yield Case("96², widths 8-16-32, batch 64", narrow((8, 16, 32), 64, 2, **FULL), photos)


def measure_loop(settings: Settings) -> Section:
    rows: list[dict[str, str]] = []
    section = Section("", "")
    for case in loop_cases(settings):
        runs = trained_in_turns(case, SIDES, settings, settings.few if settings.cuda else case.turns * settings.repeats)
        core, bare = ([taken(run, settings) for run in runs[name]] for name in SIDES)
        shown = len(case.splits.train) * (case.config.epochs - (1 if settings.cuda else 0))
        rates = {"core": [shown / s for s in core], "bare": [shown / s for s in bare]}
        flops = flops_an_image(case.config, case.splits)
        rate, ratio = statistics.median(rates["core"]), ratios(core, bare)
        losses = [runs[name][-1].losses[0] for name in SIDES]
        row = {
            "case": case.name,
            "core.loop, s": quarters(core, 3),
            "bare loop, s": quarters(bare, 3),
            "ratio": quarters(ratio, 3),
            "core.loop, images/s": quarters(rates["core"], 0),
            "bare loop, images/s": quarters(rates["bare"], 0),
            "TFLOP/s": f"{rate * flops / 1e12:.3g}",
        }
        if settings.cuda:
            row["share of the H200's target"] = "" if case.target is None else f"{rate / case.target:.1%}"
        rows.append(row | {"training losses": " / ".join(f"{loss:.6f}" for loss in losses)})
        if not settings.cuda:
            section.verdicts += [
                Verdict(f"core.loop over the bare loop, {case.name}", statistics.median(ratio), OVER_BARE),
                Verdict(f"difference of their training losses, {case.name}", abs(losses[0] - losses[1]), 0.0),
            ]
        elif settings.h200 and case.target is not None:
            section.verdicts.append(Verdict(f"images/s, {case.name}", rate, case.target, at_least=True))
        section.measured[case.name] = {
            "runs": {name: [asdict(run) for run in found] for name, found in runs.items()},
            "ratios": ratio,
            "images_per_s": rates,
            "flops_an_image": flops,
            "config": case.config.model_dump(),
        }
    section.about = "all epochs but the first" if settings.cuda else "whole calls"
    section.table = columns(rows)
    return section


def trained_in_turns(case: Case, sides: dict[str, Side], settings: Settings, repeats: int) -> dict[str, list[Timing]]:
    """The trainings of each side, after one of each that does not count."""
    calls = {name: lambda side=side: side(case.config, case.splits, settings.device) for name, side in sides.items()}
    for call in calls.values():
        call()
    return in_turns(calls, repeats)


def taken(run: Timing, settings: Settings) -> float:
    """The seconds that count, by this module's docstring."""
    return run.steady if settings.cuda else run.total


# ---- dataloader


def dataloader_cases(settings: Settings) -> Iterator[Case]:
    """On a CPU the networks are so small that loading is not lost beside them."""
    for side, photos, stem_stride in ((96, 512, 2), (32, 1024, 1)):
        if settings.cuda:
            splits = photograph_splits(settings.size(4864, 1024), 0, side)
            yield Case(f"ResNet-18, {side}², batch 256", resnet18(256, epochs=6), splits)
        else:
            splits = photograph_splits(settings.size(photos, 128), 0, side)
            config = narrow((8, 16), 64, 3, **FULL, **{"model.stem_stride": stem_stride})
            yield Case(f"{side}², widths 8-16, stem of stride {stem_stride}, batch 64", config, splits)


def measure_dataloader(settings: Settings) -> Section:
    rows: list[dict[str, str]] = []
    section = Section("without validation, all epochs but the first", "")
    workers = sorted({min(8, cores()), min(16, cores())} if settings.cuda else {0, cores()})
    for case in dataloader_cases(settings):
        shown = len(case.splits.train) * (case.config.epochs - 1)
        choices = [Loading(count, pil) for count in workers for pil in (True, False)]
        tried = {choice: run_dataloader(case.config, case.splits, settings.device, choice).steady for choice in choices}
        fastest = min(tried, key=lambda choice: tried[choice])
        sides: dict[str, Side] = {"core.loop": run_core, "DataLoader": partial(run_dataloader, loading=fastest)}
        runs = trained_in_turns(case, sides, settings, settings.few)
        rates = {name: [shown / run.steady for run in found] for name, found in runs.items()}
        over = ratios(rates["core.loop"], rates["DataLoader"])
        row = {"case": case.name} | {f"{name}, images/s": quarters(found, 0) for name, found in rates.items()}
        rows.append(row | {"ours over it": quarters(over, 2), "its loading": str(fastest)})
        if settings.h200:
            limit = H200_OVER_DATALOADER[case.splits.images.shape[-1]]
            promise = f"core.loop over the DataLoader, {case.name}, times"
            section.verdicts.append(Verdict(promise, statistics.median(over), limit, at_least=True))
        section.measured[case.name] = {
            "images_per_s": rates,
            "ratios": over,
            "tried_images_per_s": {str(choice): shown / steady for choice, steady in tried.items()},
            "config": case.config.model_dump(),
        }
    section.table = columns(rows)
    return section


# ---- memory


def memory_of(side: str, device: torch.device, quick: bool) -> dict[str, int]:
    """Bytes of one training in this process, which has done nothing else yet."""
    imported = resident()
    if device.type == "cuda":
        config, splits = resnet18(256, epochs=4), noise_splits(5000, 1024, 256, 96).to(device)
    else:
        config, splits = narrow((16, 32, 64), 64, 2, **FULL), noise_splits(1000, 64 if quick else 128, 64, 96)
    data = sum(tensor.nbytes for tensor in (splits.images, splits.labels))
    SIDES[side](config, splits, device)
    if device.type == "cuda":
        return {
            "data": data,
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return {"data": data, "peak": peak_resident() - imported}


def measure_memory(settings: Settings) -> Section:
    calls = {
        name: lambda name=name: in_fresh_process(memory_of, name, settings.device, settings.quick) for name in SIDES
    }
    found = in_turns(calls, settings.processes)
    data = found["core.loop"][0]["data"]
    peaks = {name: [one["peak"] / MIB for one in all_of] for name, all_of in found.items()}
    rows = []
    for name, all_of in found.items():
        row = {
            "side": name,
            "peak, MiB": quarters(peaks[name], 0),
            "beside the data set, MiB": quarters([peak - data / MIB for peak in peaks[name]], 0),
        }
        if settings.cuda:
            row["reserved by torch, MiB"] = quarters([one["reserved"] / MIB for one in all_of], 0)
        rows.append(row)
    allowed = data / MIB + MEMORY_FACTOR * (statistics.median(peaks["bare loop"]) - data / MIB)
    network = "ResNet-18, batch 256" if settings.cuda else "widths 16-32-64, batch 64"
    return Section(
        f"{network}, 96², a data set of {data / MIB:.0f} MiB, fresh processes",
        columns(rows),
        [Verdict("peak memory of core.loop, MiB", statistics.median(peaks["core.loop"]), allowed)],
        {"bytes": found},
    )


# ---- trials


class Pruned(Exception):  # noqa: N818 - no error
    """What a callback raises to end a training."""


def many_trainings(count: int, device: torch.device) -> list[dict[str, float]]:
    """So many trainings in this process: seconds of ours and of the bare loop's, and bytes held after each."""
    config = narrow((16, 32), 64, epochs=2)
    splits = split(load_dataset(config.data), config.data)
    splits = replace(splits, train=splits.train[:512], val=splits.val[:128]).to(device)
    rows = []

    def prune(_: object) -> None:
        raise Pruned

    for trial in range(count):
        one = config.override({"seed": trial, "optim.lr_scale": 1 + trial / count})
        row = {}
        for name in SIDES if trial % 2 == 0 else reversed(SIDES):
            row[name] = SIDES[name](one, splits, device).total
        with contextlib.suppress(Pruned):
            train(one, splits, device=device, on_epoch_end=prune)
        row["resident"] = resident()
        row["allocated"] = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        rows.append(row)
    return rows


def measure_trials(settings: Settings) -> Section:
    count = settings.size(100, 20)
    found = in_fresh_process(many_trainings, count, settings.device)
    counted = found[count // 5 :]
    quarter = len(counted) // 4
    first, last = counted[:quarter], counted[-quarter:]

    def median(rows: Sequence[dict[str, float]], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    over_bare = [statistics.median(row["core.loop"] / row["bare loop"] for row in rows) for rows in (first, last)]
    growth = {
        name: float(np.polyfit(np.arange(len(counted)), [row[name] / MIB for row in counted], 1)[0])
        for name in ("resident", "allocated")
    }
    rows = []
    for name, part, ratio in (("first quarter", first, over_bare[0]), ("last quarter", last, over_bare[1])):
        row = {"trainings": name} | {f"{side}, ms": f"{1000 * median(part, side):.1f}" for side in SIDES}
        row |= {"core.loop / bare loop": f"{ratio:.3f}", "process, MiB": f"{median(part, 'resident') / MIB:.1f}"}
        if settings.cuda:
            row["allocated, MiB"] = f"{median(part, 'allocated') / MIB:.2f}"
        rows.append(row)
    verdicts = [
        Verdict("seconds of a training, last quarter over first", over_bare[1] / over_bare[0], FLAT_SECONDS),
        Verdict("growth of the process, MiB a training", growth["resident"], FLAT_MIB),
    ]
    if settings.cuda:
        verdicts.append(Verdict("growth of what torch allocated, MiB a training", growth["allocated"], FLAT_DEVICE_MIB))
    about = f"{count} trainings in one process, the first {count // 5} are warm-up; a quarter is {quarter}"
    return Section(about, columns(rows), verdicts, {"trainings": found, "growth_mib": growth})


# ---- startup


def first_steps_of(side: str, device: torch.device) -> tuple[float, float]:
    """Seconds to the end of the first step, of the first and of the second training in this process."""
    if device.type == "cuda":
        config, splits = resnet18(256, epochs=4), noise_splits(5000, 1024, 256, 96)
    else:
        config, splits = narrow((8, 16, 32), 64, 4, **FULL), noise_splits(500, 128, 64, 96)
    first, second = (SIDES[side](config, splits, device).first_step for _ in range(2))
    return first, second


def measure_startup(settings: Settings) -> Section:
    calls = {name: lambda name=name: in_fresh_process(first_steps_of, name, settings.device) for name in SIDES}
    found = in_turns(calls, settings.processes)
    rows = []
    for name, both in found.items():
        first, second = (quarters(times, 3) for times in zip(*both, strict=True))
        rows.append({"side": name, "first training, s": first, "second training, s": second})
    section = Section(
        f"{'ResNet-18, batch 256' if settings.cuda else 'widths 8-16-32, batch 64'}, 96², fresh processes",
        columns(rows),
        measured={"seconds": found},
    )
    if settings.h200:
        to_first = statistics.median(times[0] for times in found["core.loop"])
        section.verdicts.append(Verdict("seconds to the first step", to_first, H200_STARTUP_S))
    return section


# ---- the command

SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "augment": measure_augment,
    "loop": measure_loop,
    "dataloader": measure_dataloader,
    "memory": measure_memory,
    "trials": measure_trials,
    "startup": measure_startup,
}


def sections(text: str) -> list[str]:
    """Names of sections with commas between, for argparse."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return chosen


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The sections as they stand above, and the options with their defaults."""


def main() -> None:
    options = parser(__doc__)
    options.formatter_class = Help
    options.set_defaults(repeats=15)
    options.add_argument("--only", type=sections, default=list(SECTIONS), help="sections, with commas between")
    options.add_argument("--device", help="cpu, cuda or cuda:N; the first GPU where there is one")
    options.add_argument("--threads", type=positive, help="torch's threads; its own choice where left out")
    options.add_argument("--quick", action="store_true", help="small sizes and 3 repeats: to see that it runs")
    arguments = options.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        device = select_device(arguments.device)
    except UserError as error:
        options.error(str(error))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    settings = Settings(device, min(arguments.repeats, 3) if arguments.quick else arguments.repeats, arguments.quick)
    described = machine()
    found: dict[str, Section] = {}
    failed: dict[str, str] = {}
    for name in arguments.only:
        print(f"\n### {name}", flush=True)
        try:
            section = found[name] = SECTIONS[name](settings)
        except Exception:  # the other sections' numbers are not to be lost
            failed[name] = traceback.format_exc()
            print(f"\nFAILED\n\n{failed[name]}", flush=True)
            continue
        print(f"\n{section.about}\n\n{section.table}\n", flush=True)
        for verdict in section.verdicts:
            print(verdict, flush=True)
    finish(
        "trainer",
        arguments.json,
        described,
        device=str(device),
        repeats=settings.repeats,
        quick=settings.quick,
        verdicts=[asdict(v) | {"held": v.held} for section in found.values() for v in section.verdicts],
        sections={name: asdict(section) for name, section in found.items()},
        failed=failed,
    )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
