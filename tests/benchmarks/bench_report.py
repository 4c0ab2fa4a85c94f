"""What `hpo report` takes on a study of 200 trials: less than 10 seconds, and a page of less than 8 MB.

The study is written through Optuna into a journal without any training: the digits space with 60 epochs, its own
pruner, scores by a formula with noise, one trial in twenty a failure. The command then runs as a process of its own, as
a person starts it, so that Python's own start and all imports are in the time.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import finish, installed, machine, parser, positive, spread, table

from core.data import load_dataset
from hpo.space import load_space
from tests.hpo.invented import invented_study

LIMIT_S, LIMIT_MB = 10.0, 8.0  # the promises


def one_in_twenty(trial_index: int, params: Mapping[str, Any]) -> str:
    """Some trials diverge."""
    return "diverged" if trial_index % 20 == 13 else ""


def processor_s() -> float:
    """What the processes that have ended took of the processor: on a busy machine the clock shows more."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--trials", type=positive, default=200, help="of the study")
    options.add_argument("--epochs", type=positive, default=60, help="of a trial")
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="write the study there, and leave it")
    given = options.parse_args()
    described = machine() | {"plotly": installed("plotly")}
    with tempfile.TemporaryDirectory() as temporary:
        root = given.keep or Path(temporary)
        os.environ |= {"HPO_STUDIES": str(root), "HPO_CACHE": str(Path(temporary) / "cache")}
        space = load_space("digits", [f"epochs={given.epochs}"])
        study = invented_study(
            space, load_dataset(space.baseline.data), "bench", trials=given.trials, fails=one_in_twenty
        )
        counts = study.counts()
        seconds, busy = [], []
        for _ in range(given.repeats):
            started, before = time.perf_counter(), processor_s()
            subprocess.run([sys.executable, "-m", "hpo.cli", "report", "bench"], check=True)
            seconds.append(time.perf_counter() - started)
            busy.append(processor_s() - before)
        text = study.paths.report.read_text(encoding="utf-8")
    size = len(text.encode()) / 1e6
    figures = sum(map(len, re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL))) / 1e6
    states = f"{counts.complete} complete, {counts.pruned} pruned, {counts.failures} failed"
    print()
    print(
        table(
            ["trials", "seconds", "limit", "of the processor", "MB", "of it figures", "limit"],
            [[states, spread(seconds), f"{LIMIT_S:g}", spread(busy), f"{size:.2f}", f"{figures:.2f}", f"{LIMIT_MB:g}"]],
        )
    )
    finish(
        "report",
        given.json,
        described,
        seconds=seconds,
        processor_seconds=busy,
        megabytes=size,
        figures_megabytes=figures,
    )
    if max(seconds) > LIMIT_S or size > LIMIT_MB:
        sys.exit("a promise is broken")


if __name__ == "__main__":
    main()
