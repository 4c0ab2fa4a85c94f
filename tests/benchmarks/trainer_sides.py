"""The sides that `bench_trainer.py` compares: one training each by `core.loop`, the bare loop, and the DataLoader.

All train the same network from a `TrainConfig` on the same `Splits`, and tell when each epoch was over. What is
measured in a process of its own runs through `in_fresh_process`, with this module's clocks for time and memory.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import dataloader_loop
import numpy as np
import torch
from bare_loop import train as train_bare
from common import ROOT
from dataloader_loop import Loading
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.augment import Augment
from core.config import TrainConfig
from core.data import Splits
from core.loop import train
from core.loop.step import batch_sizes
from core.models import build_model
from core.runtime import isolated_rng, make_generator, normalize, synchronize
from core.seeds import derive_seed

SCENES = ROOT.parent / "shared" / "data" / "scenes5k.zip"
MIB = 2**20

T = TypeVar("T")

# ---- images


def photographs(count: int, side: int) -> tuple[Tensor, Tensor, str]:
    """(count, 3, side, side) uint8, their classes (count,) int64 in [0, 6), and what they are.

    Real photographs where they are on disk, spread evenly over the archive's training images, else smooth noise.
    """
    if not SCENES.is_file():
        noise = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1)
        return (255 * smooth).to(torch.uint8), torch.arange(count) % 6, "synthetic: 12² noise, enlarged"
    with zipfile.ZipFile(SCENES) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("train/") and n.endswith(".jpg"))
        chosen = [names[i * len(names) // count] for i in range(count)]
        arrays = [_pixels(archive.read(name), side) for name in chosen]
    folders = [name.split("/")[1] for name in chosen]
    order = sorted(set(folders))
    labels = torch.tensor([order.index(folder) for folder in folders])
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return images, labels, f"{SCENES.name}, real photographs"


def _pixels(encoded: bytes, side: int) -> np.ndarray[Any, Any]:
    """(side, side, 3) uint8."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BOX))


def photograph_splits(train_images: int, val_images: int, side: int) -> Splits:
    """So many photographs to train on and to validate on, on the host."""
    images, labels, _ = photographs(train_images + val_images, side)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = images.float() / 255
    return Splits(
        images=images,
        labels=labels,
        train=order[:train_images],
        val=order[train_images:],
        classes=tuple(f"scene {i}" for i in range(6)),
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
    )


def noise_splits(stored: int, train_images: int, val_images: int, side: int) -> Splits:
    """A set of `stored` random images of which few are used, made in place: its memory is that of its pixels."""
    generator = torch.Generator().manual_seed(0)
    return Splits(
        images=torch.randint(256, (stored, 3, side, side), dtype=torch.uint8, generator=generator),
        labels=torch.arange(stored) % 6,
        train=torch.arange(train_images),
        val=torch.arange(train_images, train_images + val_images),
        classes=tuple(f"class {i}" for i in range(6)),
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
    )


# ---- trainings


@dataclass
class Timing:
    """When a training's epochs were over, in seconds from its call, and what it came to."""

    ends: list[float] = field(default_factory=list)
    total: float = 0.0
    """To the call's return: building the network and the optimizer included."""
    losses: tuple[float, ...] = ()
    """Of the last epoch: training loss, and where there are validation images their loss and accuracy."""
    steps: int = 1
    """In an epoch."""

    @property
    def steady(self) -> float:
        """Of all epochs but the first, in which libraries set themselves up and graphs are captured."""
        return self.ends[-1] - self.ends[0]

    @property
    def first_step(self) -> float:
        """To the end of the first step: the first epoch less what its other steps take in a later one.

        So what is captured or tuned in the epoch's second and third step counts as well. Validation is left in.
        """
        later = sorted(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))
        return self.ends[0] - later[len(later) // 2] * (1 - 1 / self.steps)


Side = Callable[[TrainConfig, Splits, torch.device], Timing]


def timed(run: Callable[[Callable[..., None]], tuple[float, ...]], config: TrainConfig, splits: Splits) -> Timing:
    """Calls `run` with what it calls at each epoch's end, and returns its times. A training ends with a wait for the
    device on each side: it reads its loss."""
    steps = -(-len(splits.train) // config.batch_size)
    started = time.perf_counter()
    timing = Timing(steps=steps)
    timing.losses = run(lambda *_: timing.ends.append(time.perf_counter() - started))
    timing.total = time.perf_counter() - started
    return timing


def run_core(config: TrainConfig, splits: Splits, device: torch.device) -> Timing:
    """Ours; the data set is taken to the device first, as by the bare loop."""

    def run(on_epoch_end: Callable[..., None]) -> tuple[float, ...]:
        last = train(config, splits.to(device), device=device, on_epoch_end=on_epoch_end).history[-1]
        return (last.train_loss, *(() if last.raw is None else (last.raw.loss, last.raw.accuracy)))

    synchronize(device)
    return timed(run, config, splits)


class DrawnByEpoch:
    """Augments one batch after the other, with the random numbers that `core.loop` draws for an epoch."""

    def __init__(self, config: TrainConfig, splits: Splits, device: torch.device) -> None:
        self._augment = Augment(config.augment, splits.mean, splits.std, device)
        self._sizes = batch_sizes(len(splits.train), config.batch_size)
        self._generator: torch.Generator | None = None

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if generator is not self._generator:  # a new epoch
            self._generator, self._batch = generator, 0
            self._draws = self._augment.draw(self._sizes, images.shape[1:], generator)
        self._batch += 1
        return self._augment.apply(images, self._draws[self._batch - 1])


def run_bare(config: TrainConfig, splits: Splits, device: torch.device) -> Timing:
    """(a): the same network, augmentation and draws; there must be validation images."""

    def run(on_epoch_end: Callable[..., None]) -> tuple[float, ...]:
        on_device = splits.to(device)
        with isolated_rng(device):
            return train_bare(
                _network(config, splits),
                on_device.images,
                on_device.labels,
                on_device.train,
                on_device.val,
                augment=DrawnByEpoch(config, splits, device),
                prepare=partial(normalize, mean=splits.mean, std=splits.std),
                generator=lambda epoch: make_generator(device, config.seed, "epoch", epoch),
                bf16=device.type == "cuda",
                on_epoch_end=on_epoch_end,
                **_recipe(config),
            )

    synchronize(device)
    return timed(run, config, splits)


def run_dataloader(config: TrainConfig, splits: Splits, device: torch.device, loading: Loading) -> Timing:
    """(b): the same network and operations, by a DataLoader; there is no validation."""
    side = splits.images.shape[-1]
    transform = dataloader_loop.transforms(
        side,
        crop_pad=int(config.augment.crop_pad_fraction * side + 0.5),
        ops=config.augment.ops,
        magnitude=round(30 * config.augment.strength),  # of the 31 steps of torchvision's scale
        pil=loading.pil,
    )

    def run(on_epoch_end: Callable[..., None]) -> tuple[float, ...]:
        with isolated_rng(device), fastest_convolutions(device):
            loss = dataloader_loop.train(
                _network(config, splits),
                splits.images[splits.train],
                splits.labels[splits.train],
                transform,
                loading,
                device=device,
                mean=splits.mean,
                std=splits.std,
                erase=config.augment.erase,
                on_epoch_end=on_epoch_end,
                **_recipe(config),
            )
        return (loss,)

    synchronize(device)
    return timed(run, config, splits)


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The fields that the two plain loops know."""
    return {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.optim.peak_lr(config.batch_size),
        "decay": config.optim.weight_decay,
        "warmup": config.schedule.warmup_fraction,
        "warmup_start": config.schedule.warmup_start,
        "smoothing": config.loss.smoothing,
    }


def _network(config: TrainConfig, splits: Splits) -> nn.Module:
    """The configuration's network, with the weights that `core.loop` draws."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    _, channels, height, width = splits.images.shape
    return build_model(config.model, num_classes=len(splits.classes), in_channels=channels, image_size=(height, width))


@contextlib.contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Lets cuDNN try its algorithms, as both references do."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def flops_an_image(config: TrainConfig, splits: Splits) -> int:
    """Floating-point operations of one image's forward and backward pass, matrix products and convolutions alone.

    A multiplication and an addition are two. Counted by torch on tensors without memory.
    """
    with isolated_rng(torch.device("cpu")):
        model = _network(config, splits).to("meta")
    images = torch.empty(2, *splits.images.shape[1:], device="meta")  # two: batch norm needs them
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return int(counter.get_total_flops()) // 2


# ---- processes and their memory


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function of a module in a process that has done nothing yet, with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments).result()


def resident() -> int:
    """The bytes of this process in memory now; where there is no /proc, the most there were."""
    return _status("VmRSS") or _peak_of_usage()


def peak_resident() -> int:
    """The most bytes of this process in memory so far.

    Linux tells it of this very program; `ru_maxrss` begins there with what the parent held when it forked.
    """
    return _status("VmHWM") or _peak_of_usage()


def _status(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _peak_of_usage() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
