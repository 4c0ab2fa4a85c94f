"""First run on a GPU: what works, and how fast, within ten minutes.

    python tests/benchmarks/gpu_first.py --out gpu.md

Needs torch, timm, numpy, scipy, scikit-learn, Pillow, pydantic and no network. Parts, in order:

faults      Each configuration kernel by kernel, as CUDA graphs, and streamed from the host: the last training loss, or
            the first line of the error. Then failures on purpose, and the memory of 20 trainings.
speed       Milliseconds of each part of a step, images/s beside the prediction of `roofline.py`, and the DataLoader.
compiled    Each configuration with `precision.compile`, of the whole network and of its blocks.
tests       `pytest -m gpu`, if pytest is installed.

Each part runs in a process of its own, which is replaced if a failure leaves it unable to train. Every line is printed
and appended to `--out` as soon as it is known. README.md in this folder explains how to read them. On a CPU the sizes
are small, and graphs are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import ROOT, machine
from dataloader_loop import Loading
from roofline import H200, RESNET18, Device, predict
from trainer_sides import MIB, noise_splits, resident, run_core, run_dataloader

import core.loop.run
from core.config import TrainConfig
from core.data import Splits
from core.errors import GraphError
from core.loop import Execution, train
from core.loop.profile import measured_peak_flops, profile
from core.models import compilation
from core.runtime import clock, select_device
from tests.core.trainings import CASES

DEVICE = select_device()
CUDA = DEVICE.type == "cuda"
if not CUDA:
    torch.set_num_threads(1)  # more wait for each other where other processes are busy

# Of the time that is left when a part begins; the rest is for the parts after it.
SHARES = {"faults": 0.4, "speed": 0.5, "compiled": 0.5, "tests": 1.0}
RESTART = 3  # exit status of a process that cannot train any more
DIFFERENT = 0.03  # relative difference of losses: atomic sums and bf16 diverge slowly, a frozen value by far more
TRAININGS = 20

SMALL = {
    "epochs": 6 if CUDA else 2,
    "batch_size": 100 if CUDA else 60,
    "model.widths": (16, 32),
    "model.blocks": (1, 1),
    "optim.lr_scale": 4.0,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **CASES,
    "muon, ema, clipped": {"optim.name": "muon", "averaging.name": "ema", "optim.grad_clip": 0.5},
    "trivialaugment, erased": {"augment.policy": "trivialaugment", "augment.erase": 0.5},
    "six, jitter": {"augment.policy": "six", "augment.ops": 2, "augment.color_jitter": 0.3},
    "crops by area": {"augment.crop_area_min": 0.4},
    "bce, weighted": {"loss.name": "bce", "loss.class_weights": "inverse", "loss.smoothing": 0.1},
    "cross-entropy, weighted, smoothed": {"loss.class_weights": "inverse", "loss.smoothing": 0.1},
    "logits adjusted": {"loss.logit_adjustment": 1.0},
    "group norm, se, mish": {"model.norm": "group", "model.se": True, "model.activation": "mish"},
    "bottleneck, blur, max-pool": {"model.block": "bottleneck", "model.anti_alias": True, "model.max_pool": True},
    "vgg": {"model.name": "vgg", "model.hidden": 64},
    "float32": {"precision.autocast": "off"},
}

Row = Callable[[], Sequence[str]]
"""Measures the cells after the name."""


# ---- faults


def blobs(count: int, side: int, val: int) -> Splits:
    """Ten classes that a small network learns: a pattern each, with noise."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count + val) % 10
    coarse = torch.rand(10, 3, 6, 6, generator=draws)[labels] + 0.3 * torch.rand(count + val, 3, 6, 6, generator=draws)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").clamp(0, 1)
    noise = noise_splits(1, 1, 0, side)
    return replace(
        noise,
        images=(255 * images).to(torch.uint8),
        labels=labels,
        train=torch.arange(count),
        val=torch.arange(count, count + val),
        classes=tuple(map(str, range(10))),
    )


@cache
def learnable(device: torch.device) -> Splits:
    return (blobs(1050, 32, 250) if CUDA else blobs(130, 16, 30)).to(device)


def small(change: dict[str, Any]) -> TrainConfig:
    return TrainConfig().override(SMALL | change)


def loss(config: TrainConfig, *, streamed: bool = False) -> float:
    """The last training loss."""
    splits = learnable(torch.device("cpu") if streamed else DEVICE)
    return train(config, splits, device=DEVICE, execution=Execution(streamed=streamed)).history[-1].train_loss


class Warnings(logging.Handler):
    """Collects the warnings of `core`, such as that a step cannot be captured."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        logging.getLogger("core").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def take(self) -> list[str]:
        """Return the warnings since the last call."""
        taken, self.found = self.found, []
        return taken


WARNINGS = Warnings()


def compared(trainings: dict[str, Callable[[], float]]) -> list[str]:
    """Cells: verdict, the losses, seconds, the errors and warnings."""
    started = time.perf_counter()
    cells: list[str] = []
    errors: list[str] = []
    warnings: list[str] = []
    losses: list[float] = []
    for how, training in trainings.items():
        try:
            losses.append(training())
            cells.append(f"{losses[-1]:.4f}")
        except Exception as error:
            cells.append("failed")
            errors.append(f"{how}: {first_line(error)}")
        warnings += [f"{how}: {text}" for text in WARNINGS.take()]
    if errors:
        errors.append(recovery(errors))
    differs = len(losses) > 1 and max(losses) > (1 + DIFFERENT) * min(losses) + 1e-3
    verdict = "FAILED" if errors else "DIFFERS" if differs else "WARNS" if warnings else "ok"
    return [verdict, *cells, f"{time.perf_counter() - started:.1f}", "; ".join([*errors, *warnings])]


def first_line(error: BaseException) -> str:
    places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT / "core"))]
    where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}{where}"


class CannotTrainError(Exception):
    """This process has to be replaced; the message is the error cell of its last row."""

    def __init__(self, message: str, verdict: str = "FAILED") -> None:
        super().__init__(message)
        self.verdict = verdict


def recovery(errors: Sequence[str]) -> str:
    """Train the default after these errors; raises CannotTrainError if that fails too."""
    try:
        return f"afterwards the process trains ({loss(small({})):.4f})"
    except Exception as error:
        after = f"afterwards the process cannot train: {first_line(error)}"
        raise CannotTrainError("; ".join([*errors, after])) from error


def fault(change: dict[str, Any]) -> list[str]:
    config = small(change)
    trainings = {"plain": partial(loss, config.override({"precision.cuda_graphs": False}))}
    if CUDA:
        trainings["graphs"] = partial(loss, config)
    return compared(trainings | {"streamed": partial(loss, config, streamed=True)})


@contextlib.contextmanager
def waiting_network(wait: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Networks that wait for the device in every pass."""
    build = core.loop.run.build_model

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        wait(inputs[0])

    def building(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = build(*args, **kwargs)
        model.register_forward_pre_hook(hook)
        return model

    with mock.patch.object(core.loop.run, "build_model", building):
        yield


def uncapturable(wait: Callable[[torch.Tensor], object]) -> list[str]:
    def training() -> float:
        with waiting_network(wait):
            return loss(small({}))

    return on_purpose(training)


def out_of_memory() -> list[str]:
    """With too little memory for anything but the data and the network."""

    def training() -> float:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(DEVICE)[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MIB) / total, DEVICE)
        try:
            return loss(small({"batch_size": 1000, "model.widths": (512, 512)}))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)

    return on_purpose(training)


def on_purpose(training: Callable[[], float]) -> list[str]:
    """Cells of a training that may fail, if the process can train afterwards, or refuses to with a GraphError."""
    started = time.perf_counter()
    try:
        said = f"trained ({training():.4f})"
    except GraphError as error:  # a search then continues in another process too
        raise CannotTrainError(first_line(error), "ok") from error
    except Exception as error:
        said = first_line(error)
    said = "; ".join([said, *WARNINGS.take()])
    said = "; ".join([said, recovery([said])])
    return ["ok", "", *(["", ""] if CUDA else [""]), f"{time.perf_counter() - started:.1f}", said]


def memory() -> list[str]:
    """Memory after some trainings with graphs, in MiB."""
    started, seen = time.perf_counter(), []
    for turn in range(1, (TRAININGS if CUDA else 3) + 1):
        loss(small({"seed": turn, "averaging.name": "ema", "augment.mixup": 0.4}))
        gc.collect()
        if turn in (1, 2, 3, 10, TRAININGS):
            seen.append((turn, held()))
    growth = [last - first for first, last in zip(seen[1][1], seen[-1][1], strict=True)]
    said = "; ".join(f"{turn}: {', '.join(f'{value / MIB:.1f}' for value in values)}" for turn, values in seen)
    said = f"{'allocated, reserved, used on the device' if CUDA else 'resident'} in MiB after training {said}"
    verdict = "GROWS" if CUDA and growth[0] > 0 else "ok"
    return [verdict, "", *(["", ""] if CUDA else [""]), f"{time.perf_counter() - started:.1f}", said]


def held() -> list[int]:
    if not CUDA:
        return [resident()]
    free, total = torch.cuda.mem_get_info(DEVICE)
    return [torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE), total - free]


# ---- speed

STEPS = 40 if CUDA else 1
SPEEDS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (side, changes to ResNet-18 with RandAugment and EMA)
    "96², batch 256": (96, {"batch_size": 256}),
    "96², batch 64": (96, {"batch_size": 64}),
    "32², batch 256": (32, {"batch_size": 256}),
    "96², batch 256, flip and crop": (96, {"batch_size": 256, "augment.ops": 0}),
    "96², batch 64, muon": (96, {"batch_size": 64, "optim.name": "muon"}),
    "96², batch 256, group norm": (96, {"batch_size": 256, "model.norm": "group"}),
    "96², batch 256, float32": (96, {"batch_size": 256, "precision.autocast": "off"}),
    "96², batch 256, compiled": (96, {"batch_size": 256, "precision.compile": True}),
    "96², batch 256, blocks compiled": (96, {"batch_size": 256, "precision.compile": "auto"}),
}
PARTS = ("augment", "forward", "backward", "optimizer", "averaging", "host")
if not CUDA:
    SPEEDS = {"16², batch 8": (16, {"batch_size": 8, "model.widths": (8, 16), "model.blocks": (1, 1)})}


@cache
def noise(side: int) -> Splits:
    count = {96: 4608, 32: 20480, 16: 64}[side]
    return noise_splits(count + 64, count, 64, side).to(DEVICE)


@cache
def roof() -> Device:
    """An H200's by its data sheet, for the table in README.md; another device's as measured."""
    if CUDA and "H200" in torch.cuda.get_device_name(DEVICE):
        return H200
    return replace(H200, flops=measured_peak_flops(DEVICE, torch.bfloat16), bytes_per_s=measured_bandwidth())


def measured_bandwidth() -> float:
    """Bytes per second read and written by the fastest of five copies."""
    source = torch.zeros(2**30 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = clock(DEVICE)
        target.copy_(source)
        seconds.append(clock(DEVICE) - started)
    return 2 * len(source) / min(seconds)


def speed(side: int, change: dict[str, Any]) -> list[str]:
    config = RESNET18.override(change)
    predicted = predict(config, (3, side, side), roof())
    found = profile(config, noise(side), device=DEVICE, steps=STEPS)
    parts = found.parts(found.trained)
    return [
        f"{found.images / found.trained.seconds:,.0f}",
        f"{predicted.images_per_s:,.0f}",
        *(f"{1000 * parts[part] / found.steps:.2f}" for part in PARTS),
        f"{1000 * sum(predicted.network.values()):.2f}",
        f"{1000 * predicted.augment:.2f}",
        f"{found.network_flops / found.peak_flops:.0%}",
        "" if found.graph_saves is None else f"{found.graph_saves:.0%}",
        "" if found.peak_memory_bytes is None else f"{found.peak_memory_bytes / 1e9:.1f}",
    ]


def bounds() -> list[str]:
    """The device's own peak and bandwidth, beside those of the predictions."""
    peak = measured_peak_flops(DEVICE, torch.bfloat16) / 1e12
    said = [f"{peak:.4g} TFLOP/s", f"{roof().flops / 1e12:.4g} TFLOP/s"]
    said += [f"{measured_bandwidth() / 1e12:.3g} TB/s copied", f"{roof().bytes_per_s / 1e12:.3g} TB/s"]
    return [*said, *[""] * (len(HEADERS["speed"]) - 1 - len(said))]


def dataloader() -> list[str]:
    """images/s of a DataLoader with torchvision's augmentation, and of ours: all epochs but the first."""
    side, change = next(iter(SPEEDS.values()))
    config = RESNET18.override({**change, "epochs": 3})
    splits = replace(noise(side).to(torch.device("cpu")), val=torch.arange(0))
    shown = 2 * len(splits.train)
    workers = min(16, len(os.sched_getaffinity(0))) if CUDA else 0
    theirs = shown / run_dataloader(config, splits, DEVICE, Loading(workers, pil=False)).steady
    ours = shown / run_core(config, splits, DEVICE).steady
    said = [f"{ours:,.0f}", "", f"DataLoader, {workers} workers: {theirs:,.0f}", f"{ours / theirs:.1f} times"]
    return [*said, *[""] * (len(HEADERS["speed"]) - 1 - len(said))]


# ---- parts


def compiled(change: dict[str, Any]) -> list[str]:
    config = small(change)
    whole, blocks = (config.override({"precision.compile": value}) for value in (True, "auto"))
    trainings = {"plain": config, "whole": whole, "blocks": blocks}
    return compared({how: partial(loss, each) for how, each in trainings.items()})


HEADERS = {
    "faults": ["configuration", "verdict", "plain", *(["graphs"] if CUDA else []), "streamed", "s", "error"],
    "speed": [
        *("ResNet-18", "images/s", "predicted", *(f"{part}, ms" for part in PARTS)),
        *("network predicted", "augment predicted", "of peak", "graphs save", "GB"),
    ],
    "compiled": ["configuration", "verdict", "plain", "whole", "blocks", "s", "error"],
}


def rows(part: str) -> dict[str, Row]:
    if part == "speed":
        found: dict[str, Row] = {name: partial(speed, *case) for name, case in SPEEDS.items()}
        return found | {"peak and bandwidth": bounds, "beside a DataLoader": dataloader}
    if part == "compiled":
        few = CONFIGURATIONS if CUDA else {"default": {}}
        return {name: partial(compiled, change) for name, change in few.items()}
    found = {name: partial(fault, change) for name, change in CONFIGURATIONS.items()}
    if CUDA:
        found["the network reads a value"] = partial(uncapturable, lambda images: images.max().item())
        found["the network waits unseen"] = partial(uncapturable, lambda _: torch.cuda.current_stream().synchronize())
        found["out of memory"] = out_of_memory
    return found | {f"memory of {TRAININGS if CUDA else 3} trainings": memory}


def run_part(part: str, skip: int) -> int:
    """Print the rows of a part after the first `skip`; returns the exit status."""
    compilation.bandwidth = lambda device: 1.0  # `precision.compile: auto` compiles
    for name, row in list(rows(part).items())[skip:]:
        try:
            cells = row()
        except CannotTrainError as error:
            cells = [error.verdict, *[""] * (len(HEADERS[part]) - 3), str(error)]
        except Exception as error:
            cells = [f"FAILED {first_line(error)}", *[""] * (len(HEADERS[part]) - 2)]
        else:
            print(line([name, *cells]), flush=True)
            continue
        print(line([name, *cells]), flush=True)
        return RESTART
    return 0


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# ---- the parent


class Report:
    """Prints lines, and appends them to a file at once."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self._file is not None:
            print(text, file=self._file, flush=True)


def run(report: Report, command: Sequence[str], seconds: float) -> tuple[int | None, int]:
    """Report the lines of a Python process. Warnings and crashes, which it writes to stderr, are in the terminal only.

    Returns:
        Its exit status, None if it was killed after `seconds`; and the number of rows that it printed.
    """
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    count = 0
    for text in process.stdout:
        report.say(text.rstrip())
        count += text.startswith("| ")
    status = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    return None if late else status, count


def report_part(report: Report, part: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    report.say(f"\n## {part}\n")
    if part == "tests":
        if importlib.util.find_spec("pytest") is None:
            report.say("left out: pytest is not installed")
            return
        report.say("```")
        status, _ = run(
            report, ["-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu", "-p", "no:cacheprovider"], seconds
        )
        report.say(f"```\n\n{'out of time' if status is None else f'exit status {status}'}")
        return
    names, done = list(rows(part)), 0
    report.say(f"{line(HEADERS[part])}\n|{'---|' * len(HEADERS[part])}")
    while done < len(names):
        status, count = run(report, [__file__, part, "--skip", str(done)], deadline - time.monotonic())
        done += count
        if status is None:
            report.say(line([f"out of time, {len(names) - done} of {len(names)} rows left out"]))
            return
        if status not in (0, RESTART):
            report.say(line([names[done], f"FAILED the process ended with status {status}"]))
            done += 1


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="part", help=", ".join(SHARES))
    options.add_argument("--minutes", type=float, default=10.0, help="for all parts (10)")
    options.add_argument("--out", type=Path, metavar="PATH", help="also write the lines to this file, as Markdown")
    options.add_argument("--skip", type=int, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if unknown := set(arguments.parts) - SHARES.keys():
        options.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    if arguments.skip is not None:
        sys.exit(run_part(arguments.parts[0], arguments.skip))
    report, deadline = Report(arguments.out), time.monotonic() + 60 * arguments.minutes
    described = machine()
    report.say(", ".join(f"{key} {value}" for key, value in described.items() if value is not None))
    for part in [part for part in SHARES if part in (arguments.parts or SHARES)]:
        report_part(report, part, SHARES[part] * (deadline - time.monotonic()))


if __name__ == "__main__":
    main()
