"""What the benchmarks share: the machine in words, medians with their spread, tables, and the result as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `core` and `tests` of this checkout, which may not be installed
PACKAGES = ("torch", "torchvision", "timm", "kornia", "optuna", "numpy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--repeats", type=positive, default=5, help="how often each side runs, in turn")
    options.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to this file")
    return options


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def machine() -> dict[str, Any]:
    """The hardware and versions that a measurement depends on, and how busy the machine was when it began.

    The GPU is torch's current one; None where there is none, or where a package is not installed.
    """
    import torch

    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": gpu_driver() if cuda else None,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }
    return found | {package: installed(package) for package in PACKAGES}


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver, as its own tool says it; None where that is not at hand."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0].strip() or None


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model as the kernel names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (lowest to highest, n)`."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high}, n={len(values)})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def quarters(values: Sequence[float], digits: int = 1) -> str:
    """`median (lower quartile to upper quartile, n)`."""
    low, middle, high = (f"{value:,.{digits}f}" for value in quartiles(values))
    return f"{middle} ({low} to {high}, n={len(values)})"


def mean_and_deviation(values: Sequence[float], digits: int = 4) -> str:
    """`mean ± standard deviation (n)`."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f} (n={len(values)})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well in a terminal too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def finish(name: str, path: Path | None, described: dict[str, Any], **results: Any) -> None:
    """Prints the machine under the results and, where asked, writes both and the command as JSON."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in described.items() if value is not None), flush=True)
    if path is not None:
        found = {"benchmark": name, "command": shlex.join(["python", *sys.argv]), "machine": described, **results}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
