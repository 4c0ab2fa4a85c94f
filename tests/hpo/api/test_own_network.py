"""A network of the user's own in a study: run, resumed, in workers, refitted, and used from another process."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.space import load_recipe
from hpo.study import find_study
from tests.hpo.commands import RunHpo
from tests.hpo.zygote import Hpo
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
NETS, SPACE = blocks(PAGE, "python")[0], blocks(PAGE, "yaml")[0]
SHORT = ("--set", "epochs=2", "--set", "batch_size=128", "--device", "cpu")


@pytest.fixture
def folder(own_module: Callable[[str], str], tmp_path: Path) -> Path:
    """The example of the documentation in a working directory, under a module's name of its own."""
    name = own_module(NETS)
    (tmp_path / "tiny.yaml").write_text(SPACE.replace("nets:", f"{name}:"))
    return tmp_path


def module_of(folder: Path) -> Path:
    [file] = folder.glob("own_code_*.py")
    return file


def command(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run `hpo` in a process and folder of its own, and return what it prints."""
    process = Hpo([*arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return str(output)


def test_the_example_of_the_docs_is_checked_searched_resumed_and_refitted(folder: Path, run_hpo: RunHpo) -> None:
    assert "no fault found" in run_hpo("space", "check", "tiny.yaml")
    run_hpo("run", "tiny.yaml", "--trials", "2", *SHORT)
    run_hpo("run", "tiny.yaml", "--trials", "3", *SHORT)
    study = find_study("tiny")
    assert study.counts().complete + study.counts().pruned == 3
    assert {trial.params["model.kwargs.activation"] for trial in study.optuna.trials} <= {"relu", "gelu"}
    assert "model.kwargs.width" in run_hpo("study", "show", "tiny")
    run_hpo("refit", "0", "--study", "tiny", "--device", "cpu")
    card = (study.paths.refit("00000") / "README.md").read_text()
    assert f"Loading the model imports `{module_of(folder).stem}:TinyNet` from the machine" in card


def test_a_model_is_used_by_a_fresh_process_that_finds_its_code(folder: Path, run_hpo: RunHpo, tmp_path: Path) -> None:
    from PIL import Image

    run_hpo("run", "tiny.yaml", "--trials", "1", *SHORT)
    run_hpo("refit", "0", "--study", "tiny", "--device", "cpu")
    bundle = str(find_study("tiny").paths.refit("00000"))
    Image.new("L", (8, 8)).save(tmp_path / "photo.png")
    photo, elsewhere = str(tmp_path / "photo.png"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    predict = ["predict", bundle, photo, "-o", "out.csv"]
    command(*predict, cwd=folder)
    assert (folder / "out.csv").read_text().count("\n") == 2
    said = command(*predict, cwd=elsewhere, code=2)
    assert re.search(rf"hpo: .*: the model needs the code of {folder} \(.* there is no module own_code_\d+ in", said)
    module_of(folder).write_text(NETS.replace("2 * width", "width * 2"))
    said = command(*predict, cwd=folder)
    assert re.search(r"the code of .*:TinyNet has changed since \(own_code_\d+.py\): predictions may differ", said)


def test_workers_import_it_where_they_are_started(folder: Path, run_hpo: RunHpo, tmp_path: Path) -> None:
    run_hpo("run", "tiny.yaml", "--trials", "3", "--workers", "0", *SHORT[:-2])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = command("worker", "tiny", "--device", "cpu", cwd=elsewhere, code=2)
    assert re.search(rf"study tiny was begun with the code in {folder}: .* there is no module own_code_\d+", said)
    command("worker", "tiny", "--device", "cpu", "--workers", "2", cwd=folder)
    assert find_study("tiny").counts().finished == 3


def test_a_study_does_not_continue_with_other_code(folder: Path, run_hpo: RunHpo) -> None:
    run_hpo("run", "tiny.yaml", "--trials", "1", *SHORT)
    file = module_of(folder)
    file.write_text(f"# a comment\n{NETS}")
    command("run", "tiny.yaml", "--trials", "2", *SHORT, cwd=folder)
    file.write_text(NETS.replace("stride=2", "stride=1"))
    for again in (["run", "tiny.yaml", "--trials", "3", *SHORT], ["refit", "0", "--study", "tiny", "--device", "cpu"]):
        said = command(*again, cwd=folder, code=2)
        assert f"begun with other code of {file.stem}:TinyNet: {file.name} has changed since" in said
    said = command("run", "tiny.yaml", "--study", "new", "--take-over", "tiny", *SHORT, cwd=folder, code=2)
    assert "--take-over tiny: it was begun with other code" in said
    said = command("study", "doctor", "tiny", cwd=folder, code=1)
    assert f"{file.name} has changed since" in said


def test_a_trial_whose_arguments_fail_is_invalid(folder: Path, run_hpo: RunHpo) -> None:
    text = (folder / "tiny.yaml").read_text().replace("[relu, gelu]", "[relu, elu]")
    (folder / "tiny.yaml").write_text(f"{text}sampler: {{name: random}}\n")
    said = run_hpo("run", "tiny.yaml", "--trials", "6", *SHORT)
    assert re.search(r"invalid .* fails: KeyError: 'elu' \(.*own_code_\d+.py:\d+\)", said)
    assert find_study("tiny").counts().finished == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":TinyNet", ":TinyNett", "has no TinyNett; did you mean TinyNet?"),
        ("kwargs: {width", "kwargs: {widht: 8, width", "has no argument widht; did you mean width?"),
        ("model.kwargs.width:", "model.kwargs.witdh:", "witdh: the baseline has no value: give one in base"),
        ("{width: 16,", "{width: 6,", "search.model.kwargs.width: must contain the baseline's 6"),
        ("high: 64", "high: wide", "high: must be a number, not 'wide'"),
        ('name: "own', 'name: "./own', "names a file; name the module as Python imports it"),
        ('name: "own', 'name: "own-', "must be resnet, vgg, timm/NAME, or PACKAGE.MODULE:NAME"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    folder: Path, run_hpo: RunHpo, old: str, new: str, message: str
) -> None:
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(text.replace(old, new))
    assert message in run_hpo("space", "check", "tiny.yaml", code=2) + run_hpo.error
    run_hpo("run", "tiny.yaml", code=2)
    assert message in run_hpo.error
    assert not (folder / "studies").exists()


def test_networks_of_several_families_are_searched_together(folder: Path, run_hpo: RunHpo) -> None:
    name = f"{module_of(folder).stem}:TinyNet"
    (folder / "both.yaml").write_text(f"""
base: {{epochs: 1, model: {{widths: [8], blocks: [1]}}}}
sampler: {{name: random}}
search:
  model.name: {{choices: [resnet, "{name}"]}}
  model.kwargs.width: {{low: 8, high: 16, step: 4, when: {{model.name: "{name}"}}}}
""")
    run_hpo("run", "both.yaml", "--trials", "6", "--device", "cpu")
    trials = find_study("both").optuna.trials
    assert {trial.params["model.name"] for trial in trials} == {"resnet", name}
    assert all(("model.kwargs.width" in trial.params) == (trial.params["model.name"] == name) for trial in trials)


def test_an_argument_of_a_recipe_is_set(folder: Path, run_hpo: RunHpo) -> None:
    (folder / "alone.yaml").write_text(f"epochs: 1\nmodel: {{name: '{module_of(folder).stem}:TinyNet'}}\n")
    run_hpo("train", "alone.yaml", "--set", "model.kwargs.width=4", "--device", "cpu")
    [written] = (folder / "studies").rglob("config.yaml")
    assert load_recipe(written).config.model.kwargs == {"width": 4}
    run_hpo("train", "alone.yaml", "--set", "model.kwargs.wdith=4", "--device", "cpu", code=2)
    assert "has no argument wdith; did you mean width?" in run_hpo.error


def test_the_profile_counts_its_operations(folder: Path, run_hpo: RunHpo) -> None:
    (folder / "alone.yaml").write_text(f"epochs: 1\nmodel: {{name: '{module_of(folder).stem}:TinyNet'}}\n")
    assert "FLOP" in run_hpo("train", "alone.yaml", "--profile", "--device", "cpu")
