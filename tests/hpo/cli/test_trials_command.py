"""`hpo study trials` and `hpo study export`: a study's trials as a frame, a table and CSV, and as recipes."""

from __future__ import annotations

import csv
import io
import runpy
from pathlib import Path
from typing import Any

import pandas
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

import hpo.cli.console
from core.data import load_dataset
from hpo.api.options import ExportOptions
from hpo.api.study import export
from hpo.confirmation.result import write_confirmation
from hpo.confirmation.statistics import Interval
from hpo.space import SearchSpace, check_file, load_recipe, load_space
from hpo.study import Study
from hpo.study.dataframe import trials_frame
from hpo.trials import BASELINE, TRIAL_INDEX
from tests.hpo.commands import RunHpo
from tests.hpo.confirmation.simulated import on_disk, some_confirmation, some_contender, space_of

SPACE = """
data: {name: digits}
base: {epochs: 2, batch_size: 128, model: {widths: [8], blocks: [1]}, augment: {flip: 0.0}, optim: {lr_scale: 2.0}}
pruner: {name: rungs, rungs: [0.5], keep: 0.5}
search:
  optim.lr_scale: {low: 0.1, high: 10, log: true}
  optim.name: {choices: [adamw, sgd]}
  augment.ops: {low: 0, high: 2}
  optim.momentum: {low: 0.8, high: 0.98, when: {optim.name: sgd}}
  model.widths: {choices: [[8], [16]]}
"""
SGD = {"optim.lr_scale": 0.5, "optim.name": "sgd", "augment.ops": 1, "optim.momentum": 0.9, "model.widths": "[16]"}
ADAM = {"optim.lr_scale": 3.0, "optim.name": "adamw", "augment.ops": 0, "model.widths": "[8]"}


def add(study: Study, space: SearchSpace, state: TrialState, params: dict[str, Any], **options: Any) -> None:
    attributes = options.pop("attributes", {})
    study.optuna.add_trial(
        create_trial(
            state=state,
            params=params,
            distributions={path: space.distributions[path] for path in params},
            user_attrs=attributes,
            **options,
        )
    )


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


@pytest.fixture
def study(space: SearchSpace) -> Study:
    """One of each: the base, one that was cut off and begun again, pruned, failed, running, waiting."""
    study = on_disk(space, name="s")
    over = {"epochs": 2, "kept_epoch": 2, "elapsed_s": 3.25, "images_per_s": 900.0, "device": "CPU, 1 thread"}
    add(study, space, TrialState.COMPLETE, space.baseline_params(), value=0.7, intermediate_values={1: 0.5, 2: 0.7},
        attributes={TRIAL_INDEX: 0, BASELINE: True, "fold_values": [0.6, 0.8], **over})  # fmt: skip
    add(study, space, TrialState.FAIL, SGD, attributes={TRIAL_INDEX: 1, "interrupted": True})
    add(study, space, TrialState.PRUNED, ADAM, value=0.4, intermediate_values={1: 0.4},
        system_attrs={"rung:1": [2, 2, False]},
        attributes={TRIAL_INDEX: 2, "epochs": 1, "elapsed_s": 1.5, "lease": {"host": "h", "pid": 1}})  # fmt: skip
    add(study, space, TrialState.PRUNED, ADAM, attributes={TRIAL_INDEX: 3, "failure": "diverged"})
    add(study, space, TrialState.COMPLETE, SGD, value=0.9, intermediate_values={1: 0.6, 2: 0.9},
        system_attrs={"rung:1": [1, 3, True]}, attributes={TRIAL_INDEX: 1, "crashes": 1, **over})  # fmt: skip
    add(study, space, TrialState.RUNNING, ADAM, intermediate_values={1: 0.2}, attributes={TRIAL_INDEX: 4})
    add(study, space, TrialState.WAITING, {}, attributes={TRIAL_INDEX: 5})
    return study


# The frame


def test_each_trial_index_has_one_row_in_the_order_of_trial_numbers(study: Study) -> None:
    frame = trials_frame(study)
    assert frame["number"].tolist() == [0, 2, 3, 4, 5, 6], "number 1 was cut off, and 4 has its slot"
    assert frame["trial_index"].tolist() == [0, 2, 3, 1, 4, 5]
    assert frame["state"].tolist() == ["complete", "pruned", "pruned", "complete", "running", "waiting"]
    assert frame["failure"].dropna().to_dict() == {2: "diverged"}
    assert frame["baseline"].tolist() == [True, False, False, False, False, False]


def test_only_complete_trials_have_a_value(study: Study) -> None:
    frame = trials_frame(study)
    assert frame["value"].dropna().to_dict() == {0: 0.7, 3: 0.9}
    assert frame["last_value"].dropna().to_dict() == {0: 0.7, 1: 0.4, 3: 0.9, 4: 0.2}


def test_integers_stay_integers_if_some_are_missing(study: Study) -> None:
    frame = trials_frame(study)
    for column in ("epochs", "kept_epoch", "crashes", "params.augment.ops", "rungs.1.rank"):
        assert str(frame[column].dtype) == "Int64"
    for column in ("value", "params.optim.momentum", "rungs.1", "fold_values.2"):
        assert str(frame[column].dtype) == "float64"
    assert frame["params.augment.ops"].tolist()[:4] == [0, 0, 0, 1]
    assert frame["params.model.widths"].tolist()[3] == "[16]"
    assert frame["params.optim.momentum"].dropna().to_dict() == {3: 0.9}


def test_nested_attributes_are_flat_and_internal_ones_left_out(study: Study) -> None:
    frame = trials_frame(study)
    assert frame.loc[0, ["fold_values.1", "fold_values.2"]].tolist() == [0.6, 0.8]
    assert not [column for column in frame if "lease" in column]
    assert frame.columns.is_unique
    assert all(not isinstance(cell, list | dict) for column in frame for cell in frame[column])


def test_a_rung_has_a_value_and_a_rank(study: Study) -> None:
    frame = trials_frame(study)
    assert frame.columns[-3:].tolist() == ["rungs.1", "rungs.1.rank", "rungs.1.of"]
    assert frame["rungs.1"].dropna().to_dict() == {1: 0.4, 3: 0.6}
    assert frame["rungs.1.rank"].dropna().to_dict() == {1: 2, 3: 1}
    assert frame["rungs.1.of"].dropna().to_dict() == {1: 2, 3: 3}


def test_columns_have_the_same_order_and_types_for_any_number_of_trials(study: Study, space: SearchSpace) -> None:
    late, early = trials_frame(study), trials_frame(on_disk(space, name="new"))
    assert early.empty
    assert early.columns.tolist() == [column for column in late.columns if column in early.columns]
    assert early.dtypes.to_dict() == {column: late[column].dtype for column in early.columns}
    assert [column for column in early if column.startswith("params.")] == [
        f"params.{path}" for path in sorted(space.search)
    ]


# The table and CSV


def test_csv_has_every_column_and_the_output_nothing_else(study: Study, run_hpo: RunHpo) -> None:
    text = run_hpo("study", "trials", "s", "--csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    frame = trials_frame(study)
    assert len(rows) == len(frame)
    assert list(rows[0]) == frame.columns.tolist()
    assert rows[3]["params.augment.ops"] == "1"
    assert float(rows[3]["params.optim.lr_scale"]) == 0.5
    read = pandas.read_csv(io.StringIO(text))
    assert read["value"].dropna().tolist() == [0.7, 0.9]


def test_a_file_has_the_same_csv(study: Study, tmp_path: Path, run_hpo: RunHpo) -> None:
    text = run_hpo("study", "trials", "s", "--csv")
    file = tmp_path / "out.csv"
    file.write_text("old")
    said = run_hpo("study", "trials", "s", "-o", str(file))
    assert file.read_bytes().decode() == text
    assert (
        said == f"6 trials of study {study.name}, {len(text.splitlines()[0].split(','))} columns, written to {file}\n"
    )
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


@pytest.mark.parametrize(
    ("place", "why"), [("nodir/out.csv", ": cannot be written ("), (".", " is a folder; give -o the name of a file")]
)
@pytest.mark.parametrize("command", [["study", "trials", "s"], ["study", "export", "best", "--study", "s"]])
def test_an_unwritable_output_is_a_one_line_error(
    place: str, why: str, command: list[str], study: Study, tmp_path: Path, run_hpo: RunHpo
) -> None:
    assert study.name == "s"
    error = run_hpo.fails(*command, "-o", str(tmp_path / place))
    assert error.startswith(f"hpo: {tmp_path / place}{why}")


@pytest.mark.parametrize("width", [100, 120])
def test_a_trial_is_one_line_on_a_terminal(
    width: int, study: Study, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.setattr(hpo.cli.console, "console", Console(width=width, force_terminal=True, no_color=True))
    lines = run_hpo("study", "trials", study.name).splitlines()
    assert len(lines) == 7
    assert lines[4].split()[:6] == ["4", "complete", "0.9000", "2", "3.2", "s"]
    assert "lr_scale=0.5" in lines[4]
    assert "diverged" in lines[3]
    assert "(the baseline)" in lines[1]


def test_output_to_a_pipe_is_never_cut(
    space: SearchSpace, study: Study, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.setattr(hpo.cli.console, "console", Console(width=40))
    lines = run_hpo("study", "trials", study.name).splitlines()
    assert len(lines) == 7
    assert "widths=[16]" in lines[4]
    assert "optim.name=sgd" in lines[4]


def test_a_study_without_trials_shows_how_to_run_it(space: SearchSpace, run_hpo: RunHpo) -> None:
    on_disk(space, name="empty")
    assert run_hpo("study", "trials", "empty") == (
        "study empty has no trials yet; run it with: hpo run space --study empty\n"
    )


# Recipes


@pytest.mark.parametrize("which", ["best", "4", "2", "0"])
def test_an_exported_trial_is_a_complete_recipe_and_a_baseline(
    which: str, study: Study, tmp_path: Path, run_hpo: RunHpo
) -> None:
    text = run_hpo("study", "export", which, "--study", "s")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert check_file(file) == []
    number = 4 if which == "best" else int(which)
    recipe = load_recipe(file)
    assert recipe.config == study.config_of(study.optuna.trials[number])
    assert recipe.description.startswith(f"trial {number} of study s")
    assert "torch" in recipe.source
    value = {4: "0.9000 accuracy", 2: "0.4000 accuracy", 0: "0.7000 accuracy"}[number]
    assert recipe.result.startswith(f"{value} on the validation images")
    assert "fingerprint abababababab" in recipe.result
    assert text.startswith("# The best of the search, not confirmed") == (which == "best")
    based = space_of(tmp_path, "base: mine.yaml\nsearch:\n  loss.smoothing: {low: 0.0, high: 0.2}\n", "based")
    assert based.baseline.flat() == recipe.config.flat()


def test_an_exported_trial_can_be_trained(space: SearchSpace, tmp_path: Path, run_hpo: RunHpo) -> None:
    study = on_disk(space, name="real", dataset=load_dataset(space.baseline.data))
    add(study, space, TrialState.COMPLETE, ADAM, value=0.4, attributes={TRIAL_INDEX: 0})
    file = tmp_path / "mine.yaml"
    said = run_hpo("study", "export", "best", "--study", "real", "-o", str(file)).splitlines()
    assert said[-1] == f"  hpo train {file}"
    run_hpo(*said[-1].split()[1:], "--device", "cpu")


@pytest.mark.parametrize("folds", [None, 2])
def test_an_exported_script_trains_the_trial(
    space: SearchSpace, tmp_path: Path, run_hpo: RunHpo, capfd: pytest.CaptureFixture[str], folds: int | None
) -> None:
    space = space_of(tmp_path, SPACE.replace("{name: digits}", f"{{name: digits, folds: {folds or 'null'}}}"))
    study = on_disk(space, name="real", dataset=load_dataset(space.baseline.data))
    add(study, space, TrialState.COMPLETE, SGD, value=0.4, attributes={TRIAL_INDEX: 0})
    file = tmp_path / "best.py"
    said = run_hpo("study", "export", "best", "--study", "real", "--python", "-o", str(file))
    assert said.splitlines()[-1] == f"  python {file}"
    names = runpy.run_path(str(file), run_name="__main__")
    assert names["config"] == study.config_of(study.optuna.trials[0])
    said = capfd.readouterr().out
    assert said.count("epoch 2 of 2: loss ") == said.count("validation accuracy 0.") == (folds or 1)
    assert file.read_text().startswith("# trial 0 of study real: 0.4000 accuracy on the validation images")


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        ("bset", r"'bset' is no trial: give best, or a number from 0 to 6"),
        ("-1", r"No such option"),
        ("7", r"study s has no trial 7; its trials are 0 to 6"),
        ("6", r"study s: trial 6 is waiting, and has no configuration yet"),
    ],
)
def test_an_unexportable_trial_is_a_one_line_error(trial: str, why: str, study: Study, run_hpo: RunHpo) -> None:
    run_hpo("study", "export", trial, "--study", study.name, code=2)
    assert why in run_hpo.error


def test_a_study_without_complete_trials_has_no_best(space: SearchSpace, run_hpo: RunHpo) -> None:
    on_disk(space, name="empty")
    said = run_hpo.fails("study", "export", "best")
    assert said == "hpo: study empty has no complete trial yet; resume it with hpo run"


def confirm(study: Study, space: SearchSpace, *, finished: int) -> None:
    """Write a confirmation that the baseline won, in a study of so many finished trials."""
    best = some_contender("trial 4", study.config_of(study.optuna.trials[4]), 0.6)
    found = some_confirmation(
        best, some_contender("baseline", space.baseline, 0.65), study=study.name, evidence=False,
        advantage=Interval(-0.05, 0.02, 2), search_trials=finished,
    )  # fmt: skip
    write_confirmation(study.paths.confirmation, found)


def test_best_exports_the_confirmed_winner_with_its_verdict(study: Study, space: SearchSpace, run_hpo: RunHpo) -> None:
    confirm(study, space, finished=study.counts().finished)
    text = run_hpo("study", "export", "best", "--study", "s")
    assert text.replace("\n# ", " ").startswith("# Confirmed on other seeds and splits: no significant gain: trial 4")
    file = study.paths.dir / "winner.yaml"
    file.write_text(text)
    assert load_recipe(file).config == space.baseline
    assert load_recipe(file).description == "the winner of study s: the baseline (trial 0)"


def test_an_outdated_confirmation_is_ignored(study: Study, space: SearchSpace, run_hpo: RunHpo) -> None:
    confirm(study, space, finished=study.counts().finished - 1)
    text = run_hpo("study", "export", "best", "--study", "s")
    assert "not confirmed since these trials ran" in text
    assert "trial 4 of study s" in text


def test_trials_of_every_shipped_space_can_be_exported(space: SearchSpace, tmp_path: Path) -> None:
    # A recipe's notes stay text, even if they look like YAML.
    shipped = load_space("stl10_small")
    study = on_disk(shipped, name="weird.name-1")
    add(
        study,
        shipped,
        TrialState.COMPLETE,
        shipped.baseline_params(),
        value=0.5,
        attributes={TRIAL_INDEX: 0, "recipe": "a: b # c"},
    )
    export(ExportOptions(trial="0", study="weird.name-1", output=tmp_path / "out.yaml"))
    assert load_recipe(tmp_path / "out.yaml").description == "trial 0 of study weird.name-1, recipe a: b # c"
