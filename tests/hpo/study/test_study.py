"""Studies: metadata, queue and claims, retries, samplers by trial index, storages, imported trials."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from core.config import TrainConfig
from core.data import DataReport
from hpo.dashboard.artifacts import attach
from hpo.errors import StudyError
from hpo.paths import StudyPaths, studies_root
from hpo.space import SearchSpace, load_space
from hpo.space.pruner import RungPruner, mark_loss
from hpo.storage import METADATA, mask, open_storage
from hpo.storage.optuna_access import attribute_of, set_attribute
from hpo.study import Study, find_study, list_studies, open_study
from hpo.study.dataframe import trials_frame
from hpo.study.versions import versions
from hpo.study.warm_start import warm_starts
from hpo.trials import (
    BASELINE,
    FAILURE,
    INTERRUPTED,
    RECIPE,
    RUNG_LOSS,
    TAKEN_FROM,
    TRIAL_INDEX,
    WARM_START,
    effective_trials,
    is_baseline,
    trial_index_of,
)
from tests.hpo.commands import RunHpo
from tests.hpo.confirmation.simulated import Images
from tests.hpo.storage.postgresql import running_server

SPACE = """
base: {epochs: 10, batch_size: 64}
objective: {metric: accuracy}
pruner: {name: rungs, rungs: [0.2, 0.5], keep: 0.5}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.1, high: 10, log: true}
  augment.strength: {low: 0.0, high: 1.0}
  batch_size: {choices: [32, 64, 128]}
  model.width: {low: 0.5, high: 1.5, step: 0.25}
"""
SAMPLERS = {
    "random": "{name: random}",
    "tpe": "{name: tpe, startup_trials: 4}",
    "gp": "{name: gp, startup_trials: 4}",
    "cmaes": "{name: cmaes, startup_trials: 1}",
    "qmc": "{name: qmc}",
}


@pytest.fixture
def space_of(tmp_path: Path) -> Any:
    def load(text: str = SPACE, name: str = "space") -> SearchSpace:
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        return load_space(str(file), [])

    return load


@pytest.fixture
def open_(space_of: Any) -> Any:
    def opened(name: str = "s", text: str = SPACE, *, trials: int = 0, **options: Any) -> Study:
        options.setdefault("dataset", Images())
        study = open_study(space_of(text), name=name, **options)
        if trials:
            study.queue.ensure_trials(trials)
        return study

    return opened


def value_of(params: dict[str, Any], epoch: int = 10) -> float:
    """Substitute for training: best in the middle of the space, better with every epoch."""
    off = abs(math.log10(params["optim.lr_scale"])) + abs(params["augment.strength"] - 0.4)
    return 1 - off / 4 - abs(params["model.width"] - 1) / 4 - 1 / (epoch + 2)


def work(study: Study, *, stop_before: int | None = None, prune: bool = True) -> None:
    """Run trials until the total is reached, or the trial index `stop_before` is next."""
    for trial, trial_index in claims(study):
        if trial_index == stop_before:
            study.queue.release(trial)
            return
        run(study, trial, prune=prune)


def run(study: Study, trial: optuna.Trial, *, prune: bool) -> None:
    params = suggest(study, trial)
    for epoch in range(1, 11):
        trial.report(value_of(params, epoch), epoch)
        if prune and epoch < 10 and trial.should_prune():
            study.queue.finish(trial, "pruned")
            return
    study.queue.finish(trial, "complete", value_of(params))


def claims(study: Study) -> Iterator[tuple[optuna.Trial, int]]:
    """Claim one trial after the other, each with its index."""
    while (claimed := study.queue.claim()) is not None:
        yield claimed


def suggest(study: Study, trial: optuna.Trial) -> dict[str, Any]:
    """The trial's parameters in the study's space."""
    assert study.queue._space is not None
    return study.queue._space.suggest(trial)


def results(study: Study) -> dict[int, tuple[str, dict[str, Any], float | None, dict[int, float]]]:
    """Trial index -> the result of its trial."""
    return {
        trial_index_of(trial): (trial.state.name, trial.params, trial.value, trial.intermediate_values)
        for trial in study.optuna.trials
        if trial.state != TrialState.FAIL
    }


# Create and resume


def test_study_yaml_holds_the_metadata(open_: Any, space_of: Any) -> None:
    study = open_(seed=7, data_path=Path("some/images.zip"))
    metadata = find_study("s").metadata
    assert metadata["name"] == "s"
    assert metadata["hash"] == space_of().hash
    assert metadata["identity"] == space_of().identity()
    assert metadata["seed"] == 7
    assert metadata["classes"] == ["0", "1"]
    assert TrainConfig.model_validate_json(json.dumps(metadata["base"])) == space_of().baseline
    assert metadata["versions"] == versions()
    assert metadata["versions"]["optuna"] == optuna.__version__
    assert (study.seed, study.metric, study.direction) == (7, "accuracy", "maximize")
    assert (study.data_name, study.skip_broken) == ("digits", False)


def test_a_study_keeps_to_the_validation_images_that_it_began_with(open_: Any) -> None:
    def begun(name: str, given: str | None) -> Study:
        images = Images()
        object.__setattr__(images, "given_val", lambda config: given)
        return open_(name, dataset=images)  # type: ignore[no-any-return]

    begun("given", "ab")
    begun("given", "ab")
    with pytest.raises(StudyError, match=r"begun with other validation images, .*; put the images back"):
        begun("given", "cd")
    with pytest.raises(StudyError, match=r"leave data\.val=drawn out"):
        begun("given", None)
    begun("drawn", None)
    with pytest.raises(StudyError, match=r"study drawn drew its validation images, .* --set data\.val=drawn"):
        begun("drawn", "ab")


def test_a_study_without_a_word_on_validation_drew_its_images(open_: Any) -> None:
    study = open_()
    old = copy.deepcopy(attribute_of(study.optuna, METADATA))
    old["base"]["data"].pop("val")
    old["data"].pop("given_val")
    set_attribute(study.optuna, METADATA, old)
    study.paths.study_yaml.unlink()
    assert open_().metadata["base"]["data"]["val"] == "drawn"


def test_optunas_list_of_studies_shows_short_attributes_only(open_: Any) -> None:
    study = open_()
    study.settings.space = "search: " + 10_000 * "x"
    study.settings.length_probe = {"epochs": list(range(1000))}
    shown = study.optuna.user_attrs
    assert shown["objective"] == "accuracy (maximize)"
    assert len(json.dumps(shown)) < 1000


def test_the_data_path_is_absolute(open_: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_(data_path=Path("some/images.zip"))
    images = Path.cwd().resolve() / "some" / "images.zip"
    monkeypatch.setenv("HPO_STUDIES", str(studies_root().resolve()))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_study("s").data_path == images


def test_the_dashboard_names_the_axis_by_the_metric(open_: Any) -> None:
    assert open_().optuna.metric_names == ["accuracy"]
    assert find_study("s").optuna.metric_names == ["accuracy"]


def test_the_storage_holds_the_metadata_too(open_: Any) -> None:
    study = open_(seed=7)
    study.paths.study_yaml.unlink()
    assert open_().seed == 7
    assert study.paths.study_yaml.exists()


def test_study_yaml_does_not_hold_the_path_of_the_studies(open_: Any) -> None:
    study = open_()
    assert str(studies_root()) not in study.paths.study_yaml.read_text()


def test_a_study_may_be_moved_with_its_folder(open_: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_(trials=3)
    studies_root().rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "elsewhere"))
    assert find_study("s").counts().waiting == 3


def test_another_space_is_refused_with_the_difference_and_advice(open_: Any) -> None:
    open_()
    with pytest.raises(StudyError) as refused:
        open_(text=SPACE.replace("high: 10", "high: 20"))
    assert re.search(r"search\.optim\.lr_scale: high 10 → 20", str(refused.value))
    assert "--study NAME" in str(refused.value)
    assert "--take-over s" in str(refused.value)


def test_a_refused_resume_prints_the_command_that_would_work(open_: Any) -> None:
    open_().settings.command = "hpo run space.yaml --study s --set epochs=3"
    with pytest.raises(StudyError, match=r"(?m)^continue it with\n  hpo run space.yaml --study s --set epochs=3\nor "):
        open_(text=SPACE.replace("high: 10", "high: 20"))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"glass": {"train": 5}, "metal": {"train": 8, "test": 2}}, "1 train image more of metal"),
        ({"glass": {"train": 5}}, "7 train images fewer of metal, 2 test images fewer of metal"),
        ({"glass": {"train": 5}, "metal": {"train": 7, "test": 2}}, "as many of each class, with other content"),
    ],
)
def test_other_images_are_refused_with_the_classes_that_changed_where_their_list_is_missing(
    open_: Any, now: dict[str, Any], said: str
) -> None:
    before = {"glass": {"train": 5}, "metal": {"train": 7, "test": 2}}
    open_(dataset=Images(report=DataReport(counts=before)), data_path=Path("trash")).paths.images.unlink()
    with pytest.raises(StudyError, match=f"{said}.*; give the same by --data .*/trash, or choose another --study"):
        open_(dataset=Images(fingerprint="cd" * 32, report=DataReport(counts=now)))


FILES = {"glass/1.png": ("glass", 1), "glass/2.png": ("glass", 2), "metal/1.png": ("metal", 3)}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({**FILES, "metal/new.jpg": ("metal", 4)}, "1 image more: metal/new.jpg"),
        (
            {**FILES, **{f"glass/{number}.png": ("glass", number) for number in range(4, 9)}},
            "5 images more: glass/4.png, glass/5.png, glass/6.png and 2 more",
        ),
        ({"glass/2.png": ("glass", 2)}, "2 images fewer: glass/1.png, metal/1.png"),
        ({**FILES, "glass/2.png": ("glass", 9)}, "1 image of other content: glass/2.png"),
        ({**FILES, "glass/2.png": ("metal", 2)}, r"1 image of another class: glass/2.png \(glass → metal\)"),
        (
            {"metal/2.png": ("metal", 2), "metal/1.png": ("metal", 3), "new.png": ("metal", 5)},
            "1 image more: new.png; 1 image fewer: glass/1.png; 1 image moved: glass/2.png → metal/2.png",
        ),
        ({**FILES, "test.png": None, "glass/2.png": None}, "1 image more: test.png"),
        ({**FILES, "glass/2.png": None}, "1 image now in the test set or no longer: glass/2.png"),
        (FILES, "the same files, in other groups"),
    ],
)
def test_other_images_are_refused_with_the_files_that_changed(open_: Any, now: dict[str, Any], said: str) -> None:
    open_(dataset=Images(content=FILES))
    with pytest.raises(StudyError, match=rf": {said}; give the same by --data"):
        open_(dataset=Images(fingerprint="cd" * 32, content=now))


def test_a_damaged_list_of_images_is_warned_of_and_written_again(open_: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = open_(dataset=Images(content=FILES)).paths.images
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    open_(dataset=Images(content=FILES))
    assert "images.json.gz cannot be read" in caplog.text
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: random", "{name: tpe}"),
        ("objective: {metric: accuracy}", "objective: {metric: accuracy}\ntrials: 3\ndescription: better"),
    ],
)
def test_sampler_total_and_description_may_change(open_: Any, old: str, new: str) -> None:
    open_()
    open_(text=SPACE.replace("{name: random}" if "tpe" in new else old, new))


def test_another_direction_is_another_space(open_: Any) -> None:
    open_()
    with pytest.raises(StudyError, match=r"objective\.metric: accuracy → nll"):
        open_(text=SPACE.replace("metric: accuracy", "metric: nll"))


def test_other_images_are_refused(open_: Any) -> None:
    study = open_()
    with pytest.raises(StudyError, match=r"other images .*--data"):
        open_(dataset=Images(fingerprint="cd" * 32))
    with pytest.raises(StudyError, match="other images"):
        study.check_data(Images(fingerprint="cd" * 32))
    study.check_data(Images())


def test_another_file_of_weights_under_the_same_name_is_refused(open_: Any, space_of: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"the old ones")
    model = f"model: {{name: timm/resnet10t, pretrained: true, pretrained_file: {weights}}}"
    tuned = SPACE.replace("batch_size: 64}", f"batch_size: 64, {model}}}").replace(
        "  model.width: {low: 0.5, high: 1.5, step: 0.25}\n", ""
    )
    open_(text=tuned)
    study = open_(text=tuned)
    study.check_sources(space_of(tuned).baseline)
    weights.write_bytes(b"the new ones")
    said = r"begun with other weights: .*weights.safetensors has changed"
    with pytest.raises(StudyError, match=said):
        open_(text=tuned)
    with pytest.raises(StudyError, match=said):
        study.check_sources(space_of(tuned).baseline)  # as `hpo refit` does
    with pytest.raises(StudyError, match=r"--take-over s: it was begun with other weights"):
        open_("new", text=tuned, take_over="s")


def test_another_seed_is_refused_and_the_default_is_the_studys_own(open_: Any) -> None:
    open_(seed=3)
    assert open_().seed == 3
    with pytest.raises(StudyError, match="begun with --seed 3, not 4"):
        open_(seed=4)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a\\b", "a b", "x" * 101])
def test_invalid_names_are_refused(open_: Any, name: str) -> None:
    with pytest.raises(StudyError, match="choose another"):
        open_(name)
    with pytest.raises(StudyError, match="choose another"):
        find_study(name)


def test_a_missing_journal_is_not_silently_replaced(open_: Any) -> None:
    study = open_()
    study.paths.journal.unlink()
    with pytest.raises(StudyError, match="is gone"):
        open_()
    with pytest.raises(StudyError, match="is gone"):
        find_study("s")


@pytest.mark.parametrize("text", ["a: [", "just words", "{a: 1}"])
def test_a_damaged_study_yaml_is_reported_with_advice(open_: Any, text: str) -> None:
    open_().paths.study_yaml.write_text(text)
    with pytest.raises(StudyError, match="delete it and run the study again"):
        find_study("s")


def test_studies_are_found_by_name_or_as_the_last_run(open_: Any) -> None:
    with pytest.raises(StudyError, match=r"no studies in .* hpo run digits"):
        find_study()
    for name, at in (("a", 100), ("b", 300), ("c", 200)):
        os.utime(open_(name).paths.study_yaml, (at, at))
    assert find_study().name == "b"
    assert [study.name for study in list_studies()] == ["b", "c", "a"]
    open_("a")  # running it again makes it the last
    assert find_study().name == "a"
    with pytest.raises(StudyError, match=r"no study d in .*; there are a, b, c"):
        find_study("d")


def test_a_study_that_cannot_be_opened_does_not_hide_the_others(open_: Any, caplog: pytest.LogCaptureFixture) -> None:
    open_("a")
    open_("b").paths.journal.unlink()
    assert [study.name for study in list_studies()] == ["a"]
    assert "study b cannot be opened" in caplog.text


def _without(key: str) -> Callable[[StudyPaths], object]:
    return lambda paths: paths.study_yaml.write_text(
        re.sub(rf"(?m)^{key}:", f"not_{key}:", paths.study_yaml.read_text())
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda paths: paths.journal.write_bytes(paths.journal.read_bytes().replace(b"a", b"b", 1)),
        lambda paths: paths.journal.write_bytes(bytes(range(256)) * 20),
        lambda paths: paths.journal.write_bytes(b'{"op_code":2}\n' * 3),
        lambda paths: paths.journal.write_bytes(b""),
        lambda paths: (paths.journal.unlink(), paths.journal.mkdir()),
        lambda paths: paths.study_yaml.write_bytes(bytes(range(256))),
        lambda paths: paths.study_yaml.write_text(paths.study_yaml.read_text() + "storage: [1]\n"),
        lambda paths: (paths.study_yaml.unlink(), paths.study_yaml.mkdir()),
        *map(_without, ("space", "hash", "metric", "direction", "seed", "data", "identity")),
        lambda paths: paths.study_yaml.write_text(
            re.sub(r"(?m)^storage: .*", f"storage: {'x' * 3000}", paths.study_yaml.read_text())
        ),
        lambda paths: find_study(paths.name).optuna.add_trial(
            create_trial(value=0.5, user_attrs={TRIAL_INDEX: "nonsense"})
        ),
    ],
)  # fmt: skip
def test_a_damaged_study_is_a_warning_beside_the_others(
    open_: Any, run_hpo: RunHpo, damage: Callable[[StudyPaths], object]
) -> None:
    open_("a", trials=2)
    open_("b", trials=3)
    damage(StudyPaths.of("a"))
    rows = [line for line in run_hpo("study", "list").splitlines() if not line.startswith(" ")]
    assert [row.split()[0] for row in rows] == ["study", "b"]
    assert re.search(r"^warning: study a cannot be (opened|read)", run_hpo.error)
    assert run_hpo.error.count("\n") == 1


# The queue


def recipes_of(tmp_path: Path, **scales: float) -> str:
    """The space with recipes that differ from the baseline in the learning rate."""
    for name, scale in scales.items():
        (tmp_path / f"{name}.yaml").write_text(f"epochs: 10\nbatch_size: 64\noptim: {{lr_scale: {scale}}}\n")
    return SPACE + f"recipes: [{', '.join(f'{name}.yaml' for name in scales)}]\n"


def test_trial_index_0_is_the_baseline_and_the_others_are_free(open_: Any, space_of: Any) -> None:
    study = open_()
    assert study.total is None
    assert study.queue.ensure_trials(4).waiting == 4
    assert study.total == 4
    waiting = study.optuna.trials
    assert [trial_index_of(trial) for trial in waiting] == [0, 1, 2, 3]
    assert waiting[0].system_attrs["fixed_params"] == space_of().baseline_params()
    assert waiting[0].user_attrs == {TRIAL_INDEX: 0, BASELINE: True}
    assert [trial.system_attrs for trial in waiting[1:]] == [{}] * 3
    trial, trial_index = study.queue.claim()
    assert trial_index == 0
    assert space_of().config(suggest(study, trial)) == space_of().baseline


def test_recipes_that_the_space_can_express_come_first(open_: Any, tmp_path: Path) -> None:
    text = recipes_of(tmp_path, base=1.0, inside=5.0, outside=50.0)
    study = open_(text=text, trials=4)
    recipes = {trial_index_of(trial): trial.user_attrs.get(RECIPE) for trial in study.optuna.trials}
    assert recipes == {0: "base", 1: "inside", 2: None, 3: None}
    work(study, prune=False)
    assert study.optuna.trials[1].params["optim.lr_scale"] == 5.0
    study.queue.ensure_trials(6)
    assert [trial.user_attrs.get(RECIPE) for trial in study.optuna.trials].count("inside") == 1


def test_missing_recipes_are_those_that_no_trial_trains(open_: Any, tmp_path: Path) -> None:
    text = recipes_of(tmp_path, like_base=1.0, first=5.0, second=6.0, like_second=6.0, third=7.0, outside=50.0)

    def missing(total: int) -> list[str]:
        study.queue.ensure_trials(total)
        return [recipe.name for recipe in study.queue.missing_recipes()]

    study = open_(text=text)
    assert [recipe.name for recipe in study.queue.missing_recipes()] == ["like_base", "first", "second", "third"]
    assert missing(2) == ["second", "third"]
    assert missing(4) == []
    assert missing(6) == []
    assert [trial.user_attrs.get(RECIPE) for trial in study.optuna.trials] == [
        "like_base", "first", "second", "third", None, None,
    ]  # fmt: skip
    assert missing(3) == ["third"]  # it waits beyond the total, where no worker comes


def test_a_recipe_that_is_added_after_all_trials_were_queued_is_missing(open_: Any, tmp_path: Path) -> None:
    open_(trials=3)
    study = open_(text=recipes_of(tmp_path, late=5.0, like_base=1.0), trials=3)
    assert [recipe.name for recipe in study.queue.missing_recipes()] == ["late"]
    study.queue.ensure_trials(4)
    assert study.optuna.trials[3].user_attrs[RECIPE] == "late"
    assert study.queue.missing_recipes() == []


def test_the_total_is_a_total(open_: Any) -> None:
    study = open_()
    for _ in range(2):  # the same command again
        study.queue.ensure_trials(5)
        work(study)
        assert study.counts().finished == 5
        study = open_(trials=8)
    work(study)
    assert study.counts().finished == 8
    assert len(study.optuna.trials) == 8


def test_a_smaller_total_leaves_the_other_trials_waiting(open_: Any) -> None:
    study = open_(trials=9)
    study.queue.ensure_trials(3)
    work(study)
    assert study.counts().finished == 3
    assert study.counts().waiting == 6


def test_a_smaller_total_counts_the_trials_that_ended_behind_waiting_ones(open_: Any) -> None:
    """As after a time limit that was too short for the trials 1 and 2."""
    study = open_(trials=9)
    for _ in range(3):
        trial, _ = study.queue.claim(without=(1, 2))
        suggest(study, trial)
        study.queue.finish(trial, "complete", 0.5)
    study.queue.ensure_trials(4)
    assert (study.queue.waiting(), study.queue.claimable()) == (1, 1)
    work(study)
    assert study.counts().finished == 4
    assert study.queue.claim() is None
    effective = effective_trials(study.optuna.trials)
    assert sorted(index for index, trial in effective.items() if trial.state.is_finished()) == [0, 1, 3, 4]


def test_trials_that_two_processes_queued_at_once_run_once(open_: Any) -> None:
    study = open_(trials=3)
    for trial_index in (0, 1, 2):  # as a second process does that has not seen them
        study.optuna.enqueue_trial({}, user_attrs={TRIAL_INDEX: trial_index})
    work(study)
    assert study.counts().finished == 3
    study.queue.ensure_trials(3)
    assert [trial.state for trial in study.optuna.trials[3:]] == [TrialState.FAIL] * 3
    assert study.counts().waiting == 0


def test_counts_are_by_state(open_: Any) -> None:
    study = open_(trials=6)
    for state, failure in (("complete", None), ("pruned", None), ("pruned", "oom")):
        trial, _ = study.queue.claim()
        suggest(study, trial)
        study.queue.finish(trial, state, 0.5 if state == "complete" else None, failure=failure)
    study.queue.claim()
    counts = study.counts()
    assert (counts.complete, counts.pruned, counts.failures, counts.running, counts.waiting) == (1, 1, 1, 1, 2)
    assert counts.finished == 3


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("nll", 1)])
def test_the_best_trial_is_complete_and_of_equals_the_first(open_: Any, metric: str, best: int) -> None:
    study = open_(text=SPACE.replace("metric: accuracy", f"metric: {metric}"))
    assert study.best_trial() is None
    study.queue.ensure_trials(6)
    for value in (0.5, 0.1, 0.9, 0.9, 0.1):
        trial, _ = study.queue.claim()
        study.queue.finish(trial, "complete", value)
    trial, _ = study.queue.claim()
    trial.report(2.0 if metric == "accuracy" else -2.0, 1)
    study.queue.finish(trial, "pruned")
    assert study.best_trial().number == best


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_complete_trial_has_a_finite_value(open_: Any, value: float | None) -> None:
    study = open_(trials=1)
    trial, _ = study.queue.claim()
    with pytest.raises(ValueError, match="complete with the value"):
        study.queue.finish(trial, "complete", value)


def test_the_configuration_of_a_complete_trial_is_known(open_: Any, space_of: Any) -> None:
    from core.seeds import derive_seed

    text = SPACE + "  model.widths: {choices: [[64, 128, 256, 512], [32, 64, 128, 256]]}\n"
    study = open_(text=text, seed=5)
    space = space_of(text)
    study.queue.ensure_trials(4)
    expected = {}
    for _ in range(3):
        trial, trial_index = study.queue.claim()
        config = space.config(space.suggest(trial)).override({"seed": derive_seed(5, "trial", trial_index)})
        expected[trial.number] = config
        attributes = ({}, {"epochs": 7}, {"epochs": 7, "kept_epoch": 5})[trial_index]
        study.queue.finish(trial, "complete", 0.5 + trial_index / 10, attributes=attributes)
    study = find_study("s")
    for number, config in expected.items():
        trained = study.trained(number)
        assert trained.config == config
        assert trained.value == pytest.approx(0.5 + number / 10)
        assert (trained.epochs, trained.ran) == ((10, 10), (7, 7), (5, 7))[number]
    with pytest.raises(StudyError, match="trial 3 is waiting; choose a complete one"):
        study.trained(3)
    with pytest.raises(StudyError, match="no trial 9; its trials are 0 to 3"):
        study.trained(9)


# Studies of version 0.1.0, which named the attributes `slot` and `base`


@pytest.fixture
def old_study(open_: Any) -> Study:
    """Two finished trials, two interrupted ones and two waiting ones of version 0.1.0."""
    study: Study = open_("old", trials=6)
    work(study, stop_before=2)
    trials = study.optuna.trials
    study.optuna._storage.delete_study(study.optuna._study_id)
    study.paths.study_yaml.unlink()
    study = open_("old")
    for trial in trials:
        old_names = {TRIAL_INDEX: "slot", BASELINE: "base"}
        trial.user_attrs = {old_names.get(name, name): value for name, value in trial.user_attrs.items()}
        study.optuna.add_trial(trial)
    return study


def test_a_study_with_old_and_new_trials_is_completed_and_read(open_: Any, old_study: Study) -> None:
    new = open_("new", trials=8)
    work(new)
    trial, _ = old_study.queue.claim()  # an attempt at an old trial that is interrupted
    old_study.queue.release(trial)
    old_study.queue.ensure_trials(8)
    assert old_study.counts().waiting == 6
    work(old_study)
    assert results(old_study) == results(new)
    attributes = [trial.user_attrs for trial in old_study.optuna.trials]
    assert any("slot" in known for known in attributes)
    assert any(TRIAL_INDEX in known for known in attributes)
    assert not any("slot" in known and TRIAL_INDEX in known for known in attributes)
    assert [trial_index_of(trial) for trial in old_study.optuna.trials if is_baseline(trial)] == [0]
    frame = trials_frame(old_study)
    assert sorted(frame.trial_index) == list(range(8))
    assert frame.baseline.sum() == 1
    assert not {"slot", "base"} & set(frame.columns)


def test_old_trials_are_imported_under_new_names(open_: Any, old_study: Study) -> None:
    new = open_("new", take_over="old")
    assert [set(trial.user_attrs) & {"slot", "base", TRIAL_INDEX, BASELINE} for trial in new.optuna.trials] == [
        {TRIAL_INDEX, BASELINE},
        {TRIAL_INDEX},
    ]
    new.queue.ensure_trials(4)
    assert [trial_index_of(trial) for trial in new.optuna.trials] == [0, 1, 2, 3]


def test_an_old_baseline_that_was_interrupted_is_requeued_under_new_names(open_: Any) -> None:
    study = open_()
    study.optuna.enqueue_trial({}, user_attrs={"slot": 0, "base": True})
    trial, _ = study.queue.claim()
    study.queue.release(trial)
    assert study.optuna.trials[1].user_attrs == {TRIAL_INDEX: 0, BASELINE: True}
    assert study.queue.ensure_trials(1).waiting == 1


# Interrupted trials and retries


def test_a_released_trial_is_queued_again_with_its_parameters(open_: Any) -> None:
    study = open_(trials=3)
    work(study, stop_before=1)
    trial, trial_index = study.queue.claim()
    params = suggest(study, trial)
    trial.report(0.1, 1)
    study.queue.release(trial)
    assert study.optuna.trials[trial.number].state == TrialState.FAIL
    assert study.optuna.trials[trial.number].user_attrs[INTERRUPTED] is True
    again, same_index = study.queue.claim()
    assert same_index == trial_index == 1
    assert again.number > 2  # queued after the others, and claimed before them
    assert suggest(study, again) == params
    assert again.user_attrs[TRIAL_INDEX] == 1
    assert INTERRUPTED not in again.user_attrs
    again.report(0.1, 1)  # by a checkpoint's history: nothing is reported yet


def test_a_retried_trial_has_no_artifacts_of_the_earlier_attempt(open_: Any, tmp_path: Path) -> None:
    study = open_(trials=1)
    trial, _ = study.queue.claim()
    (tmp_path / "curves.png").write_bytes(b"a picture")
    attach(trial, tmp_path / "curves.png", study.files.dashboard_store())
    study.optuna._storage.set_trial_system_attr(trial._trial_id, "rung:2", [1, 1, True])
    study.queue.release(trial)
    before, again = study.optuna.trials
    metas = [
        optuna.artifacts.get_all_artifact_meta(attempt, storage=study.optuna._storage) for attempt in (before, again)
    ]
    assert [len(meta) for meta in metas] == [1, 0]
    assert again.system_attrs["rung:2"] == [1, 1, True]


def test_the_result_of_a_reclaimed_trial_is_dropped(open_: Any, caplog: pytest.LogCaptureFixture) -> None:
    study = open_(trials=2)
    trial, _ = study.queue.claim()
    study.queue.release(trial)  # as another process that took it for dead would
    assert study.queue.finish(trial, "complete", 0.5) is False
    assert "was taken from this process" in caplog.text
    trial, _ = study.queue.claim()
    study.queue.release(trial)
    study.queue.finish(trial, "pruned", failure="oom")
    assert study.counts().finished == 0
    assert study.counts().waiting == 2


def test_an_index_without_a_trial_is_queued_by_the_next_run(open_: Any) -> None:
    study = open_(trials=2)
    trial, _ = study.queue.claim()
    params = suggest(study, trial)
    # A process that dies after it has ended the attempt, before it has queued the slot again.
    study.optuna._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    study.queue.ensure_trials(2)
    again, trial_index = study.queue.claim()
    assert trial_index == 0
    assert suggest(study, again) == params
    assert again.user_attrs[BASELINE] is True


OPEN = """
import sys, time
from types import SimpleNamespace
from core.data import DataReport
from hpo.space import load_space
from hpo.study import open_study
space = load_space(sys.argv[1], [])
images = SimpleNamespace(name="digits", fingerprint="ab" * 32, classes=("0", "1"),
    report=DataReport(), given_val=lambda config: None, stamp="", checksums=dict)
study = open_study(space, name="s", dataset=images, storage_url=sys.argv[2] or None)
"""
CLAIM = """
trial, trial_index = study.queue.claim()
space.suggest(trial)
print(trial_index, flush=True)
time.sleep(600)
"""


@pytest.fixture
def claimer(tmp_path: Path) -> Iterator[Any]:
    """Start a process that claims a trial of study `s` and keeps it running."""
    processes = []

    def start() -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", OPEN + CLAIM, str(tmp_path / "space.yaml"), ""]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_only_the_trials_of_dead_processes_are_reclaimed(open_: Any, space_of: Any, claimer: Any) -> None:
    study = open_(trials=3)
    process, trial_index = claimer()
    assert trial_index == 0
    assert study.queue.reclaim() == []
    assert study.counts().running == 1
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not (reclaimed := study.queue.reclaim()):  # dead, though its parent has not waited for it yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert reclaimed == [0]
    work(study)
    assert study.counts().finished == 3
    assert study.counts().running == 0
    assert results(study)[0][1] == space_of().baseline_params()


def lease(study: Study, trial: optuna.Trial, **change: Any) -> None:
    own = study.optuna.trials[trial.number].user_attrs["lease"]
    study.optuna._storage.set_trial_user_attr(trial._trial_id, "lease", {**own, **change})


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"host": "elsewhere", "pid": 1, "start": 0}, False),  # cannot be seen from here
        ({"boot": "before the power cut"}, True),
        ({"start": 1}, True),  # the number was given to another process since
        ({"pid": 2**22 + 1}, True),
    ],
)
def test_a_lease_identifies_host_boot_and_process(open_: Any, change: dict[str, Any], dead: bool) -> None:
    study = open_(trials=1)
    trial, _ = study.queue.claim()
    lease(study, trial, **change)
    assert study.queue.reclaim() == ([0] if dead else [])


def test_a_checkpoint_that_a_dying_process_leaves_of_a_finished_trial_is_dropped_and_no_other(open_: Any) -> None:
    study = open_(trials=3)
    finished, _ = study.queue.claim()
    study.queue.finish(finished, "complete", 0.5)
    study.queue.claim()
    checkpoints = [study.paths.checkpoint(trial_index) for trial_index in range(3)]
    for checkpoint in checkpoints:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
    study.queue.drop_finished_checkpoints()
    assert [checkpoint.exists() for checkpoint in checkpoints] == [False, True, True]


@pytest.mark.parametrize(("age_s", "dead"), [(0, False), (3600, True)])
def test_a_running_trial_without_a_lease_is_reclaimed_after_a_while(
    open_: Any, monkeypatch: pytest.MonkeyPatch, age_s: float, dead: bool
) -> None:
    study = open_(trials=1)
    trial, _ = study.queue.claim()
    trial.set_user_attr("lease", None)  # as a process that dies while it pauses the trial leaves it
    monkeypatch.setattr("hpo.storage.lease._GRACE_S", 60 - age_s)
    assert study.queue.reclaim() == ([0] if dead else [])


def test_a_trial_of_another_host_is_reclaimed_by_force_only(open_: Any) -> None:
    study = open_(trials=3)
    study.queue.claim()  # by this process, which lives
    trial, trial_index = study.queue.claim()
    assert study.queue.held_elsewhere() == []
    lease(study, trial, host="container-1f")
    assert study.queue.held_elsewhere() == [(1, "container-1f", study.optuna.trials[1].datetime_start)]
    assert study.queue.reclaim() == []
    assert study.queue.reclaim(force=True) == [trial_index]
    assert study.queue.held_elsewhere() == []
    counts = study.counts()
    assert (counts.running, counts.waiting) == (1, 2)


def test_two_processes_reclaim_a_trial_once(open_: Any) -> None:
    study = open_(trials=1)
    study.queue.claim()
    frozen = study.optuna.trials[0]
    assert study.queue._interrupt(frozen, crashed=False)
    assert not study.queue._interrupt(frozen, crashed=False)  # the other has seen it running a moment ago
    assert len(study.optuna.trials) == 2


# Samplers by trial index


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stopped_and_an_interrupted_study_equal_an_undisturbed_one(open_: Any, space_of: Any, sampler: str) -> None:
    text = SPACE.replace("{name: random}", SAMPLERS[sampler])
    space = space_of(text)

    twin = open_("twin", text, trials=12)
    work(twin)
    assert twin.counts().finished == 12
    assert twin.counts().pruned > 0
    assert len({trial.params["optim.lr_scale"] for trial in twin.optuna.trials}) == 12  # no point twice

    stopped = open_("stopped", text, trials=5)
    work(stopped)
    stopped = open_("stopped", text)  # everything rebuilt from the storage
    stopped.queue.ensure_trials(12)
    work(stopped)
    assert results(stopped) == results(twin)

    cut = open_("cut", text, trials=12)
    for trial_index, suggested in ((5, len(space.search)), (8, 2), (10, 0)):
        work(cut, stop_before=trial_index)
        trial, claimed = cut.queue.claim()
        assert claimed == trial_index
        for parameter in list(space.search.values())[:suggested]:
            parameter.suggest(trial)
        trial.report(0.0, 1)
        cut.queue.release(trial)
        cut = open_("cut", text)
    work(cut)
    assert results(cut) == results(twin)


def test_another_seed_is_another_search(open_: Any) -> None:
    studies = [open_(name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    for study in studies:
        study.queue.ensure_trials(3)
        work(study)
    first, second = (results(study) for study in studies)
    assert first[0] == second[0]  # the baseline
    assert first[1] != second[1]


def test_tpe_learns(open_: Any) -> None:
    text = SPACE.replace("{name: random}", "{name: tpe, startup_trials: 10}")
    study = open_(text=text, trials=40)
    work(study, prune=False)
    values = [trial.value for trial in study.optuna.trials]
    assert sum(values[-10:]) / 10 > sum(values[1:11]) / 10 + 0.1


def test_tpe_avoids_the_region_where_trials_fail(open_: Any, space_of: Any) -> None:
    """Half of the space runs out of memory, which the sampler learns from the constraint."""
    text = SPACE.replace("{name: random}", "{name: tpe, startup_trials: 10}")
    study, space = open_(text=text), space_of(text)
    study.queue.ensure_trials(60)
    failures = []
    for trial, _ in claims(study):
        params = space.suggest(trial)
        failures.append(params["augment.strength"] > 0.5)
        if failures[-1]:
            study.queue.finish(trial, "pruned", failure="oom")
        else:
            study.queue.finish(trial, "complete", 0.5)  # nothing else to learn
    assert study.counts().failures == sum(failures)
    assert sum(failures[-30:]) <= 6  # a sampler that does not learn draws 15
    failed = next(trial for trial in study.optuna.trials if FAILURE in trial.user_attrs)
    assert failed.constraints == {"failure": 1.0}
    assert failed.user_attrs[FAILURE] == "oom"
    assert study.best_trial().constraints == {}


def test_constraints_raise_no_warning_under_cmaes(open_: Any) -> None:
    text = SPACE.replace("{name: random}", "{name: cmaes}")
    study = open_(text=text, trials=3)
    for trial, _ in claims(study):
        suggest(study, trial)
        study.queue.finish(trial, "pruned", failure="diverged")
    assert study.counts().failures == 3


# Storages


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
        return
    with running_server() as server:
        yield server.url


def close(study: Study) -> None:
    study.optuna._storage._backend.engine.dispose()


def test_a_study_in_a_database_has_the_results_of_one_in_a_journal(open_: Any, database: str, claimer: Any) -> None:
    journal = open_("journal", trials=6)
    work(journal)

    study = open_(storage_url=database, trials=6)
    work(study, stop_before=2)
    close(study)
    process, trial_index = claimer()
    assert trial_index == 2
    process.kill()
    process.wait()
    study = open_()  # study.yaml holds the URL
    assert study.storage_url == database
    assert study.queue.reclaim() == [2]
    study.queue.ensure_trials(6)
    work(study)
    assert results(study) == results(journal)
    close(study)


def test_another_storage_is_refused(open_: Any, tmp_path: Path) -> None:
    open_()
    with pytest.raises(StudyError, match=r"study s lies in .*journal\.log; leave --storage out"):
        open_(storage_url=f"sqlite:///{tmp_path / 'x.db'}")


def test_a_journal_may_be_in_another_folder_and_shared(open_: Any, tmp_path: Path) -> None:
    open_(storage_url=str(tmp_path / "shared" / "all.log"), trials=2)
    assert (tmp_path / "shared" / "all.log").exists()
    assert find_study("s").counts().waiting == 2
    open_("t", storage_url=str(tmp_path / "shared" / "all.log"), trials=3)  # two studies in one journal
    assert find_study("s").counts().waiting == 2


def test_a_study_of_another_program_is_refused(open_: Any, tmp_path: Path) -> None:
    journal = str(tmp_path / "theirs.log")
    optuna.create_study(study_name="s", storage=open_storage(journal), direction="maximize").optimize(
        lambda trial: trial.suggest_float("x", 0, 1), n_trials=1
    )
    with pytest.raises(StudyError, match="that hpo did not begin"):
        open_(storage_url=journal)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("nonsense://x", "not a storage that Optuna knows"),
        ("postgresql+psycopg://u@127.0.0.1:1/x", "cannot be opened .*check that the server runs"),
        ("postgresql+psycopg://u:s3cret@127.0.0.1:1/x", r"u:\*\*\*@.*check that the server runs"),
        ("postgresql+psycopg2://u@127.0.0.1:1/x", r"psycopg2 is not installed; write postgresql\+psycopg://"),
        (
            "mysql+pymysql://u@127.0.0.1:1/x",
            r"(pymysql is not installed; pip install 'hpo-vision\[mysql\]')|check that",
        ),
        ("redis://:s3cret@127.0.0.1:1/0", r"(redis is not installed; pip install 'hpo-vision\[redis\]')|check that"),
        ("sqlite:////no/such/folder/x.db", "cannot be opened .*check the folder"),
        ("postgresql+psycopg://u@[::1/x", "not a storage|cannot be opened"),
        ("postgresql+psycopg://u:s3cret\ns3cret@127.0.0.1:1/x", r"u:\*\*\*@127.*check that the server runs"),
        ("postgresql+psycopg:///u:s3cret@host/d?host=127.0.0.1&port=1", r"u:\*\*\*@host.*check that the server runs"),
    ],
)
def test_an_unusable_storage_is_reported_in_one_line(open_: Any, url: str, match: str) -> None:
    with pytest.raises(StudyError, match=match) as refused:
        open_(storage_url=url)
    assert "\n" not in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert not StudyPaths.of("s").study_yaml.exists()


@pytest.mark.parametrize(
    "given",
    [
        "postgresql+psycopg:/u:s3cret@host/d",
        "postgresql+psycopg:u:s3cret@host/d",
        "mysql+pymysql;//u:s3cret@host/d",
        "//u:s3cret@host/d",
        "u:s3cret@host/d",
        "https:/u:s3\ns3cret@host/d",
        "host=127.0.0.1 user=u password=s3cret",
        "redis:/host/0?password=s3cret",
        "sqlite:/x.db",
    ],
)
@pytest.mark.parametrize("option", ["--storage", "--artifacts"])
def test_a_mistyped_url_is_no_path_and_its_password_is_not_shown(
    open_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StudyError, match=rf"^{option} .* is neither a URL nor a plain path; write SCHEME://"
    ) as refused:
        if option == "--storage":
            open_(storage_url=given)
        else:
            open_().files.use_store(given)
    assert "s3" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not [path for path in tmp_path.rglob("*") if ":" in path.name or "s3" in path.name]


def test_a_password_in_the_path_of_an_old_study_is_not_shown(open_: Any) -> None:
    open_()
    file = StudyPaths.of("s").study_yaml
    file.write_text(re.sub("(?m)^storage: .*", "storage: postgresql:/u:s3cret@host/journal.log", file.read_text()))
    with pytest.raises(StudyError, match=r"journal postgresql:/\*\*\*@host/journal.log is gone"):
        find_study("s")


def test_an_empty_storage_is_refused(open_: Any) -> None:
    with pytest.raises(StudyError, match="--storage is empty"):
        open_(storage_url="")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("studies/x/journal.log", "studies/x/journal.log"),
        ("sqlite:///x.db", "sqlite:///x.db"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql+psycopg://u:p%40ss@h:5432/d", "postgresql+psycopg://u:***@h:5432/d"),
        ("postgresql+psycopg://u:p@ss/w#rd@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql+psycopg://h/d?user=u&password=hunter2", "postgresql+psycopg://h/d?user=u&password=***"),
        ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://hunter2@h:6379/0", "redis://***@h:6379/0"),
        ("postgresql+psycopg://u:pass\nword@h/d", "postgresql+psycopg://u:***@h/d"),
        ("postgresql+psycopg://u%3Ahunter2@h/d", "postgresql+psycopg://u%3A***@h/d"),
        ("postgresql+psycopg:///u:hunter2@h/d", "postgresql+psycopg:///u:***@h/d"),
        ("postgresql+psycopg://h:h@h/h", "postgresql+psycopg://h:***@h/h"),
        ("sqlite:///C:\\Users\\me@work\\x.db", "sqlite:///C:\\Users\\me@work\\x.db"),
        ("C:\\Users\\me@work\\journal.log", "C:\\Users\\me@work\\journal.log"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert mask(url) == shown


def test_a_password_is_never_stored(open_: Any, database: str, caplog: pytest.LogCaptureFixture) -> None:
    if database.startswith("sqlite"):
        pytest.skip("SQLite has no passwords")
    secret = database.replace("hpo@", "hpo:hunter2@")  # trust authentication takes any
    caplog.set_level(logging.DEBUG)
    study = open_(storage_url=secret, trials=1)
    assert "not written down" in caplog.text
    close(study)
    for file in studies_root().rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes()
    assert "hunter2" not in caplog.text + study.storage_shown + json.dumps(study.optuna.user_attrs)
    close(study)
    with pytest.raises(StudyError, match=r"give --storage postgresql\+psycopg://hpo:\*\*\*@.* with the password"):
        open_()
    study = open_(storage_url=secret)
    assert study.counts().waiting == 1
    close(study)


# The journal after a crash


@pytest.mark.parametrize("cut", [1, 2, 17, 30])
def test_a_torn_last_line_is_cut_off(open_: Any, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    study = open_(trials=3)
    work(study, stop_before=2)
    before = results(study)
    whole = study.paths.journal.read_bytes()
    metadata = whole.splitlines(keepends=True)[-1]
    study.paths.journal.write_bytes(whole + metadata[:-cut])
    assert results(find_study("s")) == before
    assert study.paths.journal.read_bytes() == whole
    assert "torn by a crash" in caplog.text
    assert (study.paths.dir / "journal.log.torn").read_bytes() == metadata[:-cut] + b"\n"
    study = open_()
    work(study)
    assert study.counts().finished == 3


def test_a_torn_record_in_front_of_a_complete_one_is_removed(open_: Any) -> None:
    study = open_(trials=3)
    work(study, stop_before=2)
    whole = study.paths.journal.read_bytes()
    metadata = whole.splitlines(keepends=True)[-1]
    study.paths.journal.write_bytes(whole + metadata[:20])
    study.optuna.set_user_attr("note", 'a {"op_code": in a text')  # another process, that had opened it before
    study = find_study("s")
    assert study.optuna.user_attrs["note"] == 'a {"op_code": in a text'
    study = open_()
    work(study)
    assert study.counts().finished == 3


@pytest.mark.parametrize("tail", [b"\0" * 50, b'{"op_code":4,"wor\n', b"{"])
def test_other_tails_after_a_power_failure_are_cut_off_too(open_: Any, tail: bytes) -> None:
    study = open_(trials=2)
    with study.paths.journal.open("ab") as journal:
        journal.write(tail)
    assert find_study("s").counts().waiting == 2
    open_(trials=3)
    assert find_study("s").counts().waiting == 3


def test_damage_in_the_middle_is_an_error_with_its_line_and_changes_nothing(open_: Any) -> None:
    study = open_(trials=3)
    lines = study.paths.journal.read_bytes().splitlines(keepends=True)
    lines[1] = b"garbage\n"
    study.paths.journal.write_bytes(b"".join(lines))
    with pytest.raises(StudyError, match=r"journal\.log:2: damaged"):
        find_study("s")
    assert study.paths.journal.read_bytes() == b"".join(lines)


def test_a_finished_trial_is_synced_to_the_disk(open_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_(trials=2)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    trial, _ = study.queue.claim()
    for epoch in range(1, 6):
        trial.report(0.1, epoch)
    assert not synced
    study.queue.finish(trial, "complete", 0.5)
    assert len(synced) == 1


# Imported trials


def test_fitting_trials_are_imported_with_the_new_distributions(open_: Any, space_of: Any) -> None:
    old = open_("old", seed=3, trials=20)
    for trial, trial_index in claims(old):
        params = suggest(old, trial)
        if trial_index % 5 == 4:
            old.queue.finish(trial, "pruned", failure="oom")
        else:
            trial.report(value_of(params, 1), 1)
            mark_loss(old.optuna, trial, 1, 0.25)
            old.queue.finish(trial, "complete", value_of(params), attributes={"epochs": 10})
    # A bound is tighter, one parameter is no longer searched (64 remains), one is new.
    text = SPACE.replace("high: 1.0", "high: 0.6").replace("  batch_size: {choices: [32, 64, 128]}\n", "")
    text += "  loss.smoothing: {low: 0.0, high: 0.2}\n"
    space = space_of(text)
    fitting = {
        trial.number: trial
        for trial in old.optuna.trials
        if trial.params["augment.strength"] <= 0.6 and trial.params["batch_size"] == 64
    }
    assert 2 < len(fitting) < 20
    new = open_("new", text, take_over="old")
    assert {trial_index_of(trial) for trial in new.optuna.trials} == set(fitting)
    for taken in new.optuna.trials:
        source = fitting[trial_index_of(taken)]
        assert taken.distributions == {path: space.distributions[path] for path in taken.params}
        assert taken.params["loss.smoothing"] == space.baseline.loss.smoothing
        assert taken.params["optim.lr_scale"] == source.params["optim.lr_scale"]
        assert (taken.state, taken.value, taken.constraints) == (source.state, source.value, source.constraints)
        assert taken.intermediate_values == source.intermediate_values
        assert taken.system_attrs.get(f"{RUNG_LOSS}1") == (0.25 if taken.intermediate_values else None)
        assert (taken.datetime_start, taken.datetime_complete) == (source.datetime_start, source.datetime_complete)
        assert taken.user_attrs[TAKEN_FROM] == f"old/{source.number}"
        if taken.state == TrialState.COMPLETE:
            assert new.trained(taken.number).config == old.trained(source.number).config
    assert new.optuna.trials[0].user_attrs[BASELINE] is True
    new.queue.ensure_trials(20)
    work(new, prune=False)
    assert new.counts().finished == 20
    again = open_("new", text, take_over="old")  # the same command again
    assert again.counts().finished == 20


NEW_BASE = SPACE.replace("batch_size: 64}", "batch_size: 64, optim: {lr_scale: 2.0}}")


def test_a_new_baseline_is_queued_beside_the_imported_trials(open_: Any, space_of: Any) -> None:
    old = open_("old", trials=4)
    work(old, prune=False)
    new = open_("new", NEW_BASE, take_over="old", trials=6)
    trials = {trial_index_of(trial): trial for trial in new.optuna.trials}
    assert sorted(trials) == list(range(6))
    assert [trial_index for trial_index, trial in trials.items() if BASELINE in trial.user_attrs] == [0]
    assert trials[0].system_attrs["fixed_params"] == space_of(NEW_BASE).baseline_params()
    assert trials[4].user_attrs[TAKEN_FROM] == "old/0"  # the old baseline, moved for the new one
    assert new.trained(trials[4].number).config == old.trained(0).config
    work(new, prune=False)
    assert new.counts().finished == 6
    assert results(new)[0][1] == space_of(NEW_BASE).baseline_params()


def test_a_new_baseline_is_trained_even_if_every_index_was_imported(open_: Any) -> None:
    old = open_("old", trials=3)
    work(old, prune=False)
    new = open_("new", NEW_BASE, take_over="old", trials=3)
    trial, trial_index = new.queue.claim()
    assert trial_index == 0
    assert trial.user_attrs[BASELINE] is True


@pytest.mark.parametrize(("state", "is_base"), [("complete", True), ("pruned", False)])
def test_a_complete_imported_trial_with_the_new_baselines_parameters_is_the_baseline(
    open_: Any, space_of: Any, state: Any, is_base: bool
) -> None:
    old = open_("old")
    old.optuna.enqueue_trial(space_of(NEW_BASE).baseline_params(), user_attrs={TRIAL_INDEX: 1})
    old.queue.ensure_trials(3)
    for trial, trial_index in claims(old):
        suggest(old, trial)
        old.queue.finish(trial, state if trial_index == 1 else "complete", 0.5)
    new = open_("new", NEW_BASE, take_over="old", trials=5)
    bases = {trial_index_of(trial): trial.state.name for trial in new.optuna.trials if BASELINE in trial.user_attrs}
    assert bases == ({1: "COMPLETE"} if is_base else {0: "WAITING"})
    assert len(new.optuna.trials) == 5


def test_an_imported_trial_with_the_parameters_of_a_recipe_is_that_recipe(open_: Any, tmp_path: Path) -> None:
    text = recipes_of(tmp_path, dropped=3.0, retuned=4.0, kept=5.0, cut_short=6.0)
    old = open_("old", text, trials=6)
    for trial, _ in claims(old):
        suggest(old, trial)
        failed = trial.user_attrs.get(RECIPE) == "cut_short"
        old.queue.finish(trial, "pruned" if failed else "complete", 0.5, failure="oom" if failed else None)
    new = open_("new", recipes_of(tmp_path, retuned=4.5, kept=5.0, cut_short=6.0, renamed=3.0), take_over="old")
    recipes = {trial_index_of(trial): trial.user_attrs.get(RECIPE) for trial in new.optuna.trials}
    assert recipes == {0: None, 1: "renamed", 2: None, 3: "kept", 4: None, 5: None}
    new.queue.ensure_trials(8)
    queued = [trial for trial in new.optuna.trials if trial.state == TrialState.WAITING]
    assert [trial.user_attrs[RECIPE] for trial in queued] == ["retuned", "cut_short"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("epochs: 10", "epochs: 20"), "not comparable: epochs: 10 → 20"),
        (("metric: accuracy", "metric: macro_f1"), "not comparable: objective.metric"),
        (("batch_size: 64}", "batch_size: 64, model: {se: true}}"), "none of its 3 finished trials fits"),
    ],
)
def test_trials_that_are_not_comparable_are_not_imported(open_: Any, change: tuple[str, str], match: str) -> None:
    old = open_("old", trials=3)
    work(old)
    with pytest.raises(StudyError, match=match):
        open_("new", SPACE.replace(*change), take_over="old")


def test_trials_on_other_images_are_not_imported(open_: Any) -> None:
    open_("old", trials=1)
    with pytest.raises(StudyError, match="begun with other images"):
        open_("new", dataset=Images(fingerprint="cd" * 32), take_over="old")


# Warm starts

OTHER_SPACE = """
base: {epochs: 20, batch_size: 64, optim: {lr: 0.001}}
objective: {metric: macro_f1}
search:
  optim.lr: {low: 1e-4, high: 0.1, log: true}
  augment.strength: {low: 0.0, high: 0.5}
  loss.smoothing: {low: 0.0, high: 0.2}
"""


def test_the_best_configurations_of_other_images_are_tried_after_the_baseline(open_: Any, space_of: Any) -> None:
    old = open_("old", dataset=Images(fingerprint="cd" * 32), trials=20)
    work(old, prune=False)
    new, space = open_("new", OTHER_SPACE), space_of(OTHER_SPACE)
    new.queue.ensure_trials(12, warm_starts(space, old))
    trials = sorted(new.optuna.trials, key=trial_index_of)
    assert trials[0].user_attrs[BASELINE] is True
    best = sorted(old.optuna.trials, key=lambda trial: trial.value, reverse=True)
    assert [trial.user_attrs.get(WARM_START) for trial in trials[1:]] == [
        *(f"old/{trial.number}" for trial in best[:4]),
        *[None] * 7,
    ]
    for queued, source in zip(trials[1:5], best, strict=False):
        params, meant = queued.system_attrs["fixed_params"], old.trained(source.number).config
        # The rate in the new space's terms; unsearched values as they were; those out of range are left out.
        assert params["optim.lr"] == pytest.approx(meant.optim.peak_lr(meant.batch_size))
        assert params["loss.smoothing"] == meant.loss.smoothing
        strength = meant.augment.strength
        assert params.get("augment.strength") == (strength if strength <= 0.5 else None)
    while (claimed := new.queue.claim()) is not None:
        suggested = space.suggest(claimed[0])
        assert set(suggested) == set(space.search)
        new.queue.finish(claimed[0], "complete", 0.5)
    assert new.counts().finished == 12


def test_warm_starts_are_queued_once_and_the_rest_of_them_when_the_total_grows(open_: Any, space_of: Any) -> None:
    old = open_("old", trials=20)
    work(old, prune=False)
    first = warm_starts(space_of(), old)
    new = open_("new")
    for total in (3, 3, 11):
        new.queue.ensure_trials(total, first)
    queued = [trial.user_attrs.get(WARM_START) for trial in sorted(new.optuna.trials, key=trial_index_of)]
    assert queued == [None, *(attributes[WARM_START] for _, attributes in first), *[None] * 6]


def test_warm_starts_differ_from_the_baseline_and_from_each_other(open_: Any, space_of: Any) -> None:
    old = open_("old", trials=20)
    work(old, prune=False)
    sizes = {trial.params["batch_size"] for trial in old.optuna.trials}
    only = "base: {batch_size: 64}\nobjective: {metric: accuracy}\nsearch:\n  batch_size: {choices: [32, 64, 128]}\n"
    found = [params for params, _ in warm_starts(space_of(only), old)]
    assert sizes == {32, 64, 128}
    assert sorted(params["batch_size"] for params in found) == [32, 128]


def test_a_study_without_a_finished_trial_is_no_warm_start(open_: Any, space_of: Any) -> None:
    old = open_("old", trials=3)
    with pytest.raises(StudyError, match=r"--warm-start old: it has no complete trial; leave it out"):
        warm_starts(space_of(), old)
    work(old, stop_before=1, prune=False)
    with pytest.raises(StudyError, match=r"no trial other than this space's baseline"):
        warm_starts(space_of(), old)


def test_the_pruner_is_that_of_the_space(open_: Any) -> None:
    study = open_()
    assert isinstance(study.optuna.pruner, RungPruner)
    assert study.optuna.pruner.rungs == (2, 5)
