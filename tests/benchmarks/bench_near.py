"""Which copies of images are found: `core.data.near` beside the perceptual hash of the package imagehash.

Copies of random images are added to a set: saved again as JPEG, reduced and enlarged, cropped, or shifted. Both methods
compare all images with each other. Recall is the fraction of copies found; an alarm is a pair of original images, of
which some are real near-duplicates: look at them with --sheet.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish, machine, mean_and_deviation, parser, positive, table
from numpy.typing import NDArray
from PIL import Image
from trainings import SHARED

from core.config import DataConfig
from core.data import load_dataset
from core.data.near import near_duplicates, reduced

Pairs = NDArray[np.int64]
KINDS = ("jpeg", "resized", "cropped", "shifted")


def copy(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A changed copy of an image: cropped by up to 8 % at each side, or shifted by up to 6 % of it."""
    width, height = image.size
    quality = 85
    if kind == "jpeg":
        quality = int(rng.integers(30, 80))
    elif kind == "resized":
        share = rng.uniform(0.5, 0.95)
        image = image.resize((round(width * share), round(height * share))).resize((width, height))
    elif kind == "cropped":
        left, top, right, bottom = (round(edge) for edge in rng.uniform(0, 0.08, 4) * width)
        image = image.crop((left, top, width - right, height - bottom)).resize((width, height))
    else:
        x, y = (round(shift) for shift in rng.uniform(-0.06, 0.06, 2) * width)
        pixels = np.pad(np.asarray(image), ((9, 9), (9, 9), (0, 0)), mode="edge")
        image = Image.fromarray(pixels[9 + y : 9 + y + height, 9 + x : 9 + x + width])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def ours(images: list[Image.Image]) -> Pairs:
    """Pairs of near-duplicates by `core.data.near`."""
    pixels = (np.moveaxis(np.asarray(image), -1, 0) for image in images)
    return near_duplicates(reduced(pixels, len(images)))


def by_hash(distance: int) -> Callable[[list[Image.Image]], Pairs]:
    """Pairs whose 64-bit perceptual hashes differ in at most that many bits."""
    import imagehash

    def find(images: list[Image.Image]) -> Pairs:
        hashes = torch.tensor(np.stack([imagehash.phash(image).hash.ravel() for image in images])) * 2.0 - 1
        parts = []
        for start in range(0, len(hashes), 1000):  # all at once take gigabytes
            first, second = ((64 - hashes[start : start + 1000] @ hashes.T) / 2 <= distance).nonzero(as_tuple=True)
            parts.append(torch.stack([first + start, second], dim=1)[first + start < second])
        return torch.cat(parts).numpy()

    return find


def measured(find: Callable[[list[Image.Image]], Pairs], images: list[Image.Image], sources: Pairs) -> dict[str, Any]:
    """Recall of each kind of copy, alarms among the originals, and the time."""
    started = time.perf_counter()
    pairs = find(images)
    seconds = time.perf_counter() - started
    originals = len(images) - len(sources)
    known = {(int(first), int(second)) for first, second in pairs}
    found = [(int(source), originals + place) in known for place, source in enumerate(sources)]
    alarms = [pair for pair in known if pair[1] < originals]
    recall = {kind: float(np.mean(found[place :: len(KINDS)])) for place, kind in enumerate(KINDS)}
    return {"recall": recall, "all": float(np.mean(found)), "alarms": sorted(alarms), "seconds": seconds}


def sheet(images: list[Image.Image], pairs: list[tuple[int, int]], path: Path) -> None:
    """Draws pairs of images, five pairs a row."""
    tiles = [np.hstack([np.asarray(images[place]) for place in pair]) for pair in pairs]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 5)
    Image.fromarray(np.vstack([np.hstack(tiles[row : row + 5]) for row in range(0, len(tiles), 5)])).save(path)


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=SHARED / "scenes5k.zip")
    options.add_argument("--copies", type=positive, default=200)
    options.add_argument("--sheet", type=Path, metavar="PNG", help="draw the alarms among the originals")
    options.set_defaults(repeats=1)
    arguments = options.parse_args()
    described = machine()
    dataset = load_dataset(DataConfig(near_duplicates="ignored"), data_path=arguments.data)
    stored = torch.cat([dataset.images, dataset.open_test().images]).permute(0, 2, 3, 1).numpy()
    originals = [Image.fromarray(pixels) for pixels in stored]
    methods = {"core.data.near": ours, **{f"phash, {bits} bits": by_hash(bits) for bits in (4, 8, 12)}}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for seed in range(arguments.repeats):
        rng = np.random.default_rng(seed)
        sources = rng.choice(len(originals), arguments.copies, replace=False)
        copies = [copy(originals[source], KINDS[place % 4], rng) for place, source in enumerate(sources)]
        for name, find in methods.items():
            results[name].append(measured(find, originals + copies, sources))
    rows = [
        [
            name,
            *(mean_and_deviation([run["recall"][kind] for run in runs], 3) for kind in KINDS),
            mean_and_deviation([run["all"] for run in runs], 3),
            mean_and_deviation([len({image for pair in run["alarms"] for image in pair}) for run in runs], 0),
            mean_and_deviation([run["seconds"] for run in runs], 1),
        ]
        for name, runs in results.items()
    ]
    print(f"{len(originals):,} images and {arguments.copies} copies\n")
    print(table(["method", *KINDS, "all copies", "originals with an alarm", "seconds"], rows))
    if arguments.sheet is not None:
        sheet(originals, results["core.data.near"][0]["alarms"], arguments.sheet)
    finish("near", arguments.json, described, results=results)


if __name__ == "__main__":
    main()
