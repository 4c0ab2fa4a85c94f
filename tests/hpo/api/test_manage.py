"""`hpo study delete`, `rename` and `copy`: whole studies, on every storage, and never beside running workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.api import manage
from hpo.api.options import RenameOptions
from hpo.errors import StudyError
from hpo.paths import StudyPaths, studies_root
from hpo.storage import METADATA, open_storage
from hpo.storage.optuna_access import attribute_of
from hpo.study import Study, find_study, open_study
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.confirmation.simulated import Images, space_of
from tests.hpo.storage.postgresql import running_server

pytestmark = pytest.mark.usefixtures("closed_databases")

NOTE = "dashboard:{}:note_str:0"
Begin = Callable[..., Study]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    with running_server() as server:
        yield server.url


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """None for the study's own journal."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("server"))
    return None if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Begins the study `old` with a complete, a pruned and a waiting trial, a note and a model."""
    begun = []

    def opened(storage: str | None = None, name: str = "old", **options: Any) -> Study:
        images: Any = Images()
        study = open_study(space_of(tmp_path, SPACE), name=name, dataset=images, storage_url=storage, **options)
        begun.append(study)
        study.queue.ensure_trials(3)
        study.settings.command = f"hpo run space --study {name} --trials 3"
        for state, value in (("complete", 0.5), ("pruned", None)):
            trial, _ = study.queue.claim() or pytest.fail("nothing waits")
            study.queue._known_space().suggest(trial)
            study.queue.finish(trial, state, value)
        id = study.optuna.trials[1]._trial_id
        study.optuna._storage.set_study_system_attr(study.optuna._study_id, NOTE.format(id), "mine")
        (study.paths.refit("best")).mkdir(parents=True)
        (study.paths.refit("best") / "model.safetensors").write_text("weights")
        return study

    yield opened
    for study in begun:  # of a server that other tests use
        for name in ("old", "new"):
            manage_storage(study, name)


def manage_storage(study: Study, name: str) -> None:
    """Delete what a test left in a database."""
    if study.storage_url.startswith("postgresql"):
        storage = open_storage(study.storage_url)
        if name in [one.study_name for one in optuna.get_all_study_summaries(storage)]:
            optuna.delete_study(study_name=name, storage=storage)


def trials_of(study: Study) -> list[tuple[Any, ...]]:
    return [
        (trial.number, trial.state.name, trial.params, trial.value, trial.user_attrs, trial.datetime_start)
        for trial in study.optuna.get_trials()
    ]


def check_is_whole(study: Study, trials: list[tuple[Any, ...]]) -> None:
    """The study has these trials, its note at the right trial, its model, and can be continued."""
    assert trials_of(study) == trials
    id = study.optuna.trials[1]._trial_id
    assert study.optuna._storage.get_study_system_attrs(study.optuna._study_id)[NOTE.format(id)] == "mine"
    assert (study.paths.refit("best") / "model.safetensors").read_text() == "weights"
    assert study.settings.command == f"hpo run space --trials 3 --study {study.name}"


def test_a_renamed_study_is_the_same_under_its_new_name(begin: Begin, run_hpo: RunHpo, storage: str | None) -> None:
    trials = trials_of(begin(storage))
    assert run_hpo("study", "rename", "old", "new") == "study old is renamed to new\n"
    check_is_whole(find_study("new"), trials)
    assert "no study old" in run_hpo.fails("study", "show", "old")


def test_a_copy_is_a_study_of_its_own(begin: Begin, run_hpo: RunHpo, storage: str | None) -> None:
    old = begin(storage)
    trials = trials_of(old)
    assert run_hpo("study", "copy", "old", "new") == "study old is copied to new\n"
    check_is_whole(find_study("new"), trials)
    trial, _ = begin_claim(old)
    old.queue.finish(trial, "complete", 0.9)
    assert trials_of(find_study("new")) == trials


def begin_claim(study: Study) -> tuple[optuna.Trial, int]:
    """Claim the waiting trial."""
    claimed = study.queue.claim()
    assert claimed is not None
    study.queue._known_space().suggest(claimed[0])
    return claimed


def test_a_deleted_study_leaves_nothing(begin: Begin, run_hpo: RunHpo, storage: str | None) -> None:
    url = begin(storage).storage_url
    assert "give --yes to delete all of that" in run_hpo.fails("study", "delete", "old")
    assert find_study("old").counts().complete == 1
    said = run_hpo("study", "delete", "old", "--yes")
    assert f"{studies_root() / 'old'}: " in said
    assert ", with 1 model" in said
    assert not (studies_root() / "old").exists()
    if storage is not None:
        assert optuna.get_all_study_summaries(open_storage(url)) == []


COMMANDS = {
    "rename": ["study", "rename", "old", "new"],
    "copy": ["study", "copy", "old", "new"],
    "delete": ["study", "delete", "old", "--yes"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_study_with_a_running_trial_is_left_alone(begin: Begin, run_hpo: RunHpo, command: list[str]) -> None:
    study = begin()
    begin_claim(study)
    line = run_hpo.fails(*command)
    assert f"study old: 1 trial running in {study.optuna.trials[2].user_attrs['lease']['host']}:{os.getpid()}" in line
    assert "stop that first" in line
    assert find_study("old").counts().running == 1
    assert not (studies_root() / "new").exists()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_study_that_is_being_refitted_is_left_alone(begin: Begin, run_hpo: RunHpo, command: list[str]) -> None:
    file = begin().paths.refit_lock("best")
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"study old: a process works in {file.parent}" in run_hpo.fails(*command)
        holder.send_signal(signal.SIGKILL)
    run_hpo(*command)


def test_a_trial_of_a_dead_process_holds_nothing_up(begin: Begin, run_hpo: RunHpo) -> None:
    study = begin()
    trial, _ = begin_claim(study)
    trial.set_user_attr("lease", {**study.optuna.trials[2].user_attrs["lease"], "start": 1})
    run_hpo("study", "rename", "old", "new")
    assert find_study("new").queue.reclaim() == [2]


def test_a_folder_that_was_renamed_by_hand_is_refused_until_the_renaming_is_finished(
    begin: Begin, run_hpo: RunHpo, tmp_path: Path, storage: str | None
) -> None:
    """It was once begun again, over the trials in its journal."""
    trials = trials_of(begin(storage))
    (studies_root() / "old").rename(studies_root() / "new")
    way_out = "was renamed by hand; name the folder old again, or finish with: hpo study rename old new"
    for command in (
        ["run", str(tmp_path / "space.yaml"), "--study", "new"],
        ["study", "show", "new"],
        ["report", "new"],
    ):
        assert way_out in run_hpo.fails(*command)
    run_hpo("study", "rename", "old", "new")
    check_is_whole(find_study("new"), trials)


def test_a_folder_that_was_copied_by_hand_is_refused(begin: Begin, run_hpo: RunHpo) -> None:
    shutil.copytree(begin().paths.dir, studies_root() / "new")
    line = run_hpo.fails("study", "show", "new")
    assert line.endswith("delete this copy, and make one with: hpo study copy old new")


@pytest.mark.parametrize("at", ["copy_stored", "delete_stored"])
def test_an_interrupted_renaming_is_finished_by_the_same_command(
    begin: Begin, storage: str | None, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    trials = trials_of(begin(storage))
    options = RenameOptions(study="old", new="new")

    def dies(*args: Any, **options: Any) -> None:
        if at == "copy_stored":  # before the attribute that is written last
            _, target, name = args
            optuna.create_study(study_name=name, storage=target, direction="maximize").set_user_attr("x", 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"hpo.storage.transfer.{at}", dies)
        with pytest.raises(KeyboardInterrupt):
            manage.rename(options)
    with pytest.raises(StudyError, match="or finish with: hpo study rename old new"):
        find_study("new")
    manage.rename(options)
    check_is_whole(find_study("new"), trials)
    names = [one.study_name for one in optuna.get_all_study_summaries(open_storage(find_study("new").storage_url))]
    assert names == ["new"]


def test_an_interrupted_copy_leaves_nothing(
    begin: Begin, storage: str | None, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(storage)
    with monkeypatch.context() as patch:
        patch.setattr("hpo.api.manage._write_names", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert "No space left" in run_hpo.fails("study", "copy", "old", "new")
    run_hpo("study", "copy", "old", "new")


@pytest.mark.parametrize("command", ["rename", "copy"])
def test_a_name_that_is_taken_is_refused(begin: Begin, run_hpo: RunHpo, command: str) -> None:
    begin()
    begin(name="new")
    line = run_hpo.fails("study", command, "old", "new")
    assert line == f"hpo: {studies_root() / 'new'} exists already; choose another name, or delete it first"


def test_a_name_that_another_study_of_the_database_has_is_refused(
    begin: Begin, run_hpo: RunHpo, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    begin(url)
    optuna.create_study(study_name="new", storage=open_storage(url))
    assert "has a study new already; choose another name" in run_hpo.fails("study", "copy", "old", "new")
    assert attribute_of(find_study("old").optuna, METADATA) is not None


def test_the_artifact_store_is_renamed_copied_and_deleted_too(begin: Begin, run_hpo: RunHpo, tmp_path: Path) -> None:
    store = tmp_path / "store"
    images: Any = Images()
    study = open_study(space_of(tmp_path, SPACE), name="old", dataset=images)
    study.files.use_store(str(store))
    (tmp_path / "weights").write_text("w")
    assert study.files.store is not None
    study.files.store.put(tmp_path / "weights", "trials/00000/model.safetensors")
    run_hpo("study", "copy", "old", "two")
    run_hpo("study", "rename", "two", "three")
    found = {name: (store / name / "trials/00000/model.safetensors").exists() for name in ("old", "two", "three")}
    assert found == {"old": True, "two": False, "three": True}
    run_hpo("study", "delete", "old", "--yes")
    assert not list((store / "old").rglob("*.safetensors"))


def test_a_confirmation_is_not_changed_alone(begin: Begin, run_hpo: RunHpo) -> None:
    begin()
    for command in (["delete", "old.confirm", "--yes"], ["rename", "old.confirm", "x"], ["copy", "old.confirm", "x"]):
        assert "study old.confirm belongs to old, and shares its fate; name that one" in run_hpo.fails(
            "study", *command
        )


def test_paths_of_a_study_are_those_of_its_name(begin: Begin, run_hpo: RunHpo) -> None:
    begin()
    run_hpo("study", "rename", "old", "new")
    assert find_study("new").storage_url == str(StudyPaths.of("new").journal)
