"""The command line's surface: which commands and options there are, and how mistakes are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from hpo import cli
from tests.hpo.commands import hpo

HELP = {"--help", "-h"}
SURFACE = {
    "run": {
        "space", "--trials", "--study", "--data", "--storage", "--set", "--seed", "--device", "--take-over",
        "--skip-broken", "--reclaim", "--per-device", "--devices", "--workers", "--retries", "--keep-gb",
        "--artifacts", "--engine", "--address",
    },
    "worker": {"study", "--storage", "--data", "--device", "--devices", "--workers", "--per-device", "--keep-gb",
               "--artifacts"},
    "train": {
        "recipe", "--from", "--storage", "--data", "--set", "--metric", "--device", "--skip-broken", "--profile",
    },
    "confirm": {
        "study", "--storage", "--data", "--budget", "--device", "--devices", "--workers", "--per-device",
    },
    "refit": {
        "trial", "--study", "--storage", "--data", "--folds", "--members", "--onnx", "--confirm", "--device",
    },
    "predict": {"bundle", "images", "--output", "-o", "--probabilities", "--device", "--skip-broken"},
    "report": {"study", "--storage", "--data", "--output", "-o", "--compare"},
    "dashboard": {"study", "--storage", "--port", "--host"},
    "study list": set(),
    "study show": {"study", "--storage"},
    "study top": {"study", "--storage", "--every", "--once"},
    "study trials": {"study", "--storage", "--csv", "--output", "-o"},
    "study export": {"trial", "--study", "--storage", "--output", "-o"},
    "study doctor": {"study", "--storage", "--mend"},
    "space list": set(),
    "space check": {"file"},
    "space suggest": {"study", "--storage", "--output", "-o"},
    "space schema": {"--output", "-o"},
    "data list": set(),
}  # fmt: skip


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every command below a group, by the words that call it."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = command
    return found


def test_the_commands_are_exactly_these() -> None:
    group = typer.main.get_command(cli.app.app)
    assert commands(group).keys() == SURFACE.keys()


@pytest.mark.parametrize("name", SURFACE)
def test_a_command_has_exactly_these_parameters_and_describes_each(name: str) -> None:
    group = typer.main.get_command(cli.app.app)
    command = commands(group)[name]
    given = set()
    for parameter in command.params:
        given |= {option for option in (*parameter.opts, *parameter.secondary_opts) if not option.startswith("--no-")}
        assert getattr(parameter, "help", None), f"{name} {parameter.name} says nothing of itself"
    assert given - HELP == SURFACE[name]
    assert command.help


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from hpo.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'optuna', 'pydantic', 'rich.progress'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "digit"], "did you mean digits?"),
        (["run", "digits", "--set", "optim.lrr=1"], "did you mean optim.lr?"),
        (["run", "digits", "--set", "epochs"], "--set epochs"),
        (["run", "digits", "--device", "gpu"], "--device gpu"),
        (["run", "digits", "--device", "cuda:99"], "--device cuda:99"),
        (["run", "digits", "--study", "a/b"], "a/b"),
        (["run", "digits", "--storage", "nonsense://x"], "nonsense"),
        (["run", "digits", "--data", "nowhere.zip"], "nowhere.zip"),
        (["run", "digits", "--per-device", "0"], "--per-device 0"),
        (["run", "digits", "--per-device", "many"], "--per-device many"),
        (["run", "digits", "--devices", "cpu,cpu"], "--devices cpu,cpu: cpu is there twice"),
        (["run", "digits", "--devices", "cpu,"], "--devices cpu,: a name is missing"),
        (["run", "digits", "--devices", "cuda:99"], "--devices cuda:99: this machine has"),
        (["run", "digits", "--engine", "ray", "--device", "cpu", "--per-device", "2"], "--per-device: on CPUs Ray"),
        (["run", "digits", "--engine", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster"),
        (["train", "digits_base", "--storage", "x.log"], "--storage: a recipe lies in no storage"),
        (["run", "digits", "--device", "cpu", "--devices", "cpu"], "--device and --devices"),
        (["run", "digits", "--workers", "3", "--per-device", "2"], "--workers 3"),
        (["run", "digits", "--engine", "slurm"], "--engine slurm: give local or ray"),
        (["run", "digits", "--address", "auto"], "--address auto is a Ray cluster's"),
        (["run", "digits", "--engine", "ray", "--devices", "cuda:0"], "--devices names GPUs of one machine"),
        (["run", "digits", "--engine", "ray", "--device", "cuda:1"], "--device cuda:1: with --engine ray"),
        (["run", "digits", "--engine", "ray", "--per-device", "auto"], "--per-device auto: with --engine ray"),
        (["run", "digits", "--artifacts", "nothing://x"], "--artifacts nothing://x: nothing:// is nothing that fsspec"),
        (["train", "digits_bas"], "did you mean"),
        (["train", "digits_base", "--metric", "f1"], "--metric f1"),
        (["train", "digits_base", "--set", "data.folds=1"], "data.folds"),
        (["refit", "best"], "no stud"),
        (["refit", "best", "--folds", "1"], "--folds 1"),
        (["refit", "best", "--folds", "21"], "--folds 21"),
        (["refit", "best", "--study", "nosuch"], "nosuch"),
        (["study", "show"], "no stud"),
        (["dashboard", "nosuch"], "nosuch"),
        (["predict", "nowhere", "images"], "nowhere"),
        (["space", "check", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hpo(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("hpo: ")
    assert len(error.strip().splitlines()) == 1


def test_a_mistyped_option_exits_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert hpo(monkeypatch, "run", "digits", "--trails", "3") == 2
    assert "--trials" in capsys.readouterr().err


def test_without_studies_the_list_says_how_to_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "study", "list") == 0
    assert "hpo run digits" in capsys.readouterr().out


def test_the_data_sets_are_listed_with_where_they_lie(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpo(monkeypatch, "data", "list") == 0
    out = capsys.readouterr().out
    for name in ("digits", "stl10", "cifar10", "cifar100", "fashion_mnist"):
        assert name in out


def test_the_spaces_and_recipes_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert hpo(monkeypatch, "space", "list") == 0
    out = capsys.readouterr().out
    assert "stl10_small" in out
    assert "digits" in out


def test_the_committed_schema_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors read `search_spaces/schema.json`; `hpo space schema -o search_spaces/schema.json` makes it anew."""
    assert hpo(monkeypatch, "space", "schema", "-o", str(tmp_path / "schema.json")) == 0
    committed = Path(cli.__file__).resolve().parents[2] / "search_spaces" / "schema.json"
    assert (tmp_path / "schema.json").read_text() == committed.read_text()


def test_a_training_that_no_memory_is_enough_for_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_recorded(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("hpo.api.train.train_recorded", train_recorded)
    assert hpo(monkeypatch, "train", "digits_base") == 2
    assert capsys.readouterr().err.startswith("hpo: out of memory: not even a small part of a batch fits the device")
