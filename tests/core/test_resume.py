"""A repeatedly killed training gives bitwise the same result as an undisturbed one.

Processes are killed by SIGKILL, at a random Python function call. This covers every moment at which a file may be half
written, and is reproducible, since calls are counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import core.loop.run
from core.config import TrainConfig
from core.data import Splits
from core.loop import EpochMetrics, train
from tests.core.trainings import CPU, STATEFUL

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 6
KILLS = 3

# Together they use all state of a checkpoint.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{name: STATEFUL[name] for name in ("adamw, ema, mixup, dropout", "swats by its criterion")},
    "sgd, swa, growing images, smoothing": {
        "optim.name": "sgd", "averaging.name": "swa", "averaging.swa_start_fraction": 0.25,
        "augment.start_size_fraction": 0.5, "loss.smoothing": 0.2, "loss.smoothing_final": 0.0,
    },
    "nadam, early stopping on an ema": {
        "optim.name": "nadam", "early_stop.patience_fraction": 1.0, "averaging.name": "ema", "optim.lr_scale": 30.0,
    },
    "muon, plateau, alternating flips of copies": {
        "optim.name": "muon", "schedule.name": "plateau", "schedule.patience_fraction": 0.2, "optim.lr_scale": 100.0,
        "sampling.oversample": 2, "augment.apply_to": "repeats", "augment.flip": 0.5, "augment.alternate_flip": True,
        "loss.smoothing": 0.3, "loss.smoothing_final": 0.0, "loss.smoothing_patience_fraction": 0.2,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Life:
    """One process of a training: its files, and when it is killed."""

    folder: Path
    data: Path
    config: str
    share: float
    """Maximum fraction of time for checkpoints."""
    kill: tuple[int, int] | None
    """Killed after so many epochs, and then so many function calls; None: not killed."""

    @property
    def diary(self) -> Path:
        """Log of the training's callbacks, as JSON lines."""
        return self.folder / "diary.jsonl"

    @property
    def result(self) -> Path:
        return self.folder / "result.pt"


def live(life: Life) -> None:
    """Train from the checkpoint, if there is one, in a separate process."""
    torch.set_num_threads(1)
    core.loop.run.CHECKPOINT_SHARE = life.share
    digits = Splits(**torch.load(life.data, weights_only=True))
    epochs = calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if (epochs, calls) == life.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    with life.diary.open("a") as diary:

        def note(what: str, history: list[EpochMetrics]) -> None:
            line = {"what": what, "calls": calls, "history": [dataclasses.asdict(epoch) for epoch in history]}
            diary.write(json.dumps(line) + "\n")
            diary.flush()

        def epoch_ended(epoch: EpochMetrics) -> None:
            nonlocal epochs, calls
            note("epoch", [epoch])
            epochs, calls = epochs + 1, 0

        note("began", [])
        checkpoint = life.folder / "checkpoint.pt"
        sys.setprofile(count)
        result = train(
            TrainConfig.model_validate_json(life.config),
            digits,
            device=CPU,
            resume_from=checkpoint,
            checkpoint_to=checkpoint,
            on_epoch_end=epoch_ended,
            on_resume=lambda history: note("resumed", list(history)),
        )
        sys.setprofile(None)
    history = [dataclasses.asdict(epoch) | {"images_per_s": 0, "elapsed_s": 0} for epoch in result.history]
    torch.save({"weights": result.model.state_dict(), "logits": result.val_logits, "history": history}, life.result)


def lines_of(life: Life) -> list[dict[str, Any]]:
    """Parse the log of all processes, without an incomplete last line."""
    return [json.loads(line) for line in life.diary.read_text().splitlines(keepends=True) if line.endswith("\n")]


def serve() -> None:
    """Run the trainings described on standard input in forked processes, and print their exit codes.

    Forking avoids importing torch and timm for each; the parent runs the first training itself for lazy imports.
    """
    live(described(sys.stdin.readline()))
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            live(described(line))
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def described(line: str) -> Life:
    values = json.loads(line)
    values |= {name: Path(values[name]) for name in ("folder", "data")}
    return Life(**values | {"kill": values["kill"] and tuple(values["kill"])})


class Server:
    """The process of `serve`."""

    def __init__(self, process: subprocess.Popen[str], data: Path) -> None:
        self.process, self.data = process, data

    def begin(self, life: Life) -> None:
        assert self.process.stdin is not None
        life.folder.mkdir(exist_ok=True)
        self.process.stdin.write(json.dumps(dataclasses.asdict(life), default=str) + "\n")
        self.process.stdin.flush()

    def run(self, life: Life) -> int:
        """Run a training and return its exit code."""
        self.begin(life)
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(digits: Splits, tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("resume")
    data = folder / "digits.pt"
    torch.save({field.name: getattr(digits, field.name) for field in dataclasses.fields(digits)}, data)
    command = [sys.executable, "-c", f"import {__name__} as module; module.serve()"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        server = Server(process, data)
        first = tiny.override({"epochs": 1, "optim.name": "muon"}).model_dump_json()
        server.begin(Life(folder / "first", data, first, share=1.0, kill=None))
        yield server


def same(one: Life, other: Life) -> bool:
    """Compare weights, predictions and the scores of every epoch, bitwise."""
    ours, theirs = (torch.load(life.result, weights_only=True) for life in (one, other))
    equal = [torch.equal(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"]]
    return all(equal) and torch.equal(ours["logits"], theirs["logits"]) and ours["history"] == theirs["history"]


@pytest.mark.parametrize(
    ("changes", "share"),
    [(changes, math.inf) for changes in CONFIGURATIONS.values()]
    + [(CONFIGURATIONS["sgd, swa, growing images, smoothing"], core.loop.run.CHECKPOINT_SHARE)],
    ids=[*CONFIGURATIONS, "checkpoints limited by time"],
)
def test_a_repeatedly_killed_training_equals_the_undisturbed_one_bitwise(
    server: Server, tiny: TrainConfig, tmp_path: Path, changes: dict[str, Any], share: float
) -> None:
    config = tiny.override({"epochs": EPOCHS, "batch_size": 96, **changes}).model_dump_json()  # two steps an epoch
    twin = Life(tmp_path / "twin", server.data, config, share, kill=None)
    assert server.run(twin) == 0
    calls = statistics.median(line["calls"] for line in lines_of(twin))  # per epoch with its checkpoint

    drawn = random.Random(f"{changes}")
    killed = Life(tmp_path / "killed", server.data, config, share, kill=None)
    for kill in range(KILLS):
        # The first is after a checkpoint; none is after a fourth epoch, so that the last process trains too.
        epochs = 2 if kill == 0 else drawn.randint(0, 1)
        died = dataclasses.replace(killed, kill=(epochs, round(calls * drawn.random())))
        assert server.run(died) == -signal.SIGKILL
    assert server.run(killed) == 0
    assert same(twin, killed)

    resumed_at: list[int] = []
    repeated: list[int] = []
    before: list[dict[str, Any]] = []  # history of the previous process
    told: list[dict[str, Any]] = []  # history of this process
    for line in lines_of(killed):
        if line["what"] == "began":
            before, told = told or before, []
        elif line["what"] == "resumed":
            told = line["history"]
            assert told == before[: len(told)]  # bitwise, including times
            resumed_at.append(len(told))
            repeated.append(len(before) - len(told))
        else:
            told += line["history"]
    assert min(resumed_at) > 0
    if share == math.inf:
        assert max(repeated) <= 1
