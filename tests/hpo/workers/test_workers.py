"""Several trials of a study at once, in real processes with real signals, on digits."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from sklearn.datasets import load_digits

from core.data import load_dataset
from core.errors import GraphError, UserError
from core.loop import EpochMetrics
from core.loop.run import Run
from core.runtime import describe_device
from hpo.cli.progress import StudyProgress
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.search.weights import DEFAULTS
from hpo.space import load_space
from hpo.study import Study, open_study
from hpo.trials import CRASHES
from hpo.workers import calibration, local, pool, work
from hpo.workers.calibration import Choice
from hpo.workers.capacity import (
    CONTEXT_BYTES,
    WORKER_BYTES,
    Capacity,
    free_capacity,
    occupy,
    runs_mps,
    used_memory_bytes,
)
from hpo.workers.engine import Resources, WorkerSlot, WorkerSpec, worker_slots
from hpo.workers.local import LocalProcesses, main
from hpo.workers.placement import Placement
from hpo.workers.pool import run_workers
from tests.hpo.commands import Start, hpo
from tests.hpo.storage.journals import finished_of, trials_of
from tests.hpo.workers.processes import group_of, wait_until

CPU = torch.device("cpu")
LONG = ("--set", "epochs=60")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads do not add in the same order as one, which each of two workers has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hpo_run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `hpo run` in this process and return its exit code."""
    return hpo(monkeypatch, "run", *arguments)


def running(study: Path) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in trials_of(study) if trial.state.name == "RUNNING"]


def at_work(study: Path, workers: int) -> list[int]:
    """The processes of the workers, once so many train; empty before."""
    busy = [trial for trial in running(study) if "lease" in trial.user_attrs and len(trial.intermediate_values) > 2]
    return [trial.user_attrs["lease"]["pid"] for trial in busy] if len(busy) == workers else []


@contextmanager
def meanwhile(strike: Callable[[], None]) -> Iterator[None]:
    """Call the function in a thread while the block runs; its failure is the block's."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            strike()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not errors, errors


# The same results


@pytest.mark.slow
def test_several_workers_reach_exactly_the_total_with_the_results_of_one_process(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (space_file, "--trials", "4", "--seed", "3")
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "alone"))
    assert hpo_run(monkeypatch, *arguments) == 0
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "together"))
    capsys.readouterr()
    assert hpo_run(monkeypatch, *arguments, "--per-device", "2") == 0
    said = capsys.readouterr().out
    together = tmp_path / "together/own"

    assert finished_of(together) == finished_of(tmp_path / "alone/own")
    assert sorted(finished_of(together)) == [0, 1, 2, 3]
    assert len(trials_of(together)) == 4
    assert all(trial.user_attrs["torch_threads"] == 1 for trial in trials_of(together))
    processes = {trial.user_attrs["lease"]["pid"] for trial in trials_of(together)}
    assert os.getpid() not in processes
    assert len(list(together.glob("trials/*/model.safetensors"))) == DEFAULTS.keep
    assert "2 trials at once, each in a process with 1 thread\n" in said
    assert sum(line.startswith("trial ") and "complete" in line for line in said.splitlines()) == 4


def test_one_trial_at_once_needs_no_process(space_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "main", None)
    assert hpo_run(monkeypatch, space_file, "--trials", "1", "--per-device", "1") == 0
    [trial] = trials_of(tmp_path / "studies/own")
    assert trial.user_attrs["lease"]["pid"] == os.getpid()


def test_relative_paths_and_the_users_images_reach_the_workers(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory changes after Python has stored the initial one."""
    source = load_digits()
    np.savez(tmp_path / "own.npz", x_train=source.images.astype(np.uint8), y_train=source.target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_STUDIES", "here")
    arguments = ("own.yaml", "--trials", "2", "--data", "own.npz", "--per-device", "2")
    assert hpo_run(monkeypatch, *arguments) == 0
    assert sorted(finished_of(tmp_path / "here/own")) == [0, 1]


# Deaths


def test_a_killed_workers_trial_resumes_from_its_checkpoint_and_the_total_stays(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = (space_file, "--trials", "2", "--set", "epochs=10", "--set", "data.folds=2")
    study = tmp_path / "studies/own"
    victims: list[optuna.trial.FrozenTrial] = []

    def kill_one_in_its_second_fold() -> None:
        def found() -> Any:
            return study.exists() and next((t for t in running(study) if len(t.intermediate_values) > 11), None)

        victims.append(wait_until(found, "a trial is in its second fold"))
        os.kill(victims[0].user_attrs["lease"]["pid"], signal.SIGKILL)

    end = pool._Supervisor._end

    def end_later(supervisor: Any, slot: WorkerSlot) -> None:
        supervisor.study.queue.reclaim()  # as another process of the study may
        end(supervisor, slot)

    monkeypatch.setattr(pool._Supervisor, "_end", end_later)
    with meanwhile(kill_one_in_its_second_fold):
        assert hpo_run(monkeypatch, *arguments, "--per-device", "2") == 0
    [victim] = victims
    said = capfd.readouterr().err
    assert f"(trial {victim.number}, fold 2 of 2) was killed by SIGKILL; its trial is queued again; another" in said

    trial_index = victim.user_attrs["trial_index"]
    [again] = [t for t in trials_of(study) if t.user_attrs["trial_index"] == trial_index and t.state.name == "COMPLETE"]
    paths = StudyPaths(study)
    before, after = (
        [json.loads(line) for line in paths.trial_metrics(trial.number).read_text().splitlines()][:10]
        for trial in (victim, again)
    )
    assert before == after  # the very epochs, with the very seconds that they took: the first fold was not repeated
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "twin"))
    assert hpo_run(monkeypatch, *arguments) == 0
    assert finished_of(study) == finished_of(tmp_path / "twin/own")
    assert sorted(finished_of(study)) == [0, 1]


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_behind_and_its_workers_give_their_trials_back(
    tmp_path: Path, space_file: str, start: Start
) -> None:
    study = tmp_path / "studies/own"
    process = start(space_file, "--trials", "3", *LONG, "--per-device", "2")
    workers = wait_until(lambda: at_work(study, 2), "two workers train", process=process)
    assert {process.pid, *workers} < group_of(process.pid)  # the server is there too
    process.kill()
    process.wait()
    wait_until(lambda: not group_of(process.pid), "all processes have ended", seconds=60)
    assert not running(study)
    assert [trial.state.name for trial in trials_of(study)].count("WAITING") >= 1


@pytest.mark.slow
def test_ctrl_c_gives_every_trial_back_and_prints_how_to_resume(tmp_path: Path, space_file: str, start: Start) -> None:
    study = tmp_path / "studies/own"
    process = start(space_file, "--trials", "3", *LONG, "--per-device", "2")
    wait_until(lambda: at_work(study, 2), "two workers train", process=process)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to all
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "of 3 trials are done and safe; resume with" in said
    assert f"hpo run {space_file} --trials 3 --per-device 2 --set epochs=60" in said
    wait_until(lambda: not group_of(process.pid), "all processes have ended", seconds=30)  # a helper of Python is last
    states = [trial.state.name for trial in trials_of(study)]
    assert "RUNNING" not in states
    assert states.count("WAITING") + states.count("COMPLETE") == 3


@pytest.mark.slow
def test_an_interrupt_while_the_workers_load_ends_them_too(tmp_path: Path, space_file: str, start: Start) -> None:
    process = start(space_file, "--trials", "3", *LONG, "--per-device", "2")
    # The command, a server, its tracker, and a worker.
    wait_until(lambda: len(group_of(process.pid)) >= 4, "a worker has started", process=process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    wait_until(lambda: not group_of(process.pid), "all processes have ended", seconds=30)  # a helper of Python is last
    assert not running(tmp_path / "studies/own")


def own_study(space_file: str, trials: int) -> tuple[Study, WorkerSpec]:
    space = load_space(space_file)
    study = open_study(space, name="own", dataset=load_dataset(space.baseline.data))
    study.queue.ensure_trials(trials)
    return study, WorkerSpec(space, "own", study.storage_url, None, False, Path.cwd())


def run_trials(study: Study, spec: WorkerSpec, trials_at_once: int) -> StudyProgress:
    slots = worker_slots("cpu", trials_at_once, free_capacity(CPU).share(trials_at_once))
    with Interrupts() as interrupts, StudyProgress(study) as progress:
        run_workers(study, spec, engine=LocalProcesses(), slots=slots, progress=progress, interrupts=interrupts)
    return progress


def the_second_dies(*arguments: Any) -> None:
    """Run a worker, except in the second slot."""
    if multiprocessing.current_process().name == "hpo worker 2":
        os.kill(os.getpid(), signal.SIGKILL)
    main(*arguments)


def every_one_dies(*arguments: Any) -> None:
    """Die instead of running a worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def graphs_fail(*arguments: Any) -> None:
    """Run a worker in which capturing a step after the first epoch fails."""
    sound = Run.epoch

    def epoch(training: Run, *, final: bool) -> EpochMetrics:
        if training.config.precision.cuda_graphs and training.history:
            raise GraphError("recording a step failed")
        return sound(training, final=final)

    Run.epoch = epoch  # type: ignore[method-assign]
    main(*arguments)


def test_a_worker_whose_graphs_fail_is_replaced_and_its_trial_continues_without(
    space_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "main", graphs_fail)
    monkeypatch.setattr(pool, "REPLACEMENTS", 0)  # it is not to blame
    study, spec = own_study(space_file, 2)
    run_trials(study, spec, 1)
    assert study.counts().complete == 2
    assert [trial.state.name for trial in study.optuna.trials].count("FAIL") == 1
    assert not any(CRASHES in trial.user_attrs for trial in study.optuna.trials)
    assert "recording a step failed; after a restart, the study trains model.name resnet without" in caplog.messages
    assert any(
        "can no longer use its GPU; its trial is queued again; another takes its place" in line
        for line in caplog.messages
    )


def test_if_one_worker_dies_repeatedly_the_others_continue(
    space_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "main", the_second_dies)
    study, spec = own_study(space_file, 6)
    caplog.set_level(logging.WARNING)
    progress = run_trials(study, spec, 2)
    assert study.counts().complete == 6
    deaths = [record.message for record in caplog.records if "worker 2 was killed by SIGKILL" in record.message]
    assert 1 <= len(deaths) <= 1 + pool.REPLACEMENTS
    assert len(progress.progress.tasks) == 1  # the study's: no bar stays behind


def test_if_every_worker_dies_the_run_ends_with_a_one_line_error_and_the_fix(
    space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "main", every_one_dies)
    monkeypatch.setattr(pool, "REPLACEMENTS", 1)
    study, spec = own_study(space_file, 2)
    with pytest.raises(
        StudyError,
        match=r"^study own: every worker dies early, the last one was killed by SIGKILL; 0 of 2 trials are done .*"
        r"--per-device, then run the same command again$",
    ):
        run_trials(study, spec, 2)
    assert study.queue.waiting() == 2


def test_a_crash_that_every_worker_meets_stops_the_run_and_keeps_its_traceback(
    space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "REPLACEMENTS", 0)
    study, spec = own_study(space_file, 4)
    study.paths.trials.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"^worker \d failed: (FileExists|NotADirectory)Error") as caught:
        run_trials(study, spec, 2)
    assert "hpo/search/objective.py" in str(caught.value.__cause__)
    assert study.queue.waiting() == 4
    assert study.counts().running == 0
    assert not multiprocessing.active_children()


def test_a_workers_error_that_the_user_has_to_fix_is_one_line(space_file: str) -> None:
    study, spec = own_study(space_file, 2)
    other = replace(spec, space=load_space(space_file, ["loss.smoothing=0.2"]))
    with pytest.raises(StudyError, match="was begun with another space"):
        run_trials(study, other, 1)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "many", ""])
def test_an_invalid_number_is_a_one_line_error_with_exit_code_2(
    given: str, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo_run(monkeypatch, space_file, "--per-device", given) == 2
    assert capsys.readouterr().err == f"hpo: --per-device {given}: give a whole number from 1 on, or auto\n"


def test_the_repr_of_a_spec_hides_the_password(space_file: str, tmp_path: Path) -> None:
    spec = WorkerSpec(load_space(space_file), "s", "postgresql://me:secret@host/db", None, False, tmp_path)
    assert "secret" not in repr(spec)


def test_an_output_that_a_killed_worker_cut_off_ends_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "main", half_a_record)
    spec: Any = None
    worker = LocalProcesses().start(spec, *worker_slots("cpu", 1, Resources(1, None)))
    wait_until(lambda: worker.ended, "the worker has ended")
    assert worker.output() == []
    assert worker.close(1.0).words == "was killed by SIGKILL"


def half_a_record(*arguments: Any) -> None:
    os.write(arguments[-1].fileno(), b"\0\0\1\0half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_worker_starts_without_cuda_and_with_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the other tests already runs, and was started without these variables."""
    monkeypatch.setenv(local.VISIBLE, "3,5")
    with ProcessPoolExecutor(1, mp_context=local.start_method()) as processes:
        entry = local.in_child("cuda:1", lambda: None)
        assert entry[0][local.VISIBLE] == "5"
        assert processes.submit(torch.cuda.is_initialized).result() is False


# Resources


def test_the_threads_are_divided_and_each_has_at_least_one() -> None:
    machine = Capacity(threads=8, cores=8, memory_bytes=10**10, gpu_bytes=None)
    assert [machine.share(trials) for trials in (1, 2, 3, 16)] == [Resources(n, None) for n in (8, 4, 2, 1)]


def test_the_shares_of_a_gpu_add_up_to_its_free_memory() -> None:
    gpu = Capacity(threads=16, cores=16, memory_bytes=70 * 2**30, gpu_bytes=80 * 2**30)
    for trials in (1, 2, 5, 50):
        fraction = gpu.share(trials).memory_fraction
        assert fraction is not None
        assert trials * fraction * 80 * 2**30 == pytest.approx(70 * 2**30)
        gpu.check(trials, asked=str(trials))


@pytest.mark.parametrize(
    ("free", "gpu", "trials", "asked", "said"),
    [
        (70 * 2**30, 80 * 2**30, 200, "200", "200 processes do not fit the 75.2 GB of free GPU memory; give at most "
         "59"),
        (700 * 2**20, 80 * 2**30, 2, "2", "2 processes do not fit the 0.7 GB of free GPU memory; give at most 1"),
        (500 * 2**20, 80 * 2**30, 1, "auto", "not even one process fits the GPU's free memory, 0.5 GB; end other "
         "programs that use it, or give another --device"),
        (8 * WORKER_BYTES, None, 9, "9", "9 processes do not fit the 7.2 GB of free memory, at about 0.9 GB each; "
         "give at most 8"),
        (WORKER_BYTES // 2, None, 2, "2", "2 processes do not fit the 0.5 GB of free memory, at about 0.9 GB each; "
         "give at most 1"),
    ],
)  # fmt: skip
def test_more_processes_than_the_memory_holds_is_a_one_line_error(
    free: int, gpu: int | None, trials: int, asked: str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        Capacity(threads=8, cores=8, memory_bytes=free, gpu_bytes=gpu).check(trials, asked=f"--per-device {asked}")
    assert str(refused.value) == f"--per-device {asked}: {said}"


def test_processes_that_fit_are_accepted_and_a_single_one_on_a_cpu_always() -> None:
    Capacity(threads=8, cores=8, memory_bytes=8 * WORKER_BYTES, gpu_bytes=None).check(8, asked="8")
    Capacity(threads=8, cores=8, memory_bytes=1, gpu_bytes=None).check(1, asked="auto")


def test_the_free_memory_of_a_cpu_and_the_use_of_a_process_are_measured() -> None:
    free = free_capacity(CPU)
    needed = used_memory_bytes(CPU)
    assert 50 * 2**20 < needed < 50 * 2**30
    assert 0 < free.memory_bytes < 2**50
    assert free.useful == free.cores >= 1


GB = 2**30


def memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int, peak: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak)


@pytest.mark.parametrize(
    ("free_before", "used"),
    [
        (None, 5 * GB + CONTEXT_BYTES),
        (79 * GB, 5 * GB + 2 * GB),  # 6 GB are gone, of which the allocator holds 4
        (60 * GB, 5 * GB + CONTEXT_BYTES),  # another program has ended since
    ],
)
def test_the_memory_of_a_gpus_process_includes_what_its_allocator_does_not_hold(
    free_before: int | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_of_a_gpu(monkeypatch, free=73 * GB, reserved=4 * GB, peak=5 * GB)
    assert used_memory_bytes(torch.device("cuda:0"), free_before) == used


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which CUDA looks for MPS; short, since a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", folder)
        yield Path(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="MPS is Linux's")
def test_mps_runs_while_its_control_daemon_accepts_connections(pipes: Path) -> None:
    assert not runs_mps()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(pipes / "control"))
        daemon.listen()
        assert runs_mps()
    assert (pipes / "control").exists()  # a daemon that was killed leaves it
    assert not runs_mps()


@pytest.mark.parametrize("mps", [False, True])
@pytest.mark.parametrize(("device", "size"), [("cuda:0", 1), ("cuda:0", 3), ("cpu", 3)])
def test_trials_that_share_a_gpu_without_mps_are_announced(
    device: str, size: int, mps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "runs_mps", lambda: mps)
    said: list[str] = []
    placement = Placement((torch.device(device),), (size,), in_processes=True, asked="--per-device")
    of_this = SimpleNamespace(say=said.append, placement=placement)
    gpu_bytes = 80 * GB if device == "cuda:0" else None
    capacity = Capacity(threads=8, cores=8, memory_bytes=60 * GB, gpu_bytes=gpu_bytes)
    slots = work.Work._slots_on(of_this, torch.device(device), size, capacity)  # type: ignore[arg-type]
    assert len(slots) == size
    assert any("NVIDIA MPS is not running: the 3 trials on cuda:0" in line for line in said) is (
        device == "cuda:0" and size == 3 and not mps
    )


def test_a_number_measured_without_mps_is_measured_again_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "describe_device", str)
    gpu, names = torch.device("cuda:0"), []
    for mps in (False, True):
        monkeypatch.setattr(work, "runs_mps", lambda mps=mps: mps)
        names.append(work._sharing(gpu))
        assert work._sharing(CPU) == "cpu"
    assert names == ["cuda:0", "cuda:0 with MPS"]


# The number of trials at once


@pytest.mark.parametrize(("cores", "number"), [(8, 4), (2, 2)])
def test_a_stored_number_of_trials_at_once_is_used_on_its_host_only_and_within_the_free_room(
    cores: int, number: int, space_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = own_study(space_file, 4)
    room = Capacity(threads=1, cores=cores, memory_bytes=100 * WORKER_BYTES, gpu_bytes=None)
    monkeypatch.setattr(work, "free_capacity", lambda device: room)
    monkeypatch.setattr(work, "calibrate", lambda *_: Choice(1, "measured again"))
    sizes: list[int] = []

    def seen(study: Study, *_: Any, slots: list[WorkerSlot], **__: Any) -> bool:
        sizes.append(len(slots))
        study.queue.ensure_trials(0)
        return True

    monkeypatch.setattr(work, "run_workers", seen)
    study.settings.set_packing(describe_device(CPU), 4, "4 trials at once: because")
    assert hpo_run(monkeypatch, space_file, "--trials", "4", "--per-device", "auto") == 0
    assert sizes == [number]
    assert "as measured on this device before: 4 trials at once: because\n" in capsys.readouterr().out
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert hpo_run(monkeypatch, space_file, "--trials", "4", "--per-device", "auto") == 0
    assert "measured again\n" in capsys.readouterr().out


def test_more_trials_than_cores_give_a_warning(
    space_file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    room = Capacity(threads=1, cores=1, memory_bytes=100 * WORKER_BYTES, gpu_bytes=None)
    monkeypatch.setattr(work, "free_capacity", lambda device: room)
    monkeypatch.setattr(work, "run_workers", lambda study, *_, **__: study.queue.ensure_trials(0))
    assert hpo_run(monkeypatch, space_file, "--trials", "2", "--per-device", "2") == 0
    warning = "--per-device 2: the CPU has 1 core, and more trials at once only wait for each other"
    assert capfd.readouterr().err == f"warning: {warning}\n"


def test_auto_measures_explains_its_choice_and_stores_it(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "_WINDOW_S", 0.2)
    arguments = (space_file, "--per-device", "auto", "--trials")
    assert hpo_run(monkeypatch, *arguments, "1") == 0
    assert "--per-device auto: not measured, too few trials are left; continuing with 1\n" in capfd.readouterr().out
    assert hpo_run(monkeypatch, *arguments, "3") == 0
    lines = capfd.readouterr().out.splitlines()
    measured = lines.index("measuring how many trials at once train the most images per second")
    choice = lines[measured + 1]
    assert re.match(r"\d trials? at once: [\d,]+ images/s", choice)

    assert hpo_run(monkeypatch, *arguments, "4") == 0
    assert sorted(finished_of(tmp_path / "studies/own")) == [0, 1, 2, 3]
    assert f"as measured on this device before: {choice}\n" in capfd.readouterr().out


# On a GPU


@pytest.mark.gpu
def test_two_workers_share_a_gpu(tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hpo_run(monkeypatch, space_file, "--trials", "4", "--device", "cuda", "--per-device", "2") == 0
    assert sorted(finished_of(tmp_path / "studies/own")) == [0, 1, 2, 3]


@pytest.mark.gpu
def test_a_worker_cannot_exceed_its_share_of_a_gpu() -> None:
    device = torch.device("cuda:0")
    capacity = free_capacity(device)
    share = capacity.share(4)
    occupy(share, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(capacity.memory_bytes // 3, dtype=torch.uint8, device=device)
        torch.empty(capacity.memory_bytes // 8, dtype=torch.uint8, device=device)
        assert used_memory_bytes(device) >= capacity.memory_bytes // 8
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_the_memory_outside_of_the_allocator_is_measured_in_a_process_alone(space_file: str) -> None:
    _, spec = own_study(space_file, 4)
    device = torch.device("cuda:0")
    measured = calibration._side_by_side(spec, str(device), free_capacity(device).share(1), 1)
    assert measured.memory_bytes >= CONTEXT_BYTES
