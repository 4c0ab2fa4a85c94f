"""What the benchmarks share: the machine in words, medians with their spread, tables, and the result as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


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
    """The hardware and versions that a measurement depends on, and how busy the machine was when it began."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }
    return found | {package: version(package) for package in ("torch", "torchvision", "timm", "optuna", "numpy")}


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
    """Prints the machine under the results and, where asked, writes both as JSON."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in described.items() if value is not None), flush=True)
    if path is not None:
        path.write_text(
            json.dumps({"benchmark": name, "machine": described, **results}, indent=1) + "\n", encoding="utf-8"
        )
        print(f"written to {path}")
