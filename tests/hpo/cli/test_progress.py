"""The progress of a study in the terminal, read from its storage alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

import hpo.cli.console
import hpo.cli.progress
from core.config import DataConfig
from hpo.api.common import open_dataset
from hpo.cli.progress import StudyProgress, trial_line
from hpo.cli.terminal import Terminal
from hpo.reporter import Silent
from hpo.search.training import trial_label
from hpo.space import SearchSpace
from hpo.storage.lease import LEASE, own_lease
from hpo.study import Study
from hpo.study.results import append_line
from hpo.trials import BASELINE, FAILURE, REASON, RECIPE, REPLICATE_OF, STOPPED, TRIAL_INDEX
from tests.hpo.confirmation.simulated import in_memory, space_of

SPACE = """
data: {folds: 3}
base: {epochs: 10, batch_size: 64}
pruner: {name: none}
search:
  optim.lr_scale: {low: 0.1, high: 10, log: true}
"""
COMPLETE, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


@pytest.fixture
def study(space: SearchSpace) -> Study:
    made = in_memory(space)
    made.settings.total = 4
    return made


def add(
    study: Study, state: TrialState, *, value: float | None = None, steps: int = 0, **attributes: Any
) -> FrozenTrial:
    """Adds a trial that has reported 0.1, 0.2, …"""
    number = len(study.optuna.trials)
    assert study.queue._space is not None
    study.optuna.add_trial(
        create_trial(
            state=state,
            value=value,
            params={"optim.lr_scale": 2.0},
            distributions=dict(study.queue._space.distributions),
            intermediate_values={step: step / 10 for step in range(1, steps + 1)},
            user_attrs={TRIAL_INDEX: number, **attributes},
        )
    )
    return study.optuna.trials[number]


@pytest.mark.parametrize(
    ("trial", "line"),
    [
        ({"state": COMPLETE, "value": 0.91, "steps": 30, "elapsed_s": 12.34},
         "trial   0  accuracy 0.9100  complete             12.3 s  lr_scale=2"),
        ({"state": PRUNED, "value": 0.3, "steps": 3, "elapsed_s": 1.0},
         "trial   0  accuracy 0.3000  pruned at fold 1, epoch 3    1.0 s  lr_scale=2"),
        ({"state": PRUNED, "value": 2.0, "steps": 20, "elapsed_s": 1.0},
         "trial   0  accuracy 2.0000  pruned at fold 2, epoch 10    1.0 s  lr_scale=2"),
        ({"state": PRUNED, "value": 0.2, "steps": 2, FAILURE: "diverged", REASON: "the loss is NaN"},
         "trial   0  accuracy         diverged                     lr_scale=2  (the loss is NaN)"),
        ({"state": PRUNED, STOPPED: "it can no longer win"},
         "trial   0  accuracy         stopped before it began           lr_scale=2  (it can no longer win)"),
        ({"state": COMPLETE, "value": 0.5, "steps": 30, REPLICATE_OF: 7},
         "trial   0  accuracy 0.5000  complete                     lr_scale=2  (replicate of trial index 7)"),
    ],
)  # fmt: skip
def test_a_finished_trial_is_a_line(study: Study, trial: dict[str, Any], line: str) -> None:
    assert trial_line(study, add(study, **trial)) == line


@pytest.mark.parametrize(
    ("attributes", "params", "shown"),
    [
        ({BASELINE: True}, {"lr_scale": 2.0}, "the baseline"),
        ({RECIPE: "sgd"}, {"lr_scale": 2.0}, "recipe sgd"),
        ({}, {"optim.lr_scale": 2.0, "model.name": "resnet", "optim.name": "sgd"}, "optim.name=sgd"),
        ({}, {"optim.lr_scale": 4.0, "model.name": "vgg", "optim.name": "adamw"}, "lr_scale=4 model.name=vgg"),
        ({}, {"optim.lr_scale": 2.0, "model.name": "resnet", "optim.name": "adamw"}, "as the baseline"),
        ({}, {"optim.lr_scale": 2.0, "optim.momentum": 0.9}, "momentum=0.9"),
    ],
)
def test_a_line_has_what_differs_from_the_baseline(
    attributes: dict[str, Any], params: dict[str, Any], shown: str, study: Study
) -> None:
    def add_trial(params: dict[str, Any], attributes: dict[str, Any]) -> FrozenTrial:
        distributions = {name: CategoricalDistribution([value]) for name, value in params.items()}
        made = create_trial(value=0.5, params=params, distributions=distributions, user_attrs=attributes)
        study.optuna.add_trial(made)
        return study.optuna.trials[-1]

    add_trial({"optim.lr_scale": 2.0, "model.name": "resnet", "optim.name": "adamw"}, {BASELINE: True, TRIAL_INDEX: 0})
    line = trial_line(study, add_trial(params, {**attributes, TRIAL_INDEX: 1}))
    assert line == f"trial   1  accuracy 0.5000  complete                     {shown}"


@pytest.mark.parametrize(("spare", "end"), [(1, "lr_scale=2  (NaN)"), (0, "lr_scale=2  (NaN)"), (-4, "lr_sc…  (NaN)")])
def test_the_parameters_are_cut_to_the_width_of_the_terminal(spare: int, end: str, study: Study) -> None:
    trial = add(study, PRUNED, value=0.2, steps=2, **{FAILURE: "diverged", REASON: "NaN"})
    width = len(trial_line(study, trial)) + spare
    line = trial_line(study, trial, width=width)
    assert line.endswith(f"  {end}")
    assert len(line) <= width


@pytest.mark.parametrize(
    ("steps", "label"), [(0, "fold 1"), (9, "fold 1"), (10, "fold 2"), (29, "fold 3"), (30, "fold 3")]
)
def test_a_running_trial_is_named_with_the_fold_that_it_trains(study: Study, steps: int, label: str) -> None:
    assert trial_label(add(study, RUNNING, steps=steps), epochs=10, folds=3) == f"trial 0, {label} of 3"
    assert trial_label(add(study, RUNNING, steps=steps), epochs=10, folds=1) == "trial 1"


def test_each_trial_is_printed_once_whoever_finished_it_and_earlier_ones_not_at_all(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    add(study, COMPLETE, value=0.5, steps=30)
    with StudyProgress(study) as progress:
        add(study, COMPLETE, value=0.7, steps=30, lease={"host": "elsewhere"})
        progress.refresh(force=True)
        progress.refresh(force=True)
        assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["trial   1"]
        add(study, PRUNED, value=0.1, steps=1)  # and no refresh before the end
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["trial   2"]


def test_the_storage_is_not_read_after_every_short_epoch(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = StudyProgress(study)
    looks: list[Study] = []
    look = hpo.cli.progress.look
    monkeypatch.setattr(hpo.cli.progress, "look", lambda study: looks.append(study) or look(study))
    for _ in range(100):
        progress.refresh()
    assert len(looks) <= 1
    progress.refresh(force=True)
    assert len(looks) in (1, 2)


def test_a_terminal_has_a_bar_for_the_study_and_one_for_each_running_trial(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(width=150, force_terminal=True, highlight=False)
    monkeypatch.setattr(hpo.cli.console, "console", terminal)
    monkeypatch.setattr(hpo.cli.progress, "console", terminal)
    add(study, COMPLETE, value=0.5, steps=30)
    here = add(study, RUNNING, steps=12, **{LEASE: own_lease()})
    study.paths.trial(here.number).mkdir(parents=True)
    append_line(study.paths.trial_metrics(here.number), {"epoch": 2, "train_loss": 0.25, "images_per_s": 1234.5})
    with study.paths.trial_metrics(here.number).open("a") as file:
        file.write('{"epoch": 3, "tra')  # a line that is being written
    elsewhere = add(study, RUNNING, steps=1, **{LEASE: {"host": "elsewhere", "pid": 1}})
    progress = StudyProgress(study)
    progress.refresh(force=True)
    tasks = progress.progress.tasks
    assert [(task.description, task.completed, task.total) for task in tasks] == [
        ("study", 1, 4), ("trial 1, fold 2 of 3", 12, 30), ("trial 2, fold 1 of 3", 1, 30),
    ]  # fmt: skip
    assert [task.fields["note"] for task in tasks] == [
        "best accuracy 0.5000", "loss 0.250  accuracy 1.2000  1,234 images/s", "accuracy 0.1000",
    ]  # fmt: skip
    for trial in (here, elsewhere):
        study.optuna.tell(trial.number, state=PRUNED)
    progress.refresh(force=True)
    assert [(task.description, task.completed) for task in progress.progress.tasks] == [("study", 3)]


@pytest.mark.parametrize(("images", "has_bar"), [(10, False), (100_000, True)])
def test_reading_and_comparing_many_images_have_a_bar_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], images: int, has_bar: bool
) -> None:
    monkeypatch.setattr(hpo.cli.console, "console", Console(width=100, force_terminal=True, highlight=False))
    with Terminal().reading("photos") as on_progress:
        for step in ("reading", "comparing"):
            on_progress(step, images // 2, images)
            time.sleep(0.3)  # the bar is drawn ten times a second
            shown = capsys.readouterr().out
            assert (f"{step} photos" in shown) == has_bar


def test_a_data_set_is_read_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Told(Silent):
        @contextmanager
        def reading(self, label: str) -> Iterator[Callable[[str, int, int], None]]:
            assert label == "digits"
            yield lambda step, done, total: told.append((done, total))

    open_dataset(DataConfig(), None, skip_broken=False, reporter=Told())
    assert told[-1] == (1792, 1797)
