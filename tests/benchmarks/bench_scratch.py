"""The optimizer of `scratch`'s baseline: AdamW and Muon at several rates and lengths, everything else equal.

The sets, cut as in `bench_live.py`, and the baseline of `scratch` at 32². Every seed draws other images and weights,
the same for all sides, so that the differences are paired. Accuracy on test images at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench_live import SIDE, SUBJECTS
from common import finish, machine, mean_and_deviation, parser, positive, spread, table
from trainings import SHARED, Job, RandomCut, accuracy_line, by_name, paired, rows_of, run_all

from hpo.space import load_space

SIDES: dict[str, dict[str, Any]] = {
    f"{name}, lr_scale {scale:g}": {"optim.name": name, "optim.lr_scale": scale}
    for name, scale in (("adamw", 4.0), ("adamw", 12.0), ("muon", 4.0), ("muon", 12.0), ("muon", 20.0))
}
CONTROL = next(iter(SIDES))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=[*SUBJECTS], choices=[*SUBJECTS], help="data sets")
    options.add_argument("--sides", nargs="+", default=[*SIDES], choices=[*SIDES], metavar="SIDE")
    options.add_argument("--epochs", nargs="+", type=positive, default=[24, 120], help="lengths of a training")
    options.add_argument("--widths", nargs=3, type=positive, default=[32, 64, 128], help="channels of the stages")
    options.add_argument("--workers", type=positive, default=2, help="trainings at a time, one thread each")
    options.set_defaults(repeats=3)
    given = options.parse_args()
    described = machine()
    base = load_space("scratch", [f"model.widths={given.widths}"]).baseline
    with tempfile.TemporaryDirectory() as cache:
        jobs = [
            Job(
                f"{where}, {epochs} epochs: {side}",
                seed,
                base.override({**SIDES[side], "epochs": epochs, "seed": seed}),
                RandomCut(SHARED / subject.file, subject.counts, subject.judged, seed, SIDE, Path(cache)),
            )
            for seed in range(given.repeats)
            for where, subject in SUBJECTS.items()
            if where in given.only
            for epochs in given.epochs
            for side in given.sides
        ]
        done = by_name(run_all(jobs, workers=given.workers, said=accuracy_line))
    rows = []
    for name, group in done.items():
        where, _, side = name.partition(": ")
        gain = ""
        if side != CONTROL and (control := done.get(f"{where}: {CONTROL}")):
            gain = paired([one.accuracy for one in group], [one.accuracy for one in control])
        accuracy = mean_and_deviation([one.accuracy for one in group], 3)
        rows.append([where, side, accuracy, gain, spread([one.seconds for one in group], 0)])
    print("\n" + table(["set and length", "side", "accuracy", f"less {CONTROL}", "s"], rows))
    finish("scratch", given.json, described, trainings=[row for group in done.values() for row in rows_of(group)])


if __name__ == "__main__":
    main()
