"""`--json`, with the keys of docs/json.md, `--quiet` and `--verbose`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hpo.cli.console
from hpo import refit, run
from hpo.api.confirm import ConfirmResult
from hpo.api.fit import FitResult
from hpo.api.worker import WorkerResult
from hpo.cli import documents
from hpo.study import find_study
from tests.hpo.commands import SPACE, RunHpo, studies_in
from tests.hpo.confirmation.simulated import some_confirmation, some_contender

DOCS = Path(__file__).parents[3] / "docs" / "json.md"
MODEL = "studies/s/refit/best"


def documented() -> dict[str, list[list[str]]]:
    """Command -> its keys, then those of each item."""
    found: dict[str, list[list[str]]] = {}
    for commands, keys in re.findall(r"^\| (`hpo .*) \| (.*) \|$", DOCS.read_text(), flags=re.MULTILINE):
        parts = [re.findall(r"`(\w+)`", part) for part in keys.split(", each ")]
        if keys.startswith("these"):
            parts[0] = found["hpo run"][0] + parts[0]
        found |= dict.fromkeys(re.findall(r"`(hpo [a-z ]+)`", commands), parts)
    return found


def checked(document: dict[str, Any], command: str) -> dict[str, Any]:
    """The document, if its keys are the documented ones."""
    keys, *of_items = documented()[command]
    assert {"schema", *keys} == set(document)
    assert document["schema"] == 1
    for name in of_items:
        for item in document[keys[-1]]:
            assert set(name) <= set(item)
    return document


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished study and its model."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "small.yaml").write_text(SPACE)
    (folder / "photos").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "photos" / "one.png")
    with studies_in(folder) as patch:
        patch.chdir(folder)
        study = run("small.yaml", study="s", trials=2, device="cpu", quiet=True)
        refit(study, device="cpu", confirm=False, quiet=True)
        yield folder


@pytest.fixture
def call(made: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command with `--json`, and return its document, whose keys are checked."""
    monkeypatch.setenv("HPO_STUDIES", str(made / "studies"))
    monkeypatch.chdir(made)

    def called(*words: str, code: int = 0) -> dict[str, Any]:
        name = next(name for name in documented() if ["hpo", *words][: len(name.split())] == name.split())
        return checked(json.loads(run_hpo(*words, "--json", code=code)), name)

    return called


def test_the_documents_of_a_study_have_its_trials_and_next_commands(call: Any) -> None:
    shown = call("study", "show", "s")
    assert shown["trials"]["complete"] == shown["total"] == 2
    assert shown["baselines"][0]["trial"] == 0
    assert any(command.startswith("hpo refit best") for command in shown["next"])
    assert call("run", "small.yaml", "--study", "s", "--trials", "2") == call("study", "show", "s")
    assert call("study", "top", "s")["running"] == []
    assert [one["study"] for one in call("study", "list")["studies"]] == ["s"]
    trials = call("study", "trials", "s")["trials"]
    assert [one["state"] for one in trials] == ["complete", "complete"]
    assert shown["best"] in trials
    assert trials[0]["values"]["2"] == trials[0]["value"]
    of_trial = re.search(r"- A trial \(.*?\) has (.*?);", DOCS.read_text(), flags=re.DOTALL)
    assert of_trial is not None
    assert set(trials[0]) == set(re.findall(r"`(\w+)`", of_trial[1]))


def test_a_search_reports_its_course_on_standard_error(call: Any, run_hpo: RunHpo) -> None:
    assert call("run", "small.yaml", "--study", "new", "--trials", "1", "--device", "cpu")["trials"]["complete"] == 1
    assert "trial   0  accuracy" in run_hpo.error
    assert call("study", "add", "new", "--params", "optim.lr_scale=3")["params"] == {"optim.lr_scale": 3.0}
    assert call("study", "copy", "new", "copied")["study"] == "copied"
    assert call("study", "rename", "new", "renamed")["before"] == "new"
    for name in ("copied", "renamed"):
        assert call("study", "delete", name, "--yes") == {"schema": 1, "study": name}


def test_the_documents_of_models_and_reports(call: Any, made: Path, tmp_path: Path) -> None:
    labelled = call("predict", MODEL, "photos", "-o", str(tmp_path / "out.csv"))
    assert (labelled["images"], len(labelled["classes"])) == (1, 10)
    assert Path(call("report", "s", "-o", str(tmp_path / "r.html"))["report"]).exists()
    assert call("data", "audit", "s")["suspects"] is not None
    trained = call("train", "--from", "s/0", "--device", "cpu")
    assert trained["result"]["value"] == pytest.approx(trained["value"])
    config = call("study", "export", "best", "--study", "s")["config"]
    assert config == find_study("s").config_of(find_study("s").best_trial()).model_dump(mode="json")  # type: ignore[arg-type]
    refitted = call("refit", "best", "--study", "s", "--no-confirm", "--device", "cpu")
    assert refitted["metrics"] == json.loads((made / MODEL / "metrics.json").read_text())


def test_the_documents_of_spaces_and_data(call: Any) -> None:
    assert "digits" in {one["name"] for one in call("space", "list")["spaces"]}
    assert call("space", "check", "small.yaml")["faults"] == []
    assert call("space", "suggest", "s")["space"].count("optim.lr_scale")
    assert "cifar10" in {one["name"] for one in call("data", "list")["data"]}


def test_a_problem_is_a_document_with_its_exit_code(call: Any, made: Path) -> None:
    assert call("study", "doctor", "s")["problems"] == []
    extra = made / "studies" / "s" / "trials" / "9"
    extra.mkdir()
    (extra / "metrics.jsonl").write_text("{}\n")
    try:
        [problem] = call("study", "doctor", "s", code=1)["problems"]
        assert set(problem) == {"problem", "advice", "fixable"}
    finally:
        (extra / "metrics.jsonl").unlink()
        extra.rmdir()


def test_an_error_is_one_line_without_a_document(call: Any, run_hpo: RunHpo) -> None:
    assert run_hpo("study", "show", "nosuch", "--json", code=2) == ""
    assert run_hpo.error.startswith("hpo: no study nosuch")


def test_documents_of_long_commands_have_the_documented_keys(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(made / "studies"))
    study = find_study("s")
    config = study.config_of(study.optuna.trials[0])
    confirmation = some_confirmation(some_contender("baseline", config, 0.9), evidence=False, advantage=None)
    for command, document in {
        "hpo worker": documents.of_worker(WorkerResult(study)),
        "hpo confirm": documents.of_confirm(ConfirmResult(study, confirmation)),
        "hpo fit": documents.of_fit(FitResult("s", made / MODEL, None, None, None, 1.0, before=False)),
    }.items():
        checked(json.loads(documents.as_text(document)), command)


def test_infinity_and_nan_are_null() -> None:
    assert json.loads(documents.as_text({"a": [float("nan")], "b": float("inf")})) == {
        "schema": 1,
        "a": [None],
        "b": None,
    }


def test_a_quiet_command_shows_only_errors(call: Any, run_hpo: RunHpo) -> None:
    assert run_hpo("train", "--from", "s/0", "--device", "cpu", "--quiet") == ""
    assert run_hpo.error == ""
    run_hpo("train", "--from", "s/9", "-q", code=2)
    assert run_hpo.error.startswith("hpo: --from s/9: study s has no trial 9")
    assert run_hpo("train", "--from", "s/0", "--device", "cpu") != "", "the next command shows everything again"


def test_a_verbose_command_shows_every_epoch_and_whole_parameters(
    call: Any, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpo.cli.console.console, "_force_terminal", True)
    said = run_hpo("train", "--from", "s/0", "--device", "cpu", "--verbose")
    assert re.search(r"epoch 1 of 2.*\n(.*\n)*.*epoch 2 of 2", said)
    assert "epoch 1 of 2" not in run_hpo("train", "--from", "s/0", "--device", "cpu").replace("\x1b", "")


def test_quiet_and_verbose_exclude_each_other(run_hpo: RunHpo) -> None:
    assert "give one" in run_hpo.fails("run", "digits", "--quiet", "--verbose")
