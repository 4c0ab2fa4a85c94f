"""Several trials of a study at once, each in a process: real processes, real signals, real digits."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from sklearn.datasets import load_digits

from core.config import TrainConfig
from core.data import load_dataset
from core.errors import UserError
from core.runtime import describe_device
from hpo.cli.console import StudyProgress
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.search.loop import KEPT_MODELS
from hpo.space import load_space
from hpo.study import Study, open_study
from hpo.trials import Outcome
from hpo.workers import Crew, Job, LocalProcesses, free_capacity, local, pool, run_workers, work
from hpo.workers.capacity import CONTEXT_BYTES, WORKER_BYTES, Capacity, occupy, peak_memory_bytes
from hpo.workers.local import main
from hpo.workers.messages import Share, without_networks
from hpo.workers.packing import Limit
from hpo.workers.tuning import Choice, Tuning
from tests.hpo.commands import SPACE, Start, hpo, started_runs
from tests.hpo.storage.journals import finished_of, trials_of

CPU = torch.device("cpu")
LONG = ("--set", "epochs=60")


@pytest.fixture
def space_file(tmp_path: Path) -> str:
    file = tmp_path / "own.yaml"
    file.write_text(SPACE)
    return str(file)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread and two are not bitwise the same: inline as in a worker of two, one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hpo_run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `hpo run` in this process; returns its exit code."""
    return hpo(monkeypatch, "run", *arguments)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `hpo run` as the head of a process group of its own, which the test's end ends."""
    with started_runs() as begin:
        yield begin


def running(study: Path) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials_of(study) if trial.state.name == "RUNNING"]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> Any:
    """The condition's value, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def at_work(study: Path, workers: int) -> list[int]:
    """The processes of the workers, once each of so many trains a trial; before, nothing."""
    busy = [trial for trial in running(study) if "lease" in trial.user_attrs and len(trial.intermediate_values) > 2]
    return [trial.user_attrs["lease"]["pid"] for trial in busy] if len(busy) == workers else []


def group_of(head: int) -> set[int]:
    """The living processes of a process group."""
    members = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == head and fields[0] not in "ZX":
            members.add(int(folder.name))
    return members


# Alike


@pytest.mark.slow
def test_several_workers_reach_exactly_the_total_and_what_one_process_alone_would(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (space_file, "--trials", "6", "--seed", "3")
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "alone"))
    assert hpo_run(monkeypatch, *arguments) == 0
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "together"))
    capsys.readouterr()
    assert hpo_run(monkeypatch, *arguments, "--per-device", "2") == 0
    said = capsys.readouterr().out
    together = tmp_path / "together/own"

    assert finished_of(together) == finished_of(tmp_path / "alone/own")
    assert sorted(finished_of(together)) == [0, 1, 2, 3, 4, 5]
    assert len(trials_of(together)) == 6
    assert all(trial.user_attrs["torch_threads"] == 1 for trial in trials_of(together))
    processes = {trial.user_attrs["lease"]["pid"] for trial in trials_of(together)}
    assert os.getpid() not in processes
    assert len(list(together.glob("trials/*/model.safetensors"))) == KEPT_MODELS
    assert "2 trials at once, each in a process with 1 thread\n" in said
    assert sum(line.startswith("trial ") and "complete" in line for line in said.splitlines()) == 6


def test_one_trial_at_once_needs_no_process(space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "main", None)
    assert hpo_run(monkeypatch, space_file, "--trials", "1", "--per-device", "1") == 0
    [trial] = trials_of(tmp_path / "studies/own")
    assert trial.user_attrs["lease"]["pid"] == os.getpid()


def test_relative_paths_and_the_images_of_a_person_reach_the_workers(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is changed after Python has noted where the process began."""
    source = load_digits()
    np.savez(tmp_path / "own.npz", x_train=source.images.astype(np.uint8), y_train=source.target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STUDIES", "here")
    arguments = ("own.yaml", "--trials", "2", "--data", "own.npz", "--per-device", "2")
    assert hpo_run(monkeypatch, *arguments) == 0
    assert sorted(finished_of(tmp_path / "here/own")) == [0, 1]


# Deaths


@pytest.mark.slow
def test_a_killed_workers_trial_goes_on_from_its_checkpoint_and_the_total_stays(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    arguments = (space_file, "--trials", "3", "--set", "epochs=25", "--set", "data.folds=2")
    study = tmp_path / "studies/own"
    process = start(*arguments, "--per-device", "2")

    def in_its_second_fold() -> Any:
        return next((trial for trial in running(study) if len(trial.intermediate_values) > 26), None)

    victim = wait_until(in_its_second_fold, process)
    os.kill(victim.user_attrs["lease"]["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"(trial {victim.number}, fold 2 of 2) was killed by SIGKILL; its trial is queued again; another" in said

    trial_index = victim.user_attrs["trial_index"]
    [again] = [t for t in trials_of(study) if t.user_attrs["trial_index"] == trial_index and t.state.name == "COMPLETE"]
    paths = StudyPaths(study)
    before, after = (
        [json.loads(line) for line in paths.trial_metrics(trial.number).read_text().splitlines()][:25]
        for trial in (victim, again)
    )
    assert before == after  # the very epochs, with the very seconds that they took: the first fold was not repeated
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "twin"))
    assert hpo_run(monkeypatch, *arguments) == 0
    assert finished_of(study) == finished_of(tmp_path / "twin/own")
    assert sorted(finished_of(study)) == [0, 1, 2]


@pytest.mark.slow
def test_ctrl_c_gives_every_trial_back_and_says_how_to_go_on(tmp_path: Path, space_file: str, start: Start) -> None:
    study = tmp_path / "studies/own"
    process = start(space_file, "--trials", "3", *LONG, "--per-device", "2")
    wait_until(lambda: at_work(study, 2), process)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to all
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "of 3 trials are done and safe; go on with" in said
    assert f"hpo run {space_file} --trials 3 --per-device 2 --set epochs=60" in said
    wait_until(lambda: not group_of(process.pid), seconds=30)  # Python's own helper leaves a moment later
    states = [trial.state.name for trial in trials_of(study)]
    assert "RUNNING" not in states
    assert states.count("WAITING") + states.count("COMPLETE") == 3


@pytest.mark.slow
def test_an_interrupt_while_the_workers_load_ends_them_too(tmp_path: Path, space_file: str, start: Start) -> None:
    process = start(space_file, "--trials", "3", *LONG, "--per-device", "2")
    wait_until(lambda: len(group_of(process.pid)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    wait_until(lambda: not group_of(process.pid), seconds=30)  # Python's own helper leaves a moment later
    assert not running(tmp_path / "studies/own")


def own_study(space_file: str, trials: int) -> tuple[Study, Job]:
    space = load_space(space_file)
    study = open_study(space, name="own", dataset=load_dataset(space.baseline.data))
    study.queue.ensure_trials(trials)
    return study, Job(space, "own", study.storage_url, None, False, Path.cwd())


def work_off(study: Study, job: Job, trials_at_once: int) -> StudyProgress:
    bars = StudyProgress(metric=study.metric, direction=study.direction, done=0, total=study.total or 0, best=None)
    with Interrupts() as interrupts, bars as progress:
        run_workers(
            study,
            job,
            engine=LocalProcesses(),
            crews=[Crew("cpu", "this CPU", trials_at_once, free_capacity(CPU).share, free_capacity(CPU).limit())],
            lane=progress.lane,
            interrupts=interrupts,
        )
    return bars


def the_second_dies(*arguments: Any) -> None:
    """A worker, but for one place."""
    if multiprocessing.current_process().name == "hpo worker 2":
        os.kill(os.getpid(), signal.SIGKILL)
    main(*arguments)


def every_one_dies(*arguments: Any) -> None:
    """No worker at all."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_where_one_dies_again_and_again_the_others_go_on(
    space_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "main", the_second_dies)
    study, job = own_study(space_file, 16)
    caplog.set_level(logging.WARNING)
    bars = work_off(study, job, 2)
    assert study.counts().complete == 16
    deaths = [record.message for record in caplog.records if "worker 2 was killed by SIGKILL" in record.message]
    assert 1 <= len(deaths) <= 1 + pool.REPLACEMENTS
    assert len(bars.progress.tasks) == 1  # the study's: no bar stays behind


@pytest.mark.slow
def test_where_none_can_live_the_run_ends_with_one_line_and_what_to_do(
    space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "main", every_one_dies)
    monkeypatch.setattr(pool, "REPLACEMENTS", 1)
    study, job = own_study(space_file, 2)
    with pytest.raises(
        StudyError,
        match=r"^study own: no worker lives for long, the last one was killed by SIGKILL; 0 of 2 trials are done .*"
        r"--per-device, and run the same command again$",
    ):
        work_off(study, job, 2)
    assert study.queue.waiting() == 2


def test_a_crash_that_every_worker_meets_stops_the_run_and_keeps_its_traceback(
    space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "REPLACEMENTS", 0)
    study, job = own_study(space_file, 4)
    study.paths.trials.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"^worker \d failed: (FileExists|NotADirectory)Error") as caught:
        work_off(study, job, 2)
    assert "hpo/search/objective.py" in str(caught.value.__cause__)
    assert study.queue.waiting() == 4
    assert study.counts().running == 0
    assert not multiprocessing.active_children()


def test_what_a_person_has_to_mend_is_said_in_one_line(space_file: str) -> None:
    study, job = own_study(space_file, 2)
    other = replace(job, space=load_space(space_file, ["loss.smoothing=0.2"]))
    with pytest.raises(StudyError, match="was begun with another space"):
        work_off(study, other, 1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "many", ""])
def test_a_number_that_is_none_is_one_line_and_exit_code_2(
    given: str, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo_run(monkeypatch, space_file, "--per-device", given) == 2
    assert capsys.readouterr().err == f"hpo: --per-device {given}: give a whole number from 1 on, or auto\n"


def test_a_password_is_in_no_description_of_a_job(space_file: str, tmp_path: Path) -> None:
    job = Job(load_space(space_file), "s", "postgresql://me:secret@host/db", None, False, tmp_path)
    assert "secret" not in repr(job)


def test_no_network_crosses_to_the_parent() -> None:
    network = SimpleNamespace(model=torch.nn.Linear(2, 2))
    outcome = Outcome(3, 1, "complete", 0.9, TrainConfig(), {}, results=(network,), rows=({"epoch": 1}, {"epoch": 2}))
    told = without_networks(outcome)
    assert told.results == ()
    assert told.rows == ({"epoch": 2},)
    assert (told.number, told.value) == (3, 0.9)


def test_each_worker_has_a_bar_while_it_trains() -> None:
    bars = StudyProgress(metric="accuracy", direction="maximize", done=0, total=4, best=None)
    lanes = [bars.lane(), bars.lane()]
    for number, lane in enumerate(lanes):
        lane.trial_started(f"trial {number}", TrainConfig())
    assert [task.description for task in bars.progress.tasks] == ["study", "trial 0", "trial 1"]
    lanes[0].trial_ended(Outcome(0, 0, "complete", 0.5, None, {}))
    assert [task.description for task in bars.progress.tasks] == ["study", "trial 1"]
    lanes[1].clear()
    assert [task.description for task in bars.progress.tasks] == ["study"]
    assert bars.progress.tasks[0].completed == 1


# What each may have


def test_the_threads_are_divided_and_each_has_at_least_one() -> None:
    machine = Capacity(threads=8, cores=8, memory_bytes=10**10, gpu_bytes=None)
    assert [machine.share(trials) for trials in (1, 2, 3, 16)] == [Share(n, None) for n in (8, 4, 2, 1)]


def test_the_shares_of_a_gpu_and_what_each_process_needs_besides_fit_what_is_free() -> None:
    gpu = Capacity(threads=16, cores=16, memory_bytes=70 * 2**30, gpu_bytes=80 * 2**30)
    for trials in (1, 2, 5, 50):
        fraction = gpu.share(trials).memory_fraction
        assert fraction is not None
        needed = trials * (fraction * 80 * 2**30 + CONTEXT_BYTES)
        assert needed == pytest.approx(70 * 2**30)
        gpu.check(trials, asked=str(trials))


@pytest.mark.parametrize(
    ("free", "gpu", "trials", "asked", "said"),
    [
        (70 * 2**30, 80 * 2**30, 200, "200", "200 processes do not fit the 75.2 GB of free GPU memory; give at most "
         "59"),
        (700 * 2**20, 80 * 2**30, 2, "2", "2 processes do not fit the 0.7 GB of free GPU memory; give at most 1"),
        (500 * 2**20, 80 * 2**30, 1, "auto", "not even one process fits what the GPU has free, 0.5 GB; end what else "
         "holds its memory, or give another --device"),
        (8 * WORKER_BYTES, None, 9, "9", "9 processes do not fit the 7.2 GB of free memory, at about 0.9 GB each; "
         "give at most 8"),
        (WORKER_BYTES // 2, None, 2, "2", "2 processes do not fit the 0.5 GB of free memory, at about 0.9 GB each; "
         "give at most 1"),
    ],
)  # fmt: skip
def test_more_processes_than_the_memory_holds_are_refused_in_one_line(
    free: int, gpu: int | None, trials: int, asked: str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        Capacity(threads=8, cores=8, memory_bytes=free, gpu_bytes=gpu).check(trials, asked=f"--per-device {asked}")
    assert str(refused.value) == f"--per-device {asked}: {said}"


def test_what_fits_is_not_refused_nor_is_one_alone_on_a_cpu() -> None:
    Capacity(threads=8, cores=8, memory_bytes=8 * WORKER_BYTES, gpu_bytes=None).check(8, asked="8")
    Capacity(threads=8, cores=8, memory_bytes=1, gpu_bytes=None).check(1, asked="auto")


def test_what_the_cpu_has_free_and_what_a_process_needs_are_measured() -> None:
    free = free_capacity(CPU)
    needed = peak_memory_bytes(CPU)
    assert 50 * 2**20 < needed < 50 * 2**30
    assert 0 < free.memory_bytes < 2**50
    assert free.limit().trials == free.cores >= 1


def test_a_workers_peak_is_its_own_and_not_its_parents() -> None:
    held = np.ones(2**26)  # 512 MiB, touched
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        childs = pool.apply(peak_memory_bytes, (CPU,))
    assert childs < peak_memory_bytes(CPU) - held.nbytes // 2


# The best number


class Workers:
    """Workers without processes: each trains one endless trial, as fast as the device's curve says.

    Args:
        together: number of trials -> how many times as fast they are together as one alone.
        queued: how many trials wait at first.
        memory_bytes: what each of them needs.
    """

    def __init__(self, together: Callable[[int], float], queued: int = 100, memory_bytes: int = 1) -> None:
        self.together, self.queued, self.memory_bytes = together, queued, memory_bytes
        self.alive: dict[int, str] = {}
        """Worker -> `loading`, `waiting`, or `training`."""
        self.told: list[tuple[Any, ...]] = []
        self.elapsed: dict[int, float] = {}
        self.epochs: dict[int, int] = {}
        self.tuning: Tuning

    @property
    def living(self) -> Collection[int]:
        return self.alive.keys()

    def open(self, number: int) -> None:
        assert number not in self.alive
        self.alive[number] = "loading"

    def begin(self, number: int) -> None:
        assert self.alive[number] != "loading"
        if self.alive[number] == "waiting":
            self.alive[number] = "training"
            self.queued -= 1
            self.elapsed[number], self.epochs[number] = 0.0, 0

    def retire(self, number: int) -> None:
        self.told.append(("retire", number))

    def share_among(self, trials: int) -> None:
        self.told.append(("share", trials))

    def waiting(self) -> int:
        return self.queued

    def all_ready(self) -> None:
        for number in sorted(self.alive):
            if self.alive[number] == "loading":
                self.alive[number] = "waiting"
                self.tuning.ready(number)

    def epoch(self) -> None:
        """Each that trains ends an epoch of 1,000 images, which takes a second where one is alone."""
        busy = [number for number, does in self.alive.items() if does == "training"]
        for number in busy:
            self.elapsed[number] += len(busy) / self.together(len(busy))
            self.epochs[number] += 1
            told = SimpleNamespace(epoch=self.epochs[number], images=1000, elapsed_s=self.elapsed[number])
            self.tuning.epoch_ended(number, f"trial {number}", told, self.memory_bytes)

    def end(self, number: int) -> None:
        del self.alive[number]
        self.tuning.ended(number)

    def tune(self, limit: Limit | None = None) -> Tuning:
        self.tuning = Tuning(self, limit or Limit(10**9))
        self.tuning.start()
        return self.tuning

    def live(self, epochs: int = 60) -> Choice | None:
        """What is chosen in so many epochs."""
        for _ in range(epochs):
            self.all_ready()
            self.epoch()
            if (choice := self.tuning.pop_choice()) is not None:
                return choice
        return None


@pytest.mark.parametrize(
    ("together", "best", "tried"),
    [(lambda n: 1.0, 1, 2), (lambda n: min(n, 2) * 0.9 + 0.1, 2, 4), (lambda n: min(n, 8.0), 8, 16)],
)
def test_the_first_trials_find_the_best_number_and_those_too_many_retire(
    together: Callable[[int], float], best: int, tried: int
) -> None:
    workers = Workers(together)
    tuning = workers.tune()
    choice = workers.live()
    assert choice is not None
    assert (choice.trials, tuning.number) == (best, best)
    assert workers.living == set(range(tried))
    assert workers.told[-(tried - best) :] == [("retire", number) for number in range(best, tried)]
    for number in range(best, tried):
        workers.end(number)
    assert workers.told[-1] == ("share", best)


def test_nothing_new_begins_before_the_old_have_been_timed_beside_all_that_is_loaded() -> None:
    workers = Workers(lambda n: n)
    workers.tune()
    assert workers.alive == {0: "loading", 1: "loading"}
    workers.all_ready()
    assert workers.alive == {0: "training", 1: "waiting"}
    for _ in range(4):
        assert workers.alive[1] == "waiting"
        workers.epoch()
    assert workers.alive == {0: "training", 1: "training"}


def test_the_memory_and_the_cores_bound_how_many_are_even_begun() -> None:
    workers = Workers(lambda n: n, memory_bytes=300)
    workers.tune(Limit(1000))
    assert (choice := workers.live()) is not None
    assert choice.trials == 2  # 3 × 300 fit, but not with a margin
    workers = Workers(lambda n: n)
    workers.tune(Limit(1000, 1, "the CPU has 1 core"))
    assert workers.living == {0}
    assert (choice := workers.live()) == Choice(1, "1 trial at once: the CPU has 1 core")


def test_a_study_that_ends_before_the_measuring_is_over_says_so() -> None:
    workers = Workers(lambda n: n, queued=1)
    tuning = workers.tune()
    assert workers.living == {0}
    why = "--per-device auto: not found out, too few trials are left to try 2 at once; going on with 1"
    assert workers.live() == Choice(1, why, measured=False)
    assert tuning.number == 1


def test_a_worker_that_ends_while_it_is_measured_leaves_the_best_so_far() -> None:
    workers = Workers(lambda n: n)
    tuning = workers.tune()
    while len(workers.living) < 4:
        workers.all_ready()
        workers.epoch()
    workers.end(0)
    assert tuning.number == 2
    assert ("retire", 2) in workers.told
    assert ("retire", 3) in workers.told
    why = "--per-device auto: not found out, worker 1 ended while it was measured; going on with 2"
    assert workers.live() == Choice(2, why, measured=False)


def test_a_worker_that_the_memory_turns_out_not_to_hold_ends_and_the_measuring_goes_on() -> None:
    workers = Workers(lambda n: n)
    tuning = workers.tune(Limit(1000))
    while len(workers.living) < 4:
        workers.all_ready()
        workers.epoch()
    workers.memory_bytes = 250  # 3 with a margin; 4 are loaded
    workers.all_ready()
    while ("retire", 3) not in workers.told:
        workers.epoch()
    workers.end(3)
    assert (choice := workers.live()) is not None
    assert choice.measured
    assert (choice.trials, tuning.number) == (3, 3)
    assert workers.living == {0, 1, 2}


@pytest.mark.parametrize(("cores", "number"), [(8, 4), (2, 2)])
def test_a_remembered_number_counts_on_its_host_alone_and_as_far_as_there_is_room(
    cores: int, number: int, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, job = own_study(space_file, 1)
    room = Capacity(threads=1, cores=cores, memory_bytes=100 * WORKER_BYTES, gpu_bytes=None)
    monkeypatch.setattr(work, "free_capacity", lambda device: room)
    study.remember_packing(describe_device(CPU), 4, "4 trials at once: because")
    assert work.known_best(study, job.space, CPU) == number
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert work.known_best(study, job.space, CPU) is None


def test_auto_with_one_epoch_says_that_it_cannot_measure_and_starts_no_worker(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "main", None)
    assert hpo_run(monkeypatch, space_file, "--set", "epochs=1", "--trials", "2", "--per-device", "auto") == 0
    assert "--per-device auto: not found out, an epoch can only be timed after another one" in capsys.readouterr().out
    assert {trial.user_attrs["lease"]["pid"] for trial in trials_of(tmp_path / "studies/own")} == {os.getpid()}


def test_more_trials_than_cores_are_warned_of(
    space_file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    room = Capacity(threads=1, cores=1, memory_bytes=100 * WORKER_BYTES, gpu_bytes=None)
    monkeypatch.setattr(work, "free_capacity", lambda device: room)
    monkeypatch.setattr(work, "run_workers", lambda study, *_, **__: study.queue.ensure_trials(0))
    assert hpo_run(monkeypatch, space_file, "--trials", "2", "--per-device", "2") == 0
    warning = "--per-device 2: the CPU has 1 core, and more trials at once only wait for each other"
    assert capfd.readouterr().err == f"warning: {warning}\n"


def test_the_first_one_begins_though_the_one_that_was_to_join_it_died_loading() -> None:
    workers = Workers(lambda n: n)
    workers.tune()
    workers.end(1)
    workers.all_ready()
    assert workers.alive == {0: "training"}


@pytest.mark.slow
def test_auto_measures_chooses_says_so_and_remembers_it(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (space_file, "--set", "epochs=50", "--per-device", "auto", "--trials")
    assert hpo_run(monkeypatch, *arguments, "3") == 0
    assert sorted(finished_of(tmp_path / "studies/own")) == [0, 1, 2]
    said, logged = capfd.readouterr()
    assert "the first trials find out how many at once" in said
    [choice] = [line for line in logged.splitlines() if "at once: " in line]

    assert hpo_run(monkeypatch, *arguments, "4") == 0
    assert sorted(finished_of(tmp_path / "studies/own")) == [0, 1, 2, 3]
    assert f"as measured on this device before: {choice}\n" in capfd.readouterr().out


# On a GPU


@pytest.mark.gpu
def test_two_workers_share_a_gpu(tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hpo_run(monkeypatch, space_file, "--trials", "4", "--device", "cuda", "--per-device", "2") == 0
    assert sorted(finished_of(tmp_path / "studies/own")) == [0, 1, 2, 3]


@pytest.mark.gpu
def test_a_worker_cannot_take_more_of_a_gpu_than_its_share() -> None:
    device = torch.device("cuda:0")
    capacity = free_capacity(device)
    share = capacity.share(4)
    occupy(share, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(capacity.memory_bytes // 3, dtype=torch.uint8, device=device)
        torch.empty(capacity.memory_bytes // 8, dtype=torch.uint8, device=device)
        assert peak_memory_bytes(device) >= capacity.memory_bytes // 8
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
