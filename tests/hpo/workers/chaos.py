"""Failures injected into a running study, drawn by a seed, and the properties that must hold afterwards.

A study of small digits networks runs under `hpo run --workers 2` while one `Event` after the other strikes it, each
while a trial runs that has a checkpoint. Whatever ends the run, the same command is run again. `check` asserts the
properties, and compares the study with an undisturbed twin.

Processes, signals, a full disk and a database server are real. The one mock is `faults.py`, which the study's processes
import: on demand a network's weights become NaN, or a device is out of memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from hpo.paths import StudyPaths
from tests.hpo.storage.postgresql import Server, running_server
from tests.hpo.workers.processes import PATIENCE_S, group_of, wait_until
from tests.hpo.zygote import IMPORTED, Hpo

EPOCHS = 18
# A trial's result depends on its index alone: the sampler learns nothing, and the rungs keep all of so few trials. A
# checkpoint is saved at every rung, so that a kill repeats one epoch at most.
SPACE = f"""
data: {{name: digits}}
base: {{model: {{widths: [8], blocks: [1]}}, epochs: {EPOCHS}, batch_size: 128, augment: {{flip: 0.0}}}}
pruner: {{name: rungs, rungs: {[epoch / EPOCHS for epoch in range(1, EPOCHS)]}, keep: 0.999}}
sampler: {{name: random}}
search:
  optim.lr_scale: {{low: 0.5, high: 20, log: true}}
"""

_TMPFS_BYTES = 48 << 20
# The end of a run on a full disk: while it saves a checkpoint, or writes the journal.
_FULL = r"hpo: [^\n]+(no space is left on the disk; free some|cannot be written \([^\n]+\); free some)[^\n]+\n\Z"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

Results = dict[int, tuple[str, float | None, dict[str, Any], dict[int, float], list[dict[str, Any]]]]
"""Trial index -> state or failure, value, parameters, reports, and the rows of its metrics without times."""


# The command


class Command:
    """`hpo run …`, run as often as needed, each time as the head of a process group of its own.

    Args:
        arguments: of `hpo run`.
        folder: working directory, which also keeps the output.
        environment: added to this process's.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.arguments, self._folder = list(arguments), folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
        self._lives: list[subprocess.Popen[Any]] = []

    def start(self) -> None:
        """Run the command once more."""
        with self._output_of(len(self._lives)).open("wb") as output:
            self._lives.append(
                Hpo(
                    ["run", *self.arguments],
                    cwd=self._folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
            )

    @property
    def process(self) -> subprocess.Popen[Any]:
        """The parent of the workers."""
        return self._lives[-1]

    @property
    def said(self) -> str:
        """The output of the last run."""
        return self._output_of(len(self._lives) - 1).read_text()

    @property
    def all_said(self) -> list[str]:
        """The output of every run."""
        return [self._output_of(life).read_text() for life in range(len(self._lives))]

    def ended(self) -> int:
        """Wait for its end, and return the exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {PATIENCE_S:g} s:\n{self.said}") from None

    def kill_all(self) -> None:
        """Kill every process of every run, also those that a killed parent left."""
        for life in self._lives:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(life.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(group_of(life.pid) for life in self._lives), "every process is dead")

    def _output_of(self, life: int) -> Path:
        return self._folder / f"output.{life}.txt"


# The study


@dataclass(frozen=True)
class Victim:
    """A running attempt at a trial that has a checkpoint when an event strikes."""

    number: int
    trial_index: int
    pid: int
    """The worker's."""
    epoch: int
    """The last reported."""


@dataclass
class Chaos:
    """A study that is struck by events.

    Args:
        folder: an empty one; the study is in `folder/disk`, which may be a disk of its own.
        events: determines the number of trials.
        server: stores the study; None for a journal.
    """

    folder: Path
    seed: int
    events: int
    server: Server | None = None
    random: random.Random = field(init=False)
    total: int = field(init=False)
    command: Command = field(init=False)
    struck: list[tuple[Event, Victim]] = field(init=False, default_factory=list)
    seen: dict[int, FrozenTrial] = field(init=False, default_factory=dict)
    """Every finished trial as first read."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.began = time.monotonic()
        self.total = 2 + self.events // 3
        self.disk = self.folder / "disk"
        self.paths = StudyPaths(self.disk / "studies" / "chaos")
        self.faults = self.folder / "faults"
        for made in (self.disk, self.faults):
            made.mkdir(parents=True, exist_ok=True)
        (self.folder / "chaos.yaml").write_text(SPACE)
        environment = {
            "HPO_STUDIES": str(self.paths.dir.parent),
            IMPORTED: "tests.hpo.workers.faults",
            "CHAOS_FAULTS": str(self.faults),
        }
        self.command = Command([], self.folder, environment)
        self._read: BaseStorage | None = None

    # Reading the storage, by Optuna alone

    def trials(self) -> list[FrozenTrial]:
        """All attempts at all trials, by number; adds the finished ones to `seen`."""
        if not self.paths.study_yaml.exists():  # the storage is made before it
            return []
        if self._read is None:
            self._read = self._open()
        study = optuna.load_study(study_name="chaos", storage=self._read)
        trials = study.get_trials()
        for trial in trials:
            if trial.state in _FINISHED:
                self.seen.setdefault(trial.number, trial)
        return trials

    def _open(self) -> BaseStorage:
        if self.server is not None:
            return RDBStorage(self.server.url, engine_kwargs={"pool_pre_ping": True})
        return JournalStorage(JournalFileBackend(str(self.paths.journal)))

    def forget(self) -> None:
        """Close the storage, so that the next read starts anew."""
        if isinstance(self._read, RDBStorage):
            self._read.remove_session()
            self._read.engine.dispose()
        self._read = None

    def attempt(self, victim: Victim) -> FrozenTrial:
        """The attempt as it is now."""
        return self.trials()[victim.number]

    def victim(self) -> Victim:
        """Choose an attempt that has trained an epoch of its own, has a checkpoint, and is far from its end."""
        found: list[Victim] = []
        while not found:
            found = wait_until(self._victims, "a trial runs that has a checkpoint")
        return self.random.choice(found)

    def _victims(self) -> list[Victim]:
        self._see_that_it_runs()
        return [
            Victim(trial.number, trial.user_attrs["trial_index"], trial.user_attrs["lease"]["pid"], epoch)
            for trial in self.trials()
            if trial.state == TrialState.RUNNING
            and "lease" in trial.user_attrs
            and Path("/proc", str(trial.user_attrs["lease"]["pid"])).exists()
            and self.paths.checkpoint(trial.user_attrs["trial_index"]).exists()
            and max(2, trial.user_attrs.get("resumed_epoch", 0) + 1) <= (epoch := trial.last_step or 0) <= EPOCHS - 5
        ]

    # The run

    def start(self) -> None:
        """Run the command, at first and whenever an event has ended it."""
        storage = [] if self.server is None else ["--storage", self.server.url]
        options = ["--trials", str(self.total), "--workers", "2", "--retries", "100", *storage]
        self.command.arguments = ["chaos.yaml", *options]
        self.command.start()

    def strike(self, event: Event) -> None:
        """Strike a running trial; another one if it ended on its own just before."""
        while True:
            victim = self.victim()
            if event.strike(self, victim):
                self.struck.append((event, victim))
                self.note(f"{event.name}: {victim}")
                return

    def finish(self) -> None:
        """Wait until the study is over."""
        while self.command.ended() != 0:
            self._see_that_it_runs()
        self.note(f"finished {self.total} trials")

    def note(self, text: str) -> None:
        """Print what happened, which pytest shows after a failure."""
        print(f"{time.monotonic() - self.began:6.1f} s: {text}")

    def _see_that_it_runs(self) -> None:
        """Run the command again if the study ended before the events did, or no worker is left."""
        code = self.command.process.poll()
        if code is None:
            return
        said = self.command.said
        # A slot whose workers die three times without finishing a trial is not filled again.
        assert code == 0 or (code == 2 and "every worker dies early" in said), said
        if code == 0:
            self.total += 2
        self.start()

    def cut_off(self, victim: Victim) -> bool:
        """Wait until the attempt is over. Return whether it was cut off, not finished just before."""
        state = wait_until(lambda: self._ended(victim), "the struck attempt is over")
        return bool(state == TrialState.FAIL)

    def _ended(self, victim: Victim) -> TrialState | None:
        self._see_that_it_runs()
        state = self.attempt(victim).state
        return state if state.is_finished() else None


# The events


class Event(ABC):
    """A kind of failure."""

    name: ClassVar[str]
    repeats: ClassVar[int] = 1
    """The epochs that a trial may repeat because of it."""

    @abstractmethod
    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        """Inject the failure, and see that the run continues. Return False if it came too late for the victim."""


class WorkerKilled(Event):
    name = "SIGKILL of a worker"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        os.kill(victim.pid, signal.SIGKILL)
        return chaos.cut_off(victim)


class DriverKilled(Event):
    name = "SIGKILL of the driver"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        chaos.command.process.kill()
        chaos.command.process.wait()
        chaos.start()  # while the workers are still finishing their epochs
        return chaos.cut_off(victim)


class AllKilled(Event):
    name = "SIGKILL of all"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        chaos.command.kill_all()
        chaos.start()
        return chaos.cut_off(victim)


class DriverTerminated(Event):
    name = "SIGTERM of the driver"
    repeats = 0

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        chaos.command.process.terminate()
        assert chaos.command.ended() == 130, chaos.command.said
        assert "are done and safe; resume with\n  hpo run chaos.yaml" in chaos.command.said
        chaos.start()
        return chaos.cut_off(victim)


class JournalTorn(Event):
    """A record without its end, as a killed writer leaves it: the last report, cut in half, or half a record after
    another kind of last record, on which a process may have acted."""

    name = "torn journal"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        chaos.command.kill_all()
        journal = chaos.paths.journal
        before, _, last = journal.read_bytes().rstrip(b"\n").rpartition(b"\n")
        is_report = "intermediate_value" in json.loads(last)
        whole = before + b"\n" + (b"" if is_report else last + b"\n")
        journal.write_bytes(whole + last[: len(last) // 2])
        chaos.forget()
        chaos.start()
        return chaos.cut_off(victim)


class DiskFull(Event):
    name = "full disk"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        ballast = chaos.disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            _fill(file)
            try:
                code = chaos.command.process.wait(PATIENCE_S)
            finally:
                ballast.unlink()
        assert code == 2, chaos.command.said
        assert re.search(_FULL, chaos.command.said), chaos.command.said
        chaos.start()
        return chaos.cut_off(victim)


def _fill(file: IO[bytes]) -> None:
    """Write until not one page is left."""
    for size in (1 << 20, 4096):
        with contextlib.suppress(OSError):
            while file.write(bytes(size)) == size:
                pass


class ServerRestarted(Event):
    """The trial continues in its process."""

    name = "PostgreSQL restarted"

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        assert chaos.server is not None
        chaos.server.stop(chaos.random.choice(["fast", "immediate"]))
        time.sleep(chaos.random.uniform(0.2, 1))
        chaos.server.start()
        wait_until(
            lambda: (chaos.attempt(victim).last_step or 0) > victim.epoch,
            "the trial continues after the server's restart",
        )
        return True


class _Fault(Event):
    """The configuration's fault: the trial ends, and is not retried."""

    failure: ClassVar[str]

    def strike(self, chaos: Chaos, victim: Victim) -> bool:
        order = chaos.faults / str(victim.pid)
        written = order.with_suffix(".tmp")
        written.write_text(f"{self.failure} {victim.epoch}")
        written.rename(order)
        assert not chaos.cut_off(victim)
        order.unlink(missing_ok=True)
        return chaos.attempt(victim).user_attrs.get("failure") == self.failure


class Diverged(_Fault):
    name, failure = "NaN", "diverged"


class OutOfMemory(_Fault):
    name, failure = "out of memory", "oom"


ANYWHERE = (WorkerKilled, DriverKilled, AllKilled, DriverTerminated, Diverged, OutOfMemory)
"""Kinds that need no journal, no server, and no disk of its own."""


def plan(seed: int, events: int, *, disk: bool, server: bool) -> tuple[list[Event], list[Event]]:
    """Draw events for the journal's and the server's study; each kind as often as any other, or once more.

    Args:
        seed: of the order and of the more frequent kinds.
        events: their number.
        disk: whether studies can have a disk of their own.
        server: whether there is a server; without one all strike the journal's study.
    """
    draw = random.Random(seed)
    kinds: list[type[Event]] = [*ANYWHERE, JournalTorn]
    kinds += [DiskFull] if disk else []
    kinds += [ServerRestarted] if server else []
    each, rest = divmod(events, len(kinds))
    drawn = [*(kinds * each), *draw.sample(kinds, rest)]
    draw.shuffle(drawn)
    on_server = [
        kind is ServerRestarted or (server and kind is not JournalTorn and draw.random() < 0.2) for kind in drawn
    ]
    return (
        [kind() for kind, there in zip(drawn, on_server, strict=True) if not there],
        [kind() for kind, there in zip(drawn, on_server, strict=True) if there],
    )


def run(chaos: Chaos, events: Sequence[Event]) -> Results:
    """Run a study to its end through the events, and check all that does not need its twin.

    Raises:
        AssertionError: with the events so far, and the last output.
    """
    try:
        chaos.start()
        for event in events:
            chaos.strike(event)
        chaos.finish()
        check(chaos)
        return results(chaos)
    except BaseException as error:
        names = ", ".join(event.name for event in events)
        error.add_note(f"events: {names}; {len(chaos.struck)} had struck\n{chaos.command.said}")
        raise
    finally:
        chaos.command.kill_all()
        chaos.forget()


# The properties


def check(chaos: Chaos) -> None:
    """Check a study that is over, whatever struck it."""
    trials = chaos.trials()
    finished = [trial for trial in trials if trial.state in _FINISHED]

    # The exact total: each index finished once, and none runs.
    assert sorted(trial.user_attrs["trial_index"] for trial in finished) == list(range(chaos.total))
    assert TrialState.RUNNING not in {trial.state for trial in trials}

    # No finished trial lost, or changed.
    for number, seen in chaos.seen.items():
        assert trials[number] == seen

    # The trials with an injected fault failed by it; all others are complete.
    injected = {victim.number: event.failure for event, victim in chaos.struck if isinstance(event, _Fault)}
    assert {t.number: t.user_attrs["failure"] for t in finished if "failure" in t.user_attrs} == injected
    assert {trial.number for trial in finished if trial.state == TrialState.PRUNED} == injected.keys()

    for trial_index in range(chaos.total):
        check_resumed(chaos, [trial for trial in trials if trial.user_attrs["trial_index"] == trial_index])
    for said in chaos.command.all_said:
        assert "Traceback" not in said, said


def check_resumed(chaos: Chaos, attempts: Sequence[FrozenTrial]) -> None:
    """Check that each attempt at an index resumed where the last one ended, except for one epoch per kill."""
    victims = {victim.number: event for event, victim in chaos.struck}
    reached, cost, from_checkpoint = 0, 0, False
    for attempt in attempts:
        resumed = attempt.user_attrs.get("resumed_epoch", 0)
        # An attempt that was cut off before it recorded where it resumes is judged by its successor.
        if resumed or attempt.state in _FINISHED:
            assert reached - resumed <= cost, f"trial {attempt.number}: epoch {reached} was reached, {resumed} resumed"
            assert resumed > 0 or not from_checkpoint
            reached, cost, from_checkpoint = attempt.last_step or 0, 0, False
        else:
            reached = max(reached, attempt.last_step or 0)
        event = victims.get(attempt.number)
        cost += 1 if event is None else event.repeats
        from_checkpoint |= event is not None


def results(chaos: Chaos) -> Results:
    """The results of a study that is over."""
    timed = {"elapsed_s", "images_per_s"}
    return {
        trial.user_attrs["trial_index"]: (
            trial.user_attrs.get("failure", trial.state.name),
            trial.value,
            trial.params,
            trial.intermediate_values,
            [
                {name: value for name, value in json.loads(line).items() if name not in timed}
                for line in chaos.paths.trial_metrics(trial.number).read_text().splitlines()
            ],
        )
        for trial in chaos.trials()
        if trial.state in _FINISHED
    }


def check_twins(disturbed: Results, undisturbed: Results) -> None:
    """Check that every trial equals its undisturbed twin; one with an injected fault, up to there."""
    for trial_index, (how, value, params, reports, rows) in disturbed.items():
        _, twins_value, twins_params, twins_reports, twins_rows = undisturbed[trial_index]
        assert params == twins_params
        assert rows == twins_rows[: len(rows)]
        assert [epoch for epoch in reports if reports[epoch] != twins_reports[epoch]] == []
        if how == "COMPLETE":
            assert (value, len(rows)) == (twins_value, EPOCHS), f"trial index {trial_index}"


# The machine


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk at the folder, if this process may. Yields whether it did."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def own_server() -> Iterator[Server | None]:
    """A database server that may be stopped; None without PostgreSQL."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running_server())
        except pytest.skip.Exception:
            server = None
        yield server


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Callable[..., Command]]:
    """Yield a function that starts `hpo run …` in a folder; at the end, kill what is left of its processes."""
    commands: list[Command] = []

    def begin(*arguments: str) -> Command:
        commands.append(Command(arguments, folder, {}))
        commands[-1].start()
        return commands[-1]

    try:
        yield begin
    finally:
        for command in commands:
            command.kill_all()
