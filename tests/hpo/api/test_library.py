"""`hpo` in Python: the studies and models of the commands, with exceptions instead of exit codes."""

from __future__ import annotations

import inspect
import io
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import core
import hpo
from core.errors import CoreError, UserError
from hpo import HpoError, load_bundle, predict, refit, run, trials_frame
from hpo.api.options import RefitKeywords, RefitOptions, RunKeywords, RunOptions
from hpo.cli.console import console
from hpo.errors import BundleError, SpaceError, StudyError
from hpo.study import Study
from hpo.submission.bundle import LoadedBundle
from tests.hpo.commands import SPACE, studies_in
from tests.hpo.commands import hpo as command
from tests.hpo.submission.test_bundle import write

ROOT = Path(__file__).parents[3]

# One value of each type.
SET: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 256,
    "model.widths": [8],
    "model.se": True,
    "optim.grad_clip": 1e-05,
    "early_stop.patience_fraction": None,
    "schedule.name": "linear",
}


@dataclass(frozen=True)
class Made:
    """Results of the first calls, and their folder."""

    studies: Path
    study: Study
    model: LoadedBundle
    output: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A search of two trials and its refit, both from Python."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "small.yaml").write_text(SPACE)
    with studies_in(folder) as patch:
        patch.setattr(console, "_file", said := io.StringIO())
        study = run(folder / "small.yaml", trials=2, set=SET, device="cpu")
        model = refit(study, device="cpu", confirm=False, quiet=True)
        yield Made(folder / "studies", study, model, said.getvalue())


@pytest.fixture
def here(made: Made, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The same, with its folder as the studies folder."""
    monkeypatch.setenv("HPO_STUDIES", str(made.studies))
    return made


# Imports


def test_importing_hpo_imports_no_heavy_library() -> None:
    code = """
import sys, hpo
heavy = {"torch", "optuna", "pandas", "matplotlib", "rich", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(hpo.__all__) <= set(dir(hpo))
from hpo import HpoError
assert not heavy & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported_and_no_other() -> None:
    for name in hpo.__all__:
        assert getattr(hpo, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'hpo' has no attribute 'predictt'"):
        _ = hpo.predictt  # type: ignore[attr-defined]


def test_both_packages_are_marked_as_typed() -> None:
    for package in (core, hpo):
        assert (Path(package.__file__).parent / "py.typed").is_file()


# A search and its refit


def test_run_returns_the_study(made: Made) -> None:
    study = made.study
    assert isinstance(study, Study)
    assert study.counts().finished == 2
    best = study.best_trial()
    assert best is not None
    assert best.value == max(trial.value for trial in study.optuna.get_trials(deepcopy=False))
    assert list(trials_frame(study)["number"]) == [0, 1]


def test_set_reaches_the_configuration_with_every_type(made: Made) -> None:
    best = made.study.best_trial()
    assert best is not None
    config = made.study.config_of(best).flat()
    for path, value in SET.items():
        assert config[path] == (tuple(value) if isinstance(value, list) else value), path


def test_the_command_line_resumes_a_study_of_the_library_and_the_reverse(
    here: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remembered = here.study.settings.command
    assert remembered is not None
    assert remembered.startswith("hpo run ")
    assert "--set model.se=true" in remembered
    space = here.studies.parent / "small.yaml"
    assert command(monkeypatch, *shlex.split(remembered)[1:]) == 0, "the same total: nothing is left to do"
    again = run(space, trials=2, set=SET, device="cpu", quiet=True)
    assert [trial.value for trial in again.optuna.trials] == [trial.value for trial in here.study.optuna.trials]


def test_progress_is_shown_unless_quiet(made: Made) -> None:
    assert "trial   1  accuracy" in made.output
    assert "refitting" not in made.output, "that was quiet"


def test_refit_returns_the_written_model(here: Made) -> None:
    assert here.model.folder == here.study.paths.refit("best")
    images = torch.from_numpy(load_digits().images[:9, None] * 15.9375).to(torch.uint8)
    again = load_bundle(str(here.model.folder), "cpu")
    assert torch.equal(again.probabilities(images), here.model.probabilities(images))
    for bundle in (here.model, here.model.folder, str(here.model.folder)):
        found = predict(bundle, images, **({} if isinstance(bundle, LoadedBundle) else {"device": "cpu"}))
        assert torch.equal(found.probabilities, again.probabilities(images))


def test_refit_takes_a_name_or_the_last_study(here: Made) -> None:
    for study in (here.study.name, None):
        with pytest.raises(StudyError, match="99"):
            refit(study, 99, confirm=False, quiet=True)


def test_a_warm_start_tries_the_best_of_another_study_first(here: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_file", said := io.StringIO())
    new = run(here.studies.parent / "small.yaml", study="new", trials=3, workers=0, warm_start=here.study.name)
    _, *others = new.optuna.trials
    assert [trial.user_attrs.get("warm_start") for trial in others] == [f"{here.study.name}/1", None]
    assert f"warm start with 1 configuration of study {here.study.name}" in said.getvalue()
    for wrong, why in (("new", "is the study itself"), ("nosuch", "no study nosuch")):
        with pytest.raises(StudyError, match=why):
            run(here.studies.parent / "small.yaml", study="new", trials=3, workers=0, warm_start=wrong)
    with pytest.raises(StudyError):
        run(here.studies.parent / "small.yaml", study="third", workers=0, warm_start="nosuch")
    assert not (here.studies / "third").exists()


# User errors


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: run("digitz"), SpaceError, "no such search space.*did you mean digits"),
        (lambda: run("digits", set={"epoch": 3}), SpaceError, "epoch"),
        (lambda: run("digits", trials=0), StudyError, "trials=0: give 1 or more"),
        (lambda: run("digits", workers=-1), StudyError, "workers=-1: give 0 or more"),
        (lambda: run("digits", data="no/such/folder"), UserError, "no/such/folder: no such file or folder"),
        (lambda: run("digits", device="tpu"), CoreError, "tpu"),
        (lambda: refit("no_such_study"), StudyError, "no study no_such_study"),
        (lambda: refit(), StudyError, "no studies in"),
        (lambda: predict("no/such/bundle", "photos"), BundleError, "no/such/bundle: no such folder"),
    ],
)
def test_a_user_error_is_an_exception_with_the_message_of_the_command(call: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
    assert issubclass(kind, HpoError | CoreError)


def test_a_path_may_begin_with_the_users_folder() -> None:
    assert RunOptions.of(space="digits", data="~/photos").data == Path.home() / "photos"


@pytest.mark.parametrize(
    ("function", "options", "keywords"), [(run, RunOptions, RunKeywords), (refit, RefitOptions, RefitKeywords)]
)
def test_a_function_takes_and_describes_every_field_of_its_options(function: Any, options: Any, keywords: Any) -> None:
    named = inspect.signature(function).parameters.keys()
    assert named - {"callbacks"} == {*options.model_fields, "quiet"}
    explicit = {"space", "study", "trial", "quiet", "callbacks"}
    assert named - explicit <= keywords.__annotations__.keys() <= named
    assert all(f"{name}: " in (inspect.getdoc(function) or "") for name in named)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'trails'"):
        run("digits", trails=3)  # type: ignore[call-arg]


def test_a_loaded_model_stays_on_its_device(tmp_path: Path) -> None:
    model = load_bundle(write(tmp_path / "best"), "cpu")
    with pytest.raises(ValueError, match="a loaded model is on its device"):
        predict(model, np.zeros((12, 16, 3), np.uint8), device="cpu")
