"""Measures augmentation against torchvision v2: images per second of the same operations, in one run on the CPU.

    python -m tests.benchmarks.bench_augment [--json PATH] [--repeats 15] [--threads 2]

Three sides take turns, repeat by repeat, so that whatever else the machine does falls on all of them: ours; torchvision
image by image, as a DataLoader's worker does it; and torchvision on the whole batch, where every image gets the same
draw, for information. The operations are a random crop of 96² after padding by 12, a flip, RandAugment of 2 operations
at magnitude 9 of 30, normalisation, and erasing with probability 0.25, from uint8 to float32.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

if __package__ in (None, ""):  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.augment import Augment
from core.config import AugmentConfig

SCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "scenes5k.zip"
SIDE = 96
PAD = 12
MEAN, STD = (0.45, 0.46, 0.42), (0.25, 0.25, 0.28)


def load_images(count: int) -> tuple[Tensor, str]:
    """(count, 3, 96, 96) uint8, and what they are: real photographs where they are on disk, else smooth noise."""
    if SCENES.is_file():
        with zipfile.ZipFile(SCENES) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            chosen = names[:: len(names) // count][:count]
            arrays = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in chosen]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), f"{SCENES.name}, real photographs"
    noise = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8), "synthetic: 12² noise enlarged"


def torchvision_transform() -> Callable[[Tensor], Tensor]:
    """The same operations in torchvision's own words, for one image or for a batch that shares its draw."""
    return v2.Compose(
        [
            v2.RandomCrop(SIDE, padding=PAD),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(0.25),
        ]
    )


def measure(sides: dict[str, Callable[[], Tensor]], repeats: int, count: int) -> dict[str, dict[str, float]]:
    """Images per second of each side: median, quartiles, and the median of its ratio to the first side's repeat."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()  # warm
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - start))
    first = next(iter(rates.values()))
    rows = {}
    for name, values in rates.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(first, values, strict=True))
        rows[name] = {"median": median, "q25": low, "q75": high, "best": max(values), "ours_over_it": ratio}
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison, prints it as a table, and returns (and with --json writes) what it found."""
    parser = argparse.ArgumentParser(description="Augmentation against torchvision v2, images per second.")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each side")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use")
    parser.add_argument("--images", type=int, default=256, help="images a batch")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images, source = load_images(options.images)
    augment = Augment(AugmentConfig(ops=2, strength=9 / 30, erase=0.25), MEAN, STD, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    theirs = torchvision_transform()
    sides: dict[str, Callable[[], Tensor]] = {
        "ours, whole batch, a draw an image": lambda: augment(images, generator),
        "torchvision v2, image by image": lambda: torch.stack([theirs(image) for image in images]),
        "torchvision v2, whole batch, one draw": lambda: theirs(images),
    }
    rows = measure(sides, options.repeats, len(images))
    result = {
        "benchmark": "augment",
        "images": f"{len(images)} of {SIDE}×{SIDE}×3, {source}",
        "operations": f"crop with padding {PAD}, flip, RandAugment(2, 9), normalise, erase 0.25",
        "repeats": options.repeats,
        "unit": "images/s",
        "rows": rows,
        "hardware": {"processor": processor(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
    }
    print(f"{result['images']}\n{result['operations']}\n{result['hardware']} {result['versions']}")
    print(f"\n{'images/s':40s} {'median':>8s} {'quartiles':>15s} {'best':>8s}   ours is faster by")
    for name, row in rows.items():
        spread = f"{row['q25']:.0f} – {row['q75']:.0f}"
        print(f"{name:40s} {row['median']:8.0f} {spread:>15s} {row['best']:8.0f}   {row['ours_over_it']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def processor() -> str:
    """The processor's name as the kernel knows it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
