"""How fast images are read: a folder and a .zip of 100,000 PNGs of 8×8 pixels, and a CSV of a million missing files.

Each is read by a process of its own into an empty cache: listed, decoded, split and written. The images are made once.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from common import finish, machine, parser, positive, spread, table
from PIL import Image

LEAST_PER_S = 10_000  # the promise
CLASSES = 10

READ = """
import json, resource, sys, time
from pathlib import Path
import torch
from core.config import DataConfig
from core.data import load_dataset
from core.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started, busy = time.perf_counter(), time.process_time()
try:
    dataset = load_dataset(DataConfig(), data_path=Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
    size = dataset.images.nbytes
except UserError:
    size = 0
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "processor_seconds": time.process_time() - busy,
    "extra_megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
    "decoded_megabytes": size / 1e6,
}))
"""


def make(root: Path, count: int) -> dict[str, Path]:
    """Write the folder, the .zip and the CSV."""
    folder, packed, listed = root / "images", root / "images.zip", root / "missing.csv"
    for number in range(CLASSES):
        (folder / f"class{number}").mkdir(parents=True)
    with zipfile.ZipFile(packed, "w") as archive:
        for index in range(count):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            name = f"class{index % CLASSES}/{index:06d}.png"
            (folder / name).write_bytes(buffer.getvalue())
            archive.writestr(name, buffer.getvalue())
    rows = "".join(f"gone/{index}.png,{index % CLASSES}\n" for index in range(10 * count))
    listed.write_text(f"path,label\n{rows}", encoding="utf-8")
    return {"folder": folder, ".zip": packed, "CSV of missing files": listed}


def read(path: Path) -> dict[str, float]:
    """Read one source in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path), cache], check=True, capture_output=True, text=True
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=positive, default=100_000, help="in the folder and in the .zip")
    given = options.parse_args()
    described = machine()
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        sources = make(Path(temporary), given.images)
        print(f"made in {time.perf_counter() - started:.0f} s")
        measured = {name: [read(path) for _ in range(given.repeats)] for name, path in sources.items()}
    rows = []
    for name, found in measured.items():
        seconds = [each["seconds"] for each in found]
        speeds = [given.images / each for each in seconds] if name != "CSV of missing files" else []
        rows.append([
            name,
            spread(seconds),
            spread([each["processor_seconds"] for each in found]),
            spread(speeds) if speeds else "",
            f"{LEAST_PER_S:,}" if speeds else "",
            spread([each["extra_megabytes"] for each in found]),
            f"{found[0]['decoded_megabytes']:.1f}",
        ])  # fmt: skip
    print(table(["source", "seconds", "of the processor", "files/s", "at least", "MB more", "MB decoded"], rows))
    finish("reading", given.json, described, images=given.images, measured=measured)


if __name__ == "__main__":
    main()
