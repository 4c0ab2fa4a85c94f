"""A study on a Ray cluster: two real nodes on this machine, real kills, a real PostgreSQL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

import hpo.workers.ray
from core.data import load_dataset
from hpo.cli.progress import StudyProgress
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.space import load_space
from hpo.storage import open_storage
from hpo.study import open_study
from hpo.workers.engine import WorkerSpec, worker_slots
from hpo.workers.pool import run_workers
from hpo.workers.ray import Node, RayEngine
from hpo.workers.ray_actor import Items, on_node
from tests.hpo.commands import SPACE, Start
from tests.hpo.storage.postgresql import Server, free_port, running_server
from tests.hpo.workers.processes import wait_until

ray = pytest.importorskip("ray")

STORE_BYTES = 80 * 2**20  # the least that Ray takes; it holds nothing of ours
# Ray notices within a second that a node is lost.
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 250, "health_check_failure_threshold": 3}


@pytest.fixture
def space_file(tmp_path: Path) -> str:
    """The search space `own` with a network that needs no timm, which takes each worker seconds to import."""
    file = tmp_path / "own.yaml"
    file.write_text(SPACE.replace("{widths:", "{name: vgg, widths:"))
    return str(file)


class Watched:
    """A server and its study `own`."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.storage = open_storage(server.url)
        self.engine: Any = self.storage._backend.engine  # type: ignore[attr-defined]
        self.delay_reports(0)
        with self.engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE TRIGGER delayed BEFORE INSERT ON trial_intermediate_values "
                "FOR EACH ROW EXECUTE FUNCTION delay()"
            )

    def delay_reports(self, seconds: float) -> None:
        """Delay each epoch's report, so that a trial lasts a while without using the processor."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql AS "
                f"'BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END'"
            )

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """The study's trials; none before it exists."""
        names = {study.study_name: study._study_id for study in self.storage.get_all_studies()}
        return self.storage.get_all_trials(names["own"]) if "own" in names else []

    def at_work(self) -> dict[int, optuna.trial.FrozenTrial]:
        """Process -> the trial of which it has trained some epochs."""
        return {
            trial.user_attrs["lease"]["pid"]: trial
            for trial in self.trials()
            if trial.state.name == "RUNNING" and "lease" in trial.user_attrs and len(trial.intermediate_values) > 3
        }

    def finished(self) -> dict[int, float | None]:
        """Trial index -> the value of its finished trial."""
        done = [trial for trial in self.trials() if trial.state.name in ("COMPLETE", "PRUNED")]
        trial_indices = [trial.user_attrs["trial_index"] for trial in done]
        assert len(trial_indices) == len(set(trial_indices))
        return {trial.user_attrs["trial_index"]: trial.value for trial in done}


@pytest.fixture
def server() -> Iterator[Watched]:
    with running_server() as started:
        watched = Watched(started)
        yield watched
        watched.engine.dispose()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each. The first is the head's."""
    from ray.cluster_utils import Cluster

    with (
        pytest.MonkeyPatch.context() as environment,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # a socket's path has at most 107 bytes
    ):
        environment.setenv("RAY_TMPDIR", folder)
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("OMP_NUM_THREADS", "1")
        for variable in ("HPO_STUDIES", "HPO_CACHE", "HPO_DATA"):
            environment.setenv(variable, f"{folder}/{variable}")
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False, _system_config=SOON)
            nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            yield nodes
        finally:
            nodes.shutdown()


def two_at_work(server: Watched, process: subprocess.Popen[str], *, but: Iterable[int] = ()) -> dict[int, Any]:
    """Process -> trial, once two processes other than those train."""

    def found() -> dict[int, Any]:
        busy = {pid: trial for pid, trial in server.at_work().items() if pid not in set(but)}
        return busy if len(busy) == 2 else {}

    return dict(wait_until(found, "two workers train", process=process))


def raylet_of(node: Any) -> int:
    """The process of a node that has started the workers on it."""
    return int(node.all_processes["raylet"][0].process.pid)


# Nodes that share no folder


@pytest.mark.slow
def test_nodes_that_share_no_folder_keep_their_files_in_the_artifact_store(
    tmp_path: Path, space_file: str, server: Watched, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's folder of studies is hidden from the nodes, which are on one disk with it here."""
    monkeypatch.setattr(hpo.workers.ray, "_studies_of", lambda spec: tmp_path / "not" / "there")
    space = load_space(space_file)
    study = open_study(space, name="own", dataset=load_dataset(space.baseline.data), storage_url=server.url)
    study.files.use_store(str(tmp_path / "depot"))
    study.queue.ensure_trials(4)
    spec = replace(a_spec(space_file, server.url), store_url=str(tmp_path / "depot"))
    with Interrupts() as interrupts, StudyProgress(study) as progress, closing(RayEngine(cluster.address)) as engine:
        assert {node.cpus for node in engine.nodes()} == {1.0}
        assert engine.room() == 2
        slots = worker_slots("cpu", 2, engine.resources())
        run_workers(study, spec, engine=engine, slots=slots, progress=progress, interrupts=interrupts)

    assert sorted(server.finished()) == [0, 1, 2, 3]
    assert not list(study.paths.dir.glob("trials/*"))
    depot = StudyPaths(tmp_path / "depot" / "own")
    best = study.best_trial()
    assert best is not None
    assert depot.trial_model(best.number).is_file()
    assert len(list(depot.artifacts.iterdir())) >= 4 * 2
    assert not list(depot.checkpoint(0).parent.glob("*"))
    study.optuna._storage._backend.engine.dispose()  # type: ignore[attr-defined]


# Deaths


@pytest.mark.slow
def test_a_study_on_two_nodes_survives_preemption_a_kill_ctrl_c_and_the_loss_of_a_node(
    space_file: str, server: Watched, cluster: Any, start: Start
) -> None:
    """The last test on the cluster: one of its nodes is lost."""
    arguments = [space_file, "--engine", "ray", "--address", cluster.address, "--storage", server.url]
    arguments += ["--study", "own", "--set", "epochs=20", "--trials", "5"]
    server.delay_reports(0.3)
    process = start(*arguments)
    busy = two_at_work(server, process)
    preempted, killed = busy
    os.kill(preempted, signal.SIGTERM)
    os.kill(killed, signal.SIGKILL)
    others = two_at_work(server, process, but=busy)
    process.send_signal(signal.SIGINT)
    check_interrupted(process, server, preempted=busy[preempted], killed=busy[killed])
    wait_until(lambda: not any(map(psutil.pid_exists, (*busy, *others))), "all workers have ended", seconds=20)
    before = server.finished()

    process = start(*arguments)
    first, second = map(raylet_of, cluster.list_all_nodes())
    busy = two_at_work(server, process)
    assert {psutil.Process(pid).ppid() for pid in busy} == {first, second}  # both run trials
    [victim] = [trial for pid, trial in busy.items() if psutil.Process(pid).ppid() == second]
    before |= server.finished()
    for lost in (psutil.Process(second), *psutil.Process(second).children()):
        lost.kill()
    server.delay_reports(0)
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output
    assert sum(node["Alive"] for node in cluster.global_state.node_table()) == 1  # what ray.nodes() reads
    after = server.finished()
    assert sorted(after) == [0, 1, 2, 3, 4]
    assert before.items() <= after.items()
    assert {trial.state.name for trial in server.trials()} == {"COMPLETE", "FAIL"}
    [again] = [t for t in server.trials() if index_of(t) == index_of(victim) and t.state.name == "COMPLETE"]
    assert f"trial {again.number} resumes after epoch" in output
    assert "was lost with its node" in output
    assert "(raylet)" not in output  # Ray's own words, at length


def check_interrupted(process: subprocess.Popen[str], server: Watched, *, preempted: Any, killed: Any) -> None:
    """Check the end of a run after Ctrl-C, whose workers on these two trials were terminated and killed."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "was stopped on" in output
    assert "was killed on" in output
    assert "of 5 trials are done and safe; resume with" in output
    assert "Traceback" not in output
    trials = server.trials()
    assert not [trial.number for trial in trials if trial.state.name == "RUNNING"]
    crashes = {index_of(trial): trial.user_attrs.get("crashes", 0) for trial in trials}  # of the latest attempt
    assert crashes[index_of(preempted)] == 0
    assert crashes[index_of(killed)] == 1


def index_of(trial: optuna.trial.FrozenTrial) -> int:
    return int(trial.user_attrs["trial_index"])


# Log records


def test_log_records_arrive_in_order_and_again_after_a_lost_reply() -> None:
    items: Any = Items()
    for said in "abc":
        items.add(said)
    assert items.start_from(0) == ["a", "b", "c"]
    assert items.start_from(0) == ["a", "b", "c"]
    assert items.start_from(2) == ["c"]
    threading.Timer(0.05, lambda: items.add("d")).start()
    assert items.start_from(3) == ["d"]


# Mistakes


def test_an_address_without_a_cluster_is_a_one_line_error() -> None:
    port = free_port()
    with pytest.raises(StudyError, match=rf"^--address 127.0.0.1:{port}: no Ray cluster answers there \(.*refused\); "):
        RayEngine(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "give the head's host:port, and run this on a machine of the cluster"),
        ("head", "give the head's host:port, or auto"),
    ],
)
def test_an_address_of_another_kind_is_a_one_line_error(address: str, said: str) -> None:
    with pytest.raises(StudyError) as refused:
        RayEngine(address)
    assert str(refused.value) == f"--address {address}: {said}"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"^--engine ray: Ray is not installed; pip install 'hpo-vision\[ray\]'$"):
        RayEngine("127.0.0.1:6379")


def engine_on(*nodes: Node, num_gpus: float = 0.0) -> RayEngine:
    """An engine that is connected to nothing."""
    engine = object.__new__(RayEngine)
    engine.num_gpus = num_gpus
    engine.nodes = lambda: list(nodes)  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize(
    ("cpus", "gpus", "num_gpus", "room"),
    [(4, 0, 0.0, 4), (8, 2, 1.0, 2), (8, 2, 0.5, 4), (8, 2, 0.3, 6), (3, 2, 0.5, 3), (8, 5, 2.0, 2), (4, 0, 0.5, 0)],
)
def test_the_room_of_a_node_is_the_number_of_workers_that_ray_would_place(
    cpus: float, gpus: float, num_gpus: float, room: int
) -> None:
    engine = engine_on(Node("1", "a", cpus, gpus), Node("2", "b", 16, 8), num_gpus=num_gpus)
    assert engine.room() == room + engine_on(Node("2", "b", 16, 8), num_gpus=num_gpus).room()


def test_a_cluster_without_room_for_a_single_worker_is_a_one_line_error() -> None:
    with pytest.raises(StudyError) as refused:
        engine_on(Node("1", "a", 4, 0), num_gpus=0.5).room()
    assert str(refused.value) == (
        "--engine ray: no node of the cluster has room for a worker, which takes 1 CPU and 0.5 of a GPU "
        "(a has 4 CPUs and 0 GPUs); "
        "give another --device, or add a node"
    )


def a_spec(space_file: str, storage: str, store_url: str | None = None) -> WorkerSpec:
    return WorkerSpec(load_space(space_file), "own", storage, None, False, Path.cwd(), store_url=store_url)


def test_sqlite_is_refused_as_the_storage_of_several_machines(space_file: str) -> None:
    engine = engine_on(Node("1", "another", 4, 0))
    with pytest.raises(StudyError, match=r"^--storage sqlite:///a.db: several machines cannot share .* on another; "):
        engine.check(a_spec(space_file, "sqlite:///a.db"))
    engine.check(a_spec(space_file, "postgresql+psycopg://x@h/d"))


def test_a_node_without_the_studys_folder_needs_an_artifact_store_and_a_database(
    tmp_path: Path, space_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies, database = tmp_path / "elsewhere", "postgresql+psycopg://x@h/d"
    for spec in (a_spec(space_file, database), a_spec(space_file, "/x/journal.log", "s3://b")):
        with pytest.raises(StudyError, match=r"elsewhere/own is not on this machine; .*--artifacts"):
            on_node(spec, studies).__enter__()
    with on_node(a_spec(space_file, database, "s3://b"), studies):
        scratch = StudyPaths.of("own").dir.parent
        assert scratch.is_dir()
    assert not scratch.exists()
    StudyPaths(studies / "own").dir.mkdir(parents=True)
    StudyPaths(studies / "own").study_yaml.touch()
    with on_node(a_spec(space_file, database), studies):
        assert StudyPaths.of("own").dir == studies / "own"
