"""`hpo fit digits --minutes 2`, killed at random: how late the model is, and whether there is always one.

Each run is killed 0 to 3 times by SIGKILL at a random time of its limit, and the same command continues it at once. Its
time is that of all its processes together, from their start to their end. Late by more than 5 % is a failure.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, finish, machine, parser, positive, spread, table

# Later by this share of the limit is a failure.
TOLERANCE = 0.05


def fit(folder: Path, minutes: float, kills_s: list[float]) -> dict[str, Any]:
    """Run the command until it ends by itself, with kills at these seconds of its time."""
    environment = {
        **os.environ,
        "HPO_STUDIES": str(folder / "studies"),
        "HPO_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "hpo.cli", "fit", "digits", "--minutes", f"{minutes:g}"]
    used_s, stages, code = 0.0, [], None
    kills = sorted(kills_s)
    while code is None:
        began = time.monotonic()
        with (folder / "out.txt").open("a") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(0.1, kills.pop(0) - used_s) if kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                stages.append(stage_of(folder))
        used_s += time.monotonic() - began
    return {
        "kills_s": kills_s,
        "killed_in": stages,
        "seconds": used_s,
        "late_s": used_s - 60 * minutes,
        "code": code,
        "model": (folder / "studies/fit-digits/refit/best/model.safetensors").is_file(),
    }


def stage_of(folder: Path) -> str:
    """The stage in which a run was killed, by its record."""
    file = folder / "studies/fit-digits/fit.json"
    done = json.loads(file.read_text())["done"] if file.exists() else {}
    return next((stage for stage in ("search", "confirm", "refit", "predict", "report") if stage not in done), "end")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=2.0, help="time limit of each run")
    options.add_argument("--most-kills", type=int, default=3, help="of one run")
    options.add_argument("--seed", type=positive, default=1, help="of the kills")
    options.set_defaults(repeats=20)
    arguments = options.parse_args()
    described, chance = machine(), random.Random(arguments.seed)
    runs = []
    for number in range(arguments.repeats):
        kills = [chance.uniform(0, 60 * arguments.minutes) for _ in range(chance.randint(0, arguments.most_kills))]
        with tempfile.TemporaryDirectory() as folder:
            runs.append(fit(Path(folder), arguments.minutes, kills))
            if runs[-1]["code"] or not runs[-1]["model"]:
                print((Path(folder) / "out.txt").read_text())
        print(number, runs[-1], flush=True)
    limit_s = 60 * arguments.minutes
    late = [run["late_s"] for run in runs]
    rows = [
        ["runs", str(len(runs))],
        ["kills", str(sum(len(run["killed_in"]) for run in runs))],
        ["seconds", spread([run["seconds"] for run in runs])],
        ["latest, seconds after the limit", f"{max(late):.1f} ({100 * max(late) / limit_s:+.1f} %)"],
        ["late by over 5 %", str(sum(one > TOLERANCE * limit_s for one in late))],
        ["without a model", str(sum(not run["model"] for run in runs))],
    ]
    print("\n" + table(["", f"--minutes {arguments.minutes:g}"], rows))
    finish("fit_deadline", arguments.json, described, runs=runs)


if __name__ == "__main__":
    main()
