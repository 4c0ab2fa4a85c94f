"""Many workers on one study: no error, an exact total, and at most 50 ms a trial beside the training, on the journal.

32 processes work 256 trials of a stand-in objective off: 8 parameters and 30 reports a trial, and no training at all,
so that the storage is all that they do. They go through `hpo.study` as `hpo run` does: claim, suggest, report,
should_prune, finish. Beside them, in the same run and on the same storages, plain Optuna does it as its documentation
says: `optimize` with a callback that stops at the total. Both have the space of the digits, TPE and a pruner of three
rungs; Optuna's is successive halving. No worker imports torch.

PostgreSQL is measured where a server is given; it gets a schema of its own, which is dropped afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from common import finish, machine, parser, positive, spread, table
from optuna.trial import TrialState

from core.data import DataReport
from hpo.space import SearchSpace, load_space
from hpo.storage import open_storage
from hpo.study import open_study

LIMIT_MS = 50  # the promise: a trial, one worker, on the journal
REPORTS = 30
STUDY = "bench"
IMAGES: Any = SimpleNamespace(
    name="digits", fingerprint="0" * 64, classes=tuple("0123456789"), report=DataReport(), given_val=lambda config: None
)
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


def the_space() -> SearchSpace:
    return load_space("digits", [f"epochs={REPORTS}"])


def score(params: dict[str, Any], epoch: int) -> float:
    """A stand-in for training: best in the middle of the space, better with every epoch."""
    off = abs(math.log10(params["optim.lr_scale"] / 5)) + abs(params["model.width"] - 1) + params["loss.smoothing"]
    return 1 - off / 4 - 1 / (epoch + 2)


# A worker's side


def work(side: str, url: str, total: int) -> dict[str, Any]:
    """What one worker process does, from when all of them are there; returns what became of it."""
    go_on = BEGIN[side](url, total)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu_started = time.process_time()
    error = None
    try:
        go_on()
    except Exception as fault:
        error = f"{type(fault).__name__}: {fault}".partition("\n")[0]
    assert "torch" not in sys.modules
    return {"cpu_s": time.process_time() - cpu_started, "error": error}


def begin_ours(url: str, total: int) -> Any:
    space = the_space()
    study = open_study(space, name=STUDY, dataset=IMAGES, storage_url=url, seed=0)

    if not study.queue.waiting():  # once, by who begins, as `hpo run` does before it starts its workers
        study.queue.ensure_trials(total)

    def go_on() -> None:
        while (claimed := study.queue.claim()) is not None:
            trial, _ = claimed
            params = space.suggest(trial)
            for epoch in range(1, REPORTS + 1):
                trial.report(score(params, epoch), epoch)
                if epoch < REPORTS and trial.should_prune():
                    study.queue.finish(trial, "pruned")
                    break
            else:
                study.queue.finish(trial, "complete", score(params, REPORTS))

    return go_on


def begin_plain(url: str, total: int) -> Any:
    space = the_space()
    study = optuna.create_study(
        study_name=STUDY,
        storage=plain_storage(url),
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=8),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=2),
    )

    def objective(trial: optuna.Trial) -> float:
        params = space.suggest(trial)
        for epoch in range(1, REPORTS + 1):
            trial.report(score(params, epoch), epoch)
            if epoch < REPORTS and trial.should_prune():
                raise optuna.TrialPruned
        return score(params, REPORTS)

    return lambda: study.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(total, states=COUNTED)])


def plain_storage(url: str) -> Any:
    if "://" in url:
        return url
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(url))


BEGIN = {"hpo": begin_ours, "optuna": begin_plain}


# The measuring side


def measure(side: str, url: str, *, workers: int, total: int, folder: Path) -> dict[str, Any]:
    """Has so many processes work a study off."""
    os.environ["HPO_STUDIES"] = str(folder / "studies")
    BEGIN[side](url, total)  # Optuna's processes would be in each other's way when they all make the tables
    command = [sys.executable, __file__, "--as-worker", side, url, str(total)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"a worker of {side} did not begin: see above")
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    seconds = time.perf_counter() - started
    ended = [json.loads(text) for text in said]
    return {
        "seconds": seconds,
        "cpu_s": sum(one["cpu_s"] for one in ended),
        "errors": [one["error"] for one in ended if one["error"]],
        **states(url, folder),
    }


def states(url: str, folder: Path) -> dict[str, Any]:
    """How the study stands afterwards, seen by Optuna alone."""
    storage = open_storage(url)
    trials = storage.get_all_trials(storage.get_study_id_from_name(STUDY))
    if "://" in url:
        storage._backend.engine.dispose()  # type: ignore[attr-defined]
    found = [trial.state for trial in trials]
    return {
        "counted": sum(state in COUNTED for state in found),
        "running": found.count(TrialState.RUNNING),
        "failed": found.count(TrialState.FAIL),
        "reports": sum(len(trial.intermediate_values) for trial in trials),
    }


@contextlib.contextmanager
def storage_of(kind: str, folder: Path, server: str | None) -> Iterator[str]:
    """The URL of an empty storage."""
    if kind == "journal":
        yield str(folder / "bench.log")
    elif kind == "sqlite":
        yield f"sqlite:///{folder / 'bench.db'}"
    else:
        import psycopg

        assert server is not None
        schema = f"bench_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
            yield f"{server.replace('://', '+psycopg://')}?options=-csearch_path%3D{schema}"
            connection.execute(f"DROP SCHEMA {schema} CASCADE")


def run_once(side: str, kind: str, server: str | None, *, workers: int, total: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, storage_of(kind, Path(name), server) as url:
        return measure(side, url, workers=workers, total=total, folder=Path(name))


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=1)
    options.add_argument("--workers", type=positive, default=32)
    options.add_argument("--trials", type=positive, default=256, help="the total")
    options.add_argument(
        "--alone", type=positive, default=64, help="trials of the one worker whose overhead is promised"
    )
    options.add_argument("--quick", action="store_true", help="8 workers, 48 trials, 16 alone")
    options.add_argument(
        "--storages", nargs="+", choices=("journal", "sqlite", "postgresql"), help="default: all there are"
    )
    options.add_argument("--sides", nargs="+", choices=("hpo", "optuna"), default=["hpo", "optuna"])
    options.add_argument(
        "--postgresql", metavar="URL", default=os.environ.get("HPO_TEST_POSTGRESQL"), help="a server's"
    )
    arguments = options.parse_args()
    if arguments.quick:
        arguments.workers, arguments.trials, arguments.alone = 8, 48, 16
    kinds = arguments.storages or ["journal", "sqlite", *(["postgresql"] if arguments.postgresql else [])]
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers': each has a core's share at most
    described = machine()
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    runs, rows = [], []
    for kind in kinds:
        for workers, total in ((1, arguments.alone), (arguments.workers, arguments.trials)):
            found: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
            for _ in range(arguments.repeats):
                for side in arguments.sides:
                    one = run_once(side, kind, arguments.postgresql, workers=workers, total=total)
                    found[side].append({"storage": kind, "side": side, "workers": workers, "total": total, **one})
            for side, several in found.items():
                runs += several
                rows.append([kind, str(workers), side, *outcome(several, total)])
                print(*rows[-1], sep=" | ", flush=True)
    print("\n" + table(HEADER, rows))
    for run in runs:
        for error in sorted(set(run["errors"])):
            print(f"{run['side']} on {run['storage']}: {run['errors'].count(error)} × {error[:200]}")
    kept = all(is_kept(run) for run in runs)
    print(f"\nexact totals, no error, and at most {LIMIT_MS} ms on the journal: {'held' if kept else 'NOT HELD'}")
    finish("workers", arguments.json, described, runs=runs)


HEADER = ["storage", "workers", "side", "ms a trial", "CPU ms a trial", "total"]
HEADER += ["beyond it", "left running", "errors", "reports a trial"]


def is_kept(run: dict[str, Any]) -> bool:
    """Whether our side did what was promised; Optuna's promised nothing."""
    if run["side"] != "hpo":
        return True
    exact = run["counted"] == run["total"] and not run["errors"] and not run["running"]
    alone_on_journal = run["storage"] == "journal" and run["workers"] == 1
    return exact and (not alone_on_journal or 1000 * run["seconds"] / run["counted"] <= LIMIT_MS)


def outcome(several: list[dict[str, Any]], total: int) -> list[str]:
    wall = [1000 * one["seconds"] / one["counted"] for one in several]
    cpu = [1000 * one["cpu_s"] / one["counted"] for one in several]
    beyond = ", ".join(f"{one['counted'] - total:+d}" for one in several)
    running = sum(one["running"] for one in several)
    errors = sum(len(one["errors"]) for one in several)
    reports = sum(one["reports"] for one in several) / sum(one["counted"] for one in several)
    return [spread(wall), spread(cpu), str(total), beyond, str(running), str(errors), f"{reports:.1f}"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-worker"]:
        logging.disable(logging.ERROR)
        print(json.dumps(work(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
