"""`hpo train --profile`: how the time of an epoch is spent, as a table and as files beside the training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from core.config import TrainConfig
from core.data import Splits
from core.loop.profile import Profile, profile
from core.runtime import describe_device
from hpo.paths import TrainingPaths
from hpo.reporter import Reporter
from hpo.study.versions import versions

Row = tuple[str, ...]


def profile_training(
    config: TrainConfig, splits: Splits, paths: TrainingPaths, *, name: str, device: torch.device, reporter: Reporter
) -> None:
    """Measure a training before it starts; show and write how its time is spent."""
    reporter.say(f"profiling {name}: its last steps, timed; {describe_device(device)}")
    measured = profile(config, splits, device=device)
    columns = ["part", "s an epoch", "share", *([] if measured.replayed is None else ["kernel by kernel, s"])]
    rows = _rows(measured)
    reporter.table(columns, rows, right=range(1, len(columns)))
    remarks = _remarks(measured)
    for remark in remarks:
        reporter.say(remark)
    paths.dir.mkdir(parents=True, exist_ok=True)
    text = [f"# Where an epoch of {name} goes", f"{describe_device(device)}, torch {torch.__version__}"]
    text += [_markdown(columns, rows), "\n".join(f"- {remark}" for remark in remarks)]
    paths.profile_table.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    numbers = {
        "recipe": name,
        "device": describe_device(device),
        "versions": versions(),
        "sizes": _sizes(config, splits),
        **_numbers(measured),
    }
    paths.profile.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _rows(measured: Profile) -> list[Row]:
    """One row per part, then their sum. Seconds have the decimals that the sum needs for four digits."""
    decimals = max(3 - math.floor(math.log10(measured.epoch_s)), 0)
    trained, launched = measured.parts(measured.trained), measured.parts(measured.launched)
    parts = [(str(part), seconds, launched[part]) for part, seconds in trained.items()]
    parts.append(("epoch", measured.epoch_s, sum(launched.values())))
    rows = []
    for part, seconds, by_kernel in parts:
        last = () if measured.replayed is None else (f"{by_kernel:.{decimals}f}",)
        rows.append((part, f"{seconds:.{decimals}f}", _percent(seconds / measured.epoch_s), *last))
    return rows


def _remarks(measured: Profile) -> list[str]:
    """Lines below the table, the largest cost last."""
    training_s = measured.trained.seconds
    remarks = [
        f"images/s: {measured.images_per_s:,.0f}; without evaluation {measured.images / training_s:,.0f}",
        f"a step: {_milliseconds(training_s / measured.steps)}, {measured.steps:,} an epoch",
    ]
    if measured.replayed is not None and measured.graph_saves is not None:
        by_kernel = _milliseconds(measured.launched.seconds / measured.steps)
        saved = _percent(measured.graph_saves)
        remarks.append(f"a step kernel by kernel: {by_kernel}; its CUDA graph saves {saved} of that")
    peak = measured.peak_flops
    for what, flops in (("a step", measured.step_flops), ("forward and backward", measured.network_flops)):
        remarks.append(f"arithmetic of {what}: {_flops(flops)}, {_percent(flops / peak)} of the device's peak")
    remarks.append(f"the device's peak: {_flops(peak)}, measured here, multiplying {measured.dtype} matrices")
    if measured.peak_memory_bytes is not None:
        remarks.append(f"memory: {measured.peak_memory_bytes / 2**30:.2f} GiB at most, images and weights included")
    remarks.append("host: the rest, mostly Python and gathering images or waiting for them")
    largest = measured.largest
    share = _percent(measured.parts(measured.trained)[largest] / measured.epoch_s)
    return [*remarks, f"largest cost: {largest}, {share} of an epoch"]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if round(100 * share) else f"{100 * share:.1f} %"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _flops(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def _sizes(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """The sizes that matter most; `config.yaml` has the whole configuration."""
    channels, height, width = splits.images.shape[1:]
    return {
        "model": config.model.name,
        "image": [channels, height, width],
        "classes": len(splits.classes),
        "train_images": len(splits.train),
        "val_images": len(splits.val),
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "optimizer": config.optim.name,
        "averaging": config.averaging.name,
        "autocast": config.precision.autocast,
        "cuda_graphs": config.precision.cuda_graphs,
        "compile": config.precision.compile,
    }


def _numbers(measured: Profile) -> dict[str, Any]:
    derived = ("epoch_s", "images_per_s", "graph_saves", "step_flops", "network_flops", "largest")
    return {
        **asdict(measured),
        **{name: getattr(measured, name) for name in derived},
        "shares": {part: s / measured.epoch_s for part, s in measured.parts(measured.trained).items()},
        "step_share_of_peak": measured.step_flops / measured.peak_flops,
        "network_share_of_peak": measured.network_flops / measured.peak_flops,
    }
