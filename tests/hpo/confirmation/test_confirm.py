"""`hpo confirm`: the candidates and their reasons, their seeds and splits, early stopping, and the result."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from core.config import TrainConfig
from core.data import Dataset, Division, folds, load_dataset, on_device
from core.errors import UserError
from hpo.api.confirm import confirmed
from hpo.api.options import ConfirmOptions
from hpo.cli.progress import StudyProgress
from hpo.confirmation.candidates import NEIGHBOURS, candidates, predict, unit_cube
from hpo.confirmation.conclusion import conclude
from hpo.confirmation.plan import Plan
from hpo.confirmation.result import Confirmation, identity_of, read_confirmation
from hpo.confirmation.statistics import MAX_REPLICATES, own_score
from hpo.confirmation.trials import (
    Training,
    open_confirmation,
    per_repeat,
    replicated,
    search_epochs,
    seconds_per_epoch,
    trainings,
    why_stopped,
)
from hpo.errors import SpaceError, StudyError
from hpo.paths import StudyPaths
from hpo.search.interrupts import Interrupts
from hpo.space import ConfirmationSpace, SearchSpace, load_space, space_from_yaml, space_to_yaml
from hpo.study import Study, find_study, list_studies
from hpo.study.results import write_result
from hpo.study.settings import StudySettings
from hpo.trials import BASELINE, CONFIG, RECIPE, RUNG_LOSS, STOPPED, TRIAL_INDEX
from tests.hpo.commands import RunHpo, hpo, studies_in
from tests.hpo.confirmation.simulated import Images, on_disk, space_of

CPU = torch.device("cpu")
# Two epochs are enough for the right learning rate (0.6), and far too few for a small one (0.1).
SPACE = """
data: {{name: digits}}
base: {{model: {{widths: [8], blocks: [1]}}, epochs: 2, batch_size: 64, augment: {{flip: 0.0, crop_pad_fraction: 0.0}},
  optim: {{lr_scale: {base}}}}}
pruner: {{name: none}}
sampler: {{name: random}}
search:
  optim.lr_scale: {{choices: {choices}}}
confirm: {{budget: {budget}}}
"""
TRIALS = 2
# Of four epochs, which are ten trainings.
PLANTED = SPACE.format(base=1, choices="[300, 1]", budget=5)
HOPELESS = SPACE.format(base=300, choices="[1, 300]", budget=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies: `planted`, `hopeless`, both confirmed, and `searched`, which is `planted` before that."""
    folder = tmp_path_factory.mktemp("confirm")
    with studies_in(folder) as patch:
        for name, text in {"planted": PLANTED, "hopeless": HOPELESS}.items():
            (folder / f"{name}.yaml").write_text(text)
            assert hpo(patch, "run", str(folder / f"{name}.yaml"), "--trials", str(TRIALS), "--device", "cpu") == 0
        shutil.copytree(folder / "studies", folder / "searched")
        for name in ("planted", "hopeless"):
            assert hpo(patch, "confirm", name, "--device", "cpu") == 0
    return folder


@pytest.fixture
def studies(trained: Path, tmp_path: Path) -> Path:
    """The confirmed studies, to be changed."""
    return Path(shutil.copytree(trained / "studies", tmp_path / "studies"))


@pytest.fixture
def searches(trained: Path, tmp_path: Path) -> Path:
    """The searches before they were confirmed, to be changed."""
    return Path(shutil.copytree(trained / "searched", tmp_path / "studies"))


def result_of(name: str) -> Confirmation:
    found = read_confirmation(StudyPaths.of(name).confirmation)
    assert found is not None
    return found


def scores_of(confirmation: Confirmation) -> dict[str, dict[int, tuple[float, ...]]]:
    return {one.key: one.scores for one in confirmation.contenders}


def configs_of(study: Study) -> dict[int, list[TrainConfig]]:
    """Replicate -> what was trained on it."""
    found: dict[int, list[TrainConfig]] = defaultdict(list)
    for training, trial in zip(trainings(study), study.optuna.get_trials(), strict=True):
        found[training.replicate].append(TrainConfig.model_validate_json(json.dumps(trial.user_attrs[CONFIG])))
    return found


# The result


def test_a_planted_better_configuration_is_confirmed(studies: Path) -> None:
    confirmation = result_of("planted")
    winner = confirmation.contender(confirmation.winner)
    assert confirmation.evidence
    assert confirmation.winner == confirmation.leader
    assert winner.config["optim"]["lr_scale"] == 300
    assert "best validation score" in winner.chosen_for
    assert confirmation.advantage is not None
    assert confirmation.advantage.low > 0
    assert "better than the baseline by" in confirmation.verdict


def test_a_search_that_cannot_beat_its_baseline_has_no_significant_gain(studies: Path) -> None:
    confirmation = result_of("hopeless")
    assert not confirmation.evidence
    assert confirmation.winner == "baseline"
    assert confirmation.verdict.startswith("no significant gain")


def test_the_verdict_is_in_the_storage_of_the_search(studies: Path) -> None:
    for name in ("planted", "hopeless"):
        assert find_study(name).settings.verdict == result_of(name).verdict


def test_the_result_counts_trainings_and_epochs(studies: Path) -> None:
    confirmation, study = result_of("planted"), find_study("planted.confirm")
    complete = [trial for trial in study.optuna.get_trials() if trial.state == TrialState.COMPLETE]
    assert confirmation.trainings == len(complete) == sum(len(one.scores) for one in confirmation.contenders)
    assert confirmation.epochs == sum(trial.user_attrs["epochs"] for trial in complete)
    assert confirmation.search_epochs == search_epochs(find_study("planted")) == 2 * TRIALS
    assert confirmation.search_trials == TRIALS
    best = confirmation.contender("trial 1")
    assert best.interval is not None
    assert confirmation.optimism == pytest.approx((best.search_value or math.nan) - best.interval.mean)


# Seeds and splits


def test_all_trainings_of_a_replicate_share_a_new_seed_and_a_new_fold(studies: Path, digits: Dataset) -> None:
    search, study = find_study("planted"), find_study("planted.confirm")
    by_replicate = configs_of(study)
    assert {len(configs) for configs in by_replicate.values()} == {2}
    assert len(by_replicate) == 5
    drawn = [
        {(config.seed, config.data.split_seed, config.data.val_part) for config in configs}
        for configs in by_replicate.values()
    ]
    assert {len(pairs) for pairs in drawn} == {1}
    seeds, split_seeds, parts = zip(*(pairs.pop() for pairs in drawn), strict=True)
    searched = [search.config_of(trial) for trial in search.optuna.get_trials()]
    assert len({*seeds, *(config.seed for config in searched)}) == len(seeds) + TRIALS
    assert parts == (0, 1, 2, 3, 0)
    assert len({*split_seeds[:4]}) == 1
    assert len({*split_seeds, *(config.data.split_seed for config in searched)}) == 2 + 1
    validated = {tuple(folds(digits, configs[0].data)[0].val.tolist()) for configs in by_replicate.values()}
    assert len(validated) == len(by_replicate)


def test_a_candidate_has_the_configuration_of_its_trial_with_another_seed_and_split(studies: Path) -> None:
    search, study = find_study("planted"), find_study("planted.confirm")
    found = {identity_of(trial.user_attrs[CONFIG]) for trial in study.optuna.get_trials()}
    chosen = result_of("planted").contenders
    assert found == {identity_of(one.config) for one in chosen}
    for one in chosen:
        assert one.trial is not None
        trained = search.trained(one.trial)
        assert one.config == trained.config.model_dump(mode="json")
        assert one.search_value == trained.value
        assert one.epochs == trained.epochs


@pytest.mark.parametrize("fraction", [0.25, 0.2, 0.1])
def test_every_image_is_validated_once_per_repeat_with_the_training_share_of_the_search(
    digits: Dataset, fraction: float
) -> None:
    config = TrainConfig().override({"data.val_fraction": fraction})
    searched, k = folds(digits, config.data)[0], round(1 / fraction)
    for repeat in range(2):
        numbers = range(repeat * k, (repeat + 1) * k)
        drawn = [folds(digits, replicated(config, number, seed=3, dataset=digits).data)[0] for number in numbers]
        assert torch.cat([one.val for one in drawn]).sort().values.tolist() == list(range(len(digits.labels)))
        assert all(abs(len(one.train) - len(searched.train)) <= 1 for one in drawn)


def test_a_confirmation_of_an_earlier_version_continues_with_free_splits(
    searches: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("hpo.confirmation.plan.in_parts", lambda known: False)
        study = begun("planted", digits, share=3)
    assert len(trainings(study)) == 6
    known = configs_of(begun("planted", digits, share=5))
    assert sorted(known) == list(range(5))
    found = [configs[0] for configs in known.values()]
    assert {config.data.val_part for config in found} == {None}
    assert len({config.data.split_seed for config in found}) == 5
    own = found[0].override({"seed": 0, "data.split_seed": 0})
    assert found[4] == replicated(own, 4, seed=find_study("planted").seed, dataset=digits, parts=False)
    assert per_repeat(trainings(study)) == 1


def test_the_intervals_follow_the_folds(studies: Path) -> None:
    found = result_of("planted")
    assert found.per_repeat == per_repeat(trainings(find_study("planted.confirm"))) == 4
    assert found.test_share is not None
    best = found.contender("trial 1")
    scored = own_score(best.scores, test_share=found.test_share, per_repeat=4, resolution=found.resolution)
    assert best.interval == scored
    assert "± is a 95 % interval over n seeds and folds of a repeated k-fold" in "\n".join(found.lines())


def test_replicates_never_take_the_split_of_the_search(digits: Dataset) -> None:
    first = replicated(TrainConfig(), 0, seed=3, dataset=digits)
    taken = TrainConfig().override({"data.split_seed": first.data.split_seed})
    assert replicated(taken, 0, seed=3, dataset=digits).data.split_seed != first.data.split_seed
    assert replicated(TrainConfig(), 0, seed=4, dataset=digits).data.split_seed != first.data.split_seed
    assert replicated(TrainConfig(), 0, seed=3, dataset=digits) == first


def test_splits_that_leave_a_class_without_images_are_skipped(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    images[40:] = images[[40, 41] * 10]  # of the third class there are two images, ten times each
    np.savez(tmp_path / "copies.npz", images=images, labels=np.repeat(["a", "b", "c"], 20))
    config = TrainConfig().override({"data.name": str(tmp_path / "copies.npz")})
    dataset = load_dataset(config.data)

    def is_possible(split_seed: int) -> bool:
        try:
            folds(dataset, config.override({"data.split_seed": split_seed, "data.val_part": 0}).data)
        except UserError:
            return False
        return True

    assert not all(map(is_possible, range(100)))
    for replicate in range(100):
        folds(dataset, replicated(config, replicate, seed=0, dataset=dataset).data)


def test_replicates_on_given_validation_images_differ_by_seed_only(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    parts = {"train": slice(0, 40), "val": slice(40, 60)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": np.arange(60)[part] % 2 for name, part in parts.items()}
    np.savez(tmp_path / "given.npz", **arrays)
    config = TrainConfig().override({"data.name": str(tmp_path / "given.npz")})
    dataset = load_dataset(config.data)
    first, second = (replicated(config, number, seed=0, dataset=dataset) for number in (0, 1))
    assert first.seed != second.seed
    assert first.override({"seed": 0}) == second.override({"seed": 0}) == config
    drawn = replicated(config.override({"data.val": "drawn"}), 0, seed=0, dataset=dataset)
    assert drawn.data.split_seed != config.data.split_seed


def test_no_usable_split_is_an_error(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images, labels=np.repeat(["a", "b", "c"], 4))
    config = TrainConfig().override({"data.name": str(tmp_path / "few.npz"), "data.val_fraction": 0.1})
    with pytest.raises(UserError, match=r"data\.val_fraction"):
        replicated(config, 0, seed=0, dataset=load_dataset(config.data))


def test_a_division_of_the_images_is_the_same_on_every_device(digits: Dataset) -> None:
    division = Division(digits)
    for changes in ({}, {"data.split_seed": 5}, {"data.folds": 3}, {"data.split_seed": 5}):
        config = TrainConfig().override(changes).data
        expected = on_device(folds(digits, config), CPU)
        for here, there in ((division.here(config), expected), (division.on(CPU, config), expected)):
            assert len(here) == len(there)
            for a, b in zip(here, there, strict=True):
                assert torch.equal(a.train, b.train)
                assert torch.equal(a.val, b.val)
                assert a.mean == b.mean
                assert a.std == b.std
        assert division.on(CPU, config) is division.on(CPU, config)
        assert all(split.images is division.on(CPU, TrainConfig().data)[0].images for split in division.on(CPU, config))


# Resuming


def test_confirming_again_trains_nothing_and_prints_the_same(studies: Path, run_hpo: RunHpo) -> None:
    before = result_of("planted")
    said = run_hpo("confirm", "planted")
    assert result_of("planted") == before
    assert all(line in said for line in before.lines())
    assert "this will take" not in said
    with Interrupts() as interrupts:
        assert confirmed(find_study("planted"), ConfirmOptions(device="cpu"), interrupts=interrupts) == before


def test_the_confirmation_of_a_renamed_or_copied_study_is_still_its_own(studies: Path, run_hpo: RunHpo) -> None:
    lines = result_of("planted").lines()
    run_hpo("study", "copy", "planted", "copied")
    run_hpo("study", "rename", "planted", "renamed")
    for name in ("copied", "renamed"):
        said = run_hpo("confirm", name, "--device", "cpu")
        assert all(line in said for line in lines)
        assert "this will take" not in said
        assert (find_study(f"{name}.confirm").confirms, result_of(name).study) == (name, name)
        assert find_study(f"{name}.confirm").settings.command == f"hpo confirm {name} --device cpu"
        begun(name, load_dataset(TrainConfig().data), share=5.0)  # accepts the metadata as its own
    assert sorted(study.name for study in list_studies() if "hopeless" not in study.name) == [
        "copied", "copied.confirm", "renamed", "renamed.confirm"
    ]  # fmt: skip


def test_trainings_are_kept_after_more_trials_and_with_another_budget(
    studies: Path, trained: Path, run_hpo: RunHpo
) -> None:
    before = {
        (training.identity, training.replicate): training for training in trainings(find_study("planted.confirm"))
    }
    run_hpo("run", str(trained / "planted.yaml"), "--trials", "3", "--device", "cpu")
    run_hpo("confirm", "planted", "--budget", "4", "--device", "cpu")
    after = trainings(find_study("planted.confirm"))
    assert len(after) == len({(training.identity, training.replicate) for training in after}) == 12
    assert result_of("planted").replicates == 6  # 4 × 6 epochs are twelve trainings
    for training in after[:10]:
        assert before[training.identity, training.replicate] == training


@pytest.mark.slow
def test_an_interrupted_confirmation_resumes_with_two_workers_to_the_same_result(
    searches: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    def refreshed(progress: StudyProgress, *, force: bool = False) -> None:
        refresh(progress, force=force)
        if force and progress.study.counts().finished == 3:
            signal.raise_signal(signal.SIGINT)

    refresh = StudyProgress.refresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudyProgress, "refresh", refreshed)
        said = run_hpo("confirm", "planted", "--device", "cpu", code=130)
    assert "stopped: 3 of 10 trainings are done and safe; resume with\n  hpo confirm planted" in said
    assert not StudyPaths.of("planted").confirmation.exists()
    run_hpo("confirm", "planted", "--device", "cpu", "--workers", "2")
    after = scores_of(result_of("planted"))
    monkeypatch.setenv("HPO_STUDIES", str(trained / "studies"))
    assert after == scores_of(result_of("planted"))


def test_a_worker_that_joins_trains_the_same(
    searches: Path, trained: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    study = begun("planted", digits, share=5)
    run_hpo("worker", "planted.confirm", "--device", "cpu")
    there = [(training.identity, training.replicate, training.values) for training in trainings(study)]
    monkeypatch.setenv("HPO_STUDIES", str(trained / "studies"))
    undisturbed = trainings(find_study("planted.confirm"))
    assert there == [(training.identity, training.replicate, training.values) for training in undisturbed]


def test_a_result_without_some_trainings_is_completed(studies: Path, digits: Dataset, run_hpo: RunHpo) -> None:
    study = begun("planted", digits, share=6)
    assert (study.queue.waiting(), result_of("planted").trainings) == (2, 10)
    run_hpo("confirm", "planted", "--device", "cpu")
    assert (study.queue.waiting(), result_of("planted").trainings) == (0, 12)


def test_trainings_queued_by_a_process_that_died_before_raising_the_total_are_trained(
    searches: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun("planted", digits, share=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StudySettings, "total", property(lambda _: raised(KeyboardInterrupt())))
        begun("planted", digits, share=5)
    study = find_study("planted.confirm")
    assert (len(trainings(study)), study.total) == (10, 6)
    begun("planted", digits, share=5)
    assert (len(trainings(study)), study.total) == (10, 10)


def raised(error: BaseException) -> int:
    raise error


def test_two_processes_queueing_at_once_queue_everything_once(searches: Path, digits: Dataset) -> None:
    search = find_study("planted")
    space = search.space()
    splits = folds(digits, space.baseline.data)
    studies = [open_confirmation(search, space, digits, splits, data_path=None) for _ in range(2)]
    plans = [Plan(find_study("planted"), space, share=5) for _ in studies]
    with ThreadPoolExecutor(2) as both:
        queued = list(both.map(Plan.queue, plans, studies, [digits] * 2))
    assert sorted(queued) == [0, 10]
    assert studies[0].total == len(studies[0].optuna.get_trials()) == 10


def test_an_attempt_that_died_while_being_stopped_is_not_marked_as_stopped(searches: Path, digits: Dataset) -> None:
    study, _ = a_field(digits)
    opened = Study(study.optuna, study.paths, study.metadata, study.storage_url, study.space())
    claimed = opened.queue.claim()
    assert claimed is not None
    trial, trial_index = claimed
    trial.set_user_attr(STOPPED, "cannot win")
    opened.queue.release(trial)
    assert next(one for one in trainings(study) if one.trial_index == trial_index).stopped is None


# Early stopping


def begun(name: str, dataset: Dataset, *, share: float) -> Study:
    """The confirmation of a study with its missing trainings queued."""
    search = find_study(name)
    space = search.space()
    plan = Plan(search, space, share=share)
    study = open_confirmation(search, space, dataset, folds(dataset, space.baseline.data), data_path=None)
    plan.queue(study, dataset)
    return study


def test_a_candidate_that_cannot_win_is_stopped(studies: Path) -> None:
    study = find_study("hopeless.confirm")
    base, challenger = result_of("hopeless").contenders
    assert len(base.scores) == 5
    assert base.stopped is None
    assert len(challenger.scores) == 3
    assert challenger.stopped is not None
    assert challenger.stopped.startswith("worse than baseline by")
    stopped = [trial for trial in study.optuna.get_trials() if STOPPED in trial.user_attrs]
    assert [(trial.state, trial.user_attrs[STOPPED]) for trial in stopped] == 2 * [
        (TrialState.PRUNED, challenger.stopped)
    ]
    assert study.counts().finished == study.total == 10


def test_saved_trainings_go_to_the_remaining_candidates(searches: Path, digits: Dataset) -> None:
    study, plan = a_field(digits)
    assert (plan.allocation.candidates, plan.allocation.replicates) == (3, 5)
    end_all(study, {"baseline": 0.5, "trial 1": 0.9, "trial 2": 0.1}, stop={"trial 2": 3})
    assert plan.queue(study, digits) == 2  # of the two that were saved, one more replicate for each that is left
    assert [(training.key, training.replicate) for training in trainings(study)[-2:]] == [
        ("trial 1", 5),
        ("baseline", 5),
    ]
    end_all(study, {"baseline": 0.5, "trial 1": 0.9, "trial 2": 0.1})
    assert plan.queue(study, digits) == 0
    confirmation = conclude(plan, study)
    assert confirmation.trainings == plan.allocation.trainings == 15
    assert confirmation.contender("trial 2").stopped == "cannot win"


def test_nothing_more_is_trained_when_no_challenger_remains(searches: Path, digits: Dataset) -> None:
    study, plan = a_field(digits)
    end_all(study, {"baseline": 0.5, "trial 1": 0.3, "trial 2": 0.1}, stop={"trial 1": 3, "trial 2": 3})
    assert plan.queue(study, digits) == 0
    assert conclude(plan, study).winner == "baseline"


@pytest.mark.parametrize(
    ("failing", "winner", "words"),
    [
        ("baseline", "trial 1", "the baseline could not be trained"),
        ("trial 1", "trial 2", "better than the baseline"),
        ("trial 2", "trial 1", "better than the baseline"),
    ],
)
def test_a_failed_candidate_is_reported_and_cannot_win(
    failing: str, winner: str, words: str, searches: Path, digits: Dataset
) -> None:
    study, plan = a_field(digits)
    end_all(study, {"baseline": 0.5, "trial 1": 0.9, "trial 2": 0.899}, fail={failing})
    assert plan.queue(study, digits) == 4  # its first training was its last, of five
    end_all(study, {"baseline": 0.5, "trial 1": 0.9, "trial 2": 0.899})
    confirmation = conclude(plan, study)
    assert confirmation.winner == winner
    assert words in confirmation.verdict
    assert confirmation.contender(failing).failure == "diverged"
    assert confirmation.contender(failing).interval is None


def test_it_is_an_error_if_all_trainings_fail(searches: Path, digits: Dataset) -> None:
    study, plan = a_field(digits)
    end_all(study, {}, fail={"baseline", "trial 1", "trial 2"})
    with pytest.raises(StudyError, match=r"field: nothing could be trained again .*diverged"):
        conclude(plan, study)


@pytest.mark.parametrize("seed", range(6))
def test_several_workers_end_a_race_as_one_does(searches: Path, digits: Dataset, seed: int) -> None:
    alone, together = (raced(digits, f"field-{workers}", workers, seed) for workers in (1, 5))
    assert any(one.stopped for one in alone.contenders)
    assert together.trainings >= alone.trainings == sum(len(one.scores) for one in alone.contenders)
    assert [(one.key, one.scores, one.stopped, one.interval) for one in together.contenders] == [
        (one.key, one.scores, one.stopped, one.interval) for one in alone.contenders
    ]
    assert (together.winner, together.advantage, together.expected) == (alone.winner, alone.advantage, alone.expected)


def raced(dataset: Dataset, name: str, workers: int, seed: int) -> Confirmation:
    """Run a race of invented scores in which so many trainings run at a time, and end in a random order."""
    study, plan = a_field(dataset, name, share=10.0)
    space = study.space()
    assert isinstance(space, ConfirmationSpace)
    opened = Study(study.optuna, study.paths, study.metadata, study.storage_url, space)
    order = np.random.default_rng(seed)
    luck = np.random.default_rng(seed).normal(0, 0.02, (3, MAX_REPLICATES))
    means = {"baseline": 0.5, "trial 1": 0.52, "trial 2": 0.46}
    running: list[Any] = []
    while True:
        claimed = opened.queue.claim() if len(running) < workers else None
        if claimed is not None:
            trial, trial_index = claimed
            space.suggest(trial)
            why = why_stopped(study, space, trial, trial_index)
            if why is None:
                running.append(trial)
            else:
                opened.queue.finish(trial, "pruned", attributes={STOPPED: why, "epochs": 0})
        elif running:
            trial = running.pop(order.integers(len(running)))
            key, replicate = trial.user_attrs["candidate"], trial.user_attrs["replicate"]
            value = means[key] + luck[list(means).index(key), replicate]
            opened.queue.finish(trial, "complete", value, attributes={"epochs": 10})
        elif not plan.queue(study, dataset):
            return conclude(plan, study)


def a_field(dataset: Dataset, name: str = "field", share: float = 5.0) -> tuple[Study, Plan]:
    """A confirmation of the baseline, trial 1 and trial 2, whose scores the test invents."""
    search, space = invented(name, {1: 0.9, 2: 0.8}, dataset)
    plan = Plan(search, space, share=share)  # of 3 × 10 epochs: by default 15 trainings
    study = open_confirmation(search, space, dataset, folds(dataset, space.baseline.data), data_path=None)
    plan.queue(study, dataset)
    return study, plan


def end_all(
    study: Study,
    values: dict[str, float],
    *,
    stop: dict[str, int] | None = None,
    fail: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Finish all waiting trainings with these values, stopped from a replicate on, or failed at once."""
    space = study.space()
    opened = Study(study.optuna, study.paths, study.metadata, study.storage_url, space)
    failed: set[str] = set()
    while (claimed := opened.queue.claim()) is not None:
        trial, _ = claimed
        space.suggest(trial)
        key, replicate = trial.user_attrs["candidate"], trial.user_attrs["replicate"]
        if replicate >= (stop or {}).get(key, math.inf) or key in failed:
            opened.queue.finish(trial, "pruned", attributes={STOPPED: "cannot win", "epochs": 0})
        elif key in fail:
            failed.add(key)
            opened.queue.finish(trial, "pruned", failure="diverged", attributes={"epochs": 1})
        else:
            opened.queue.finish(trial, "complete", values[key] + replicate / 1000, attributes={"epochs": 10})


# The budget


@pytest.mark.parametrize(
    ("share", "budget", "allocated"),
    [
        (None, 30, (2, 1)),  # no more than the search
        (0.33, 9, (2, 3)),  # the smallest useful confirmation
        (2.0, 60, (2, 3)),
        (8 / 3, 80, (2, 4)),
        (10 / 3, 100, (2, 5)),
        (5.0, 150, (3, 5)),
        (7.0, 210, (3, 7)),
        (1000.0, 30_000, (3, 10)),
    ],
)
def test_the_budget_is_a_share_of_the_search_epochs(
    share: float | None, budget: int, allocated: tuple[int, int], digits: Dataset
) -> None:
    search, space = invented("s", {1: 0.9, 2: 0.8}, digits)
    plan = Plan(search, space, share=share)
    assert (search_epochs(search), plan.cost_epochs, plan.budget_epochs) == (30, 10, budget)
    assert (plan.allocation.candidates, plan.allocation.replicates) == allocated
    assert plan.is_over_budget == (share is not None and budget < 60)
    assert len(plan.left_out) == 3 - allocated[0]


@pytest.mark.parametrize(
    ("trials", "budget", "allocated"),
    [(12, 120, (3, 4)), (40, 133, (3, 4)), (8, 80, (2, 4)), (150, 500, (6, 8)), (250, 833, (6, 10))],
)
def test_the_default_budget_is_a_third_and_at_least_twelve_trainings_but_no_more_than_the_search(
    trials: int, budget: int, allocated: tuple[int, int], digits: Dataset
) -> None:
    search, space = invented("s", {number: number / 300 for number in range(1, trials)}, digits, base=0.0)
    plan = Plan(search, space, share=None)
    assert plan.budget_epochs == budget
    assert (plan.allocation.candidates, plan.allocation.replicates) == allocated
    assert not plan.is_over_budget


@pytest.mark.parametrize(
    ("slow_s", "share", "within_s", "allocated", "seconds"),
    [
        (10.0, None, None, (3, 4), 120.0),
        (40.0, None, None, (3, 4), 240.0),  # of 270 s
        (200.0, None, None, (2, 2), 420.0),  # of 430 s
        (200.0, 0.5, None, (3, 4), 880.0),  # the user's own budget may take longer
        (10.0, None, 100.0, (2, 5), 100.0),
        (200.0, None, 650.0, (2, 3), 630.0),  # nor than the user allows
        (10.0, 9.0, 10.0, (2, 3), 60.0),
    ],
)
def test_by_default_the_finalists_take_no_more_time_than_the_search(
    slow_s: float,
    share: float | None,
    within_s: float | None,
    allocated: tuple[int, int],
    seconds: float,
    digits: Dataset,
) -> None:
    times = {number: {"elapsed_s": slow_s if number == 23 else 10.0} for number in range(24)}
    search, space = invented("s", {number: number / 300 for number in range(1, 24)}, digits, attributes=times)
    plan = Plan(search, space, share=share, within_s=within_s)
    assert plan.search_s == 230.0 + slow_s
    assert (plan.allocation.candidates, plan.allocation.replicates) == allocated
    assert plan.seconds == pytest.approx(seconds)
    assert plan.is_over_budget == (within_s == 10.0)


def test_without_times_the_budget_is_one_of_epochs(digits: Dataset) -> None:
    search, space = invented("s", {number: number / 300 for number in range(1, 12)}, digits)
    plan = Plan(search, space, share=None)
    assert (plan.search_s, plan.seconds) == (None, None)


def test_the_space_sets_the_budget_which_does_not_change_the_hash(tmp_path: Path) -> None:
    spaces = {}
    for budget in (0.33, 2.0):
        (tmp_path / "s.yaml").write_text(SPACE.format(base=1, choices="[1, 300]", budget=budget))
        spaces[budget] = load_space(tmp_path / "s.yaml")
        assert spaces[budget].confirm.budget == budget
        assert space_from_yaml(space_to_yaml(spaces[budget]), "s").confirm.budget == budget
    assert spaces[0.33].hash == spaces[2.0].hash
    assert load_space(tmp_path / "s.yaml", ["confirm.budget=0.5"]).confirm.budget == 0.5
    for wrong in ("0", "-1", "true", "much"):
        with pytest.raises(SpaceError, match=r"confirm\.budget"):
            load_space(tmp_path / "s.yaml", [f"confirm.budget={wrong}"])


def test_a_space_without_a_budget_can_be_read(tmp_path: Path) -> None:
    lines = space_to_yaml(space_of(tmp_path, PLANTED)).splitlines(keepends=True)
    start = next(place for place, line in enumerate(lines) if line.startswith("confirm:"))
    end = next(place for place in range(start + 1, len(lines)) if not lines[place].startswith(" "))
    assert space_from_yaml("".join(lines[:start] + lines[end:]), "s").confirm.budget is None


def test_the_space_of_a_confirmation_is_written_and_read_back(tmp_path: Path) -> None:
    space = space_of(tmp_path, PLANTED)
    written = ConfirmationSpace(
        name="s",
        path=space.path,
        objective=space.objective,
        baseline=space.baseline,
        confirms="s",
        train_images=3,
        val_images=1,
    )
    read = space_from_yaml(space_to_yaml(written), "s")
    assert isinstance(read, ConfirmationSpace)
    assert (read.baseline, read.objective, read.confirms, read.hash) == (
        space.baseline,
        space.objective,
        "s",
        written.hash,
    )
    assert read.test_share == pytest.approx(1 / 3)
    assert read.resolution == 1


# The candidates

RUNGS = """
base: {epochs: 10, batch_size: 64}
pruner: {name: rungs, rungs: [0.2, 0.5], keep: 0.5}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.01, high: 100, log: true}
"""


def invented(
    name: str,
    values: dict[int, float],
    dataset: Any,
    *,
    lr_scale: dict[int, float] | None = None,
    at: dict[int, dict[int, float]] | None = None,
    attributes: dict[int, dict[str, Any]] | None = None,
    losses: dict[int, float] | None = None,
    base: float = 0.5,
    text: str = RUNGS,
) -> tuple[Study, SearchSpace]:
    """A search of ten epochs per trial with invented values: trial 0 is the baseline. `losses` are those at epoch 5."""
    space = space_from_yaml(text, name)
    study = on_disk(space, name=name, dataset=dataset)
    for number, value in {0: base, **values}.items():
        rate = 1.0 if number == 0 else (lr_scale or {}).get(number, 2.0 + number / 100)
        study.optuna.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=value,
                params={"optim.lr_scale": rate},
                distributions=space.distributions,
                user_attrs={TRIAL_INDEX: number, "epochs": 10, "kept_epoch": 7}
                | ({BASELINE: True} if number == 0 else {})
                | (attributes or {}).get(number, {}),
                system_attrs={f"{RUNG_LOSS}5": losses[number]} if losses else None,
                intermediate_values=(at or {}).get(number, {}),
            )
        )
    return study, space


IMAGES = Images()


def reasons(study: Study, space: SearchSpace) -> dict[str, tuple[str, ...]]:
    return {one.key: one.chosen_for for one in candidates(study, space)}


def test_the_candidates_are_the_best_by_several_criteria_in_the_order_of_preference() -> None:
    at = {1: {2: 0.2, 5: 0.3}, 2: {2: 0.1, 5: 0.9}, 3: {2: 0.8, 5: 0.4}, 4: {2: 0.1, 5: 0.1}}
    study, space = invented(
        "s", {1: 0.9, 2: 0.7, 3: 0.6, 4: 0.65, 5: 0.8}, IMAGES, at=at, attributes={4: {RECIPE: "old"}}
    )
    assert reasons(study, space) == {
        "trial 1": ("best validation score",),
        "baseline": ("the baseline",),
        "trial 2": ("best at epoch 5", "third best validation score"),
        "recipe old": ("a recipe", "fourth best validation score"),
        "trial 5": ("second best validation score",),
        "trial 3": ("best at epoch 2", "fifth best validation score"),
    }
    assert list(reasons(study, space)) == ["trial 1", "baseline", "trial 2", "recipe old", "trial 5", "trial 3"]


def test_the_best_at_a_rung_has_the_lowest_calibrated_loss_if_the_rung_ranks_by_it() -> None:
    at = {number: {5: score} for number, score in enumerate((0.1, 0.9, 0.7, 0.8))}
    losses = {0: 0.9, 1: 0.6, 2: 0.4, 3: 0.5}
    study, space = invented("s", {1: 0.9, 2: 0.6, 3: 0.7}, IMAGES, at=at, losses=losses)
    assert reasons(study, space)["trial 2"][0] == "best at epoch 5"


def test_of_equal_scores_the_earlier_trial_is_first() -> None:
    study, space = invented("s", {1: 0.8, 2: 0.9, 3: 0.9}, IMAGES)
    best = study.best_trial()
    assert best is not None
    assert best.number == 2
    assert next(iter(reasons(study, space))) == "trial 2"


def test_a_configuration_appears_once_with_all_its_reasons() -> None:
    """Trials 2 and 3 are replicates, trial 4 is the base again, and trial 5 is the recipe."""
    rates = {1: 3.0, 2: 5.0, 3: 5.0, 4: 1.0, 5: 7.0}
    study, space = invented(
        "s", {1: 0.9, 2: 0.8, 3: 0.95, 4: 0.7, 5: 0.92}, IMAGES, lr_scale=rates, attributes={5: {RECIPE: "r"}}
    )
    assert list(reasons(study, space).items()) == [
        ("trial 3", ("best validation score",)),
        ("baseline", ("the baseline", "fourth best validation score")),
        ("recipe r", ("a recipe", "second best validation score")),
        ("trial 1", ("third best validation score",)),
    ]


def test_the_baseline_keeps_its_key_if_it_is_the_best() -> None:
    study, space = invented("s", {1: 0.1, 2: 0.2}, IMAGES, base=0.9)
    first = candidates(study, space)[0]
    assert (first.key, first.trial, first.chosen_for) == ("baseline", 0, ("best validation score", "the baseline"))


def test_a_trial_among_good_neighbours_is_chosen_over_a_lucky_one() -> None:
    rates = {number: 10 ** (-2 + 0.2 * number) for number in range(1, 20)}
    values = {number: 0.9 - abs(number - 14) / 50 for number in rates}
    study, space = invented("s", values | {2: 0.99}, IMAGES, lr_scale=rates)
    chosen = reasons(study, space)
    assert chosen["trial 2"] == ("best validation score",)
    assert "best predicted by its neighbours" in chosen["trial 14"]


def test_few_trials_have_no_neighbours() -> None:
    study, space = invented("s", {number: number / 20 for number in range(1, 2 * NEIGHBOURS - 1)}, IMAGES)
    assert not any("neighbours" in why for why in sum(reasons(study, space).values(), ()))


def test_the_mean_over_the_neighbours_is_that_of_the_nearest_in_the_unit_cube() -> None:
    generator = np.random.default_rng(0)
    places, values = generator.random((30, 3)), list(generator.random(30))
    by_hand = [
        float(np.mean([values[other] for other in np.argsort(((places - place) ** 2).sum(1))[:NEIGHBOURS]]))
        for place in places
    ]
    assert predict(places, values) == pytest.approx(by_hand)


def test_the_unit_cube_is_the_spaces_own() -> None:
    distributions = {
        "rate": FloatDistribution(0.01, 100, log=True),
        "width": IntDistribution(1, 5),
        "name": CategoricalDistribution(["a", "b", True, 1]),
    }
    places = unit_cube(
        [
            {"rate": 0.01, "width": 5, "name": "a"},
            {"rate": 1.0, "width": 2, "name": True},
            {"rate": 100.0, "name": 1},
        ],
        distributions,
    )
    half = math.sqrt(0.5)
    assert places == pytest.approx(
        np.array([[0, 1, half, 0, 0, 0], [0.5, 0.25, 0, 0, half, 0], [1, 0.5, 0, 0, 0, half]])
    )
    assert np.linalg.norm(places[0, 2:] - places[1, 2:]) == pytest.approx(1)


def test_a_recipe_that_was_trained_beside_the_study_is_a_candidate() -> None:
    study, space = invented("s", {1: 0.9}, IMAGES)
    paths = study.paths.reference("theirs")
    paths.dir.mkdir(parents=True)
    paths.config.write_text("epochs: 10\nbatch_size: 16\n")
    write_result(paths, {"metric": "accuracy", "value": 0.7, "epoch": 4})
    failed = study.paths.reference("broken")
    failed.dir.mkdir(parents=True)
    failed.config.write_text("epochs: 10\n")
    write_result(failed, {"metric": "accuracy", "failure": "oom", "why": "too large"})
    found = {one.key: one for one in candidates(study, space)}
    assert list(found) == ["trial 1", "baseline", "recipe theirs"]
    theirs = found["recipe theirs"]
    assert (theirs.trial, theirs.recipe, theirs.epochs, theirs.search_value) == (None, "theirs", 4, 0.7)
    assert theirs.train_config.batch_size == 16


def test_with_the_loss_as_objective_less_is_better() -> None:
    at = {0: {5: -1.0}, 1: {5: -0.4}, 2: {5: -0.6}}
    study, space = invented("s", {1: 0.4, 2: 0.6}, IMAGES, base=1.0, at=at, text=f"{RUNGS}objective: {{metric: nll}}\n")
    assert reasons(study, space)["trial 1"] == ("best validation score",)
    assert "best at epoch 5" in reasons(study, space)["baseline"]


# Beside the search


def test_the_confirmation_is_a_study_beside_the_search_and_in_its_storage(studies: Path, run_hpo: RunHpo) -> None:
    confirmation, search = find_study("planted.confirm"), find_study("planted")
    assert confirmation.confirms == "planted"
    assert search.confirms is None
    assert confirmation.storage_url == search.storage_url == str(search.paths.journal)
    assert {study.name for study in list_studies()} == {"planted", "planted.confirm", "hopeless", "hopeless.confirm"}
    assert not list(confirmation.paths.dir.rglob("model*.safetensors"))
    assert not list(confirmation.paths.dir.rglob("*.png"))
    os.utime(confirmation.paths.study_yaml)
    assert find_study().confirms is None  # the study that was run last is a search
    for arguments in (
        ["study", "show"],
        ["study", "doctor"],
        ["study", "doctor", "planted.confirm"],
        ["study", "list"],
    ):
        assert "planted.confirm" in run_hpo(*arguments) or arguments[-1] in ("show", "doctor")


def test_a_confirmation_is_shown_by_its_candidates(studies: Path, run_hpo: RunHpo) -> None:
    said = run_hpo("study", "show", "hopeless.confirm")
    assert "study hopeless.confirm (confirms hopeless): 10 of 10 trials finished" in said
    assert "best:" not in said
    assert "hpo refit" not in said
    assert "  hpo confirm hopeless\n" in said
    assert any(line.split()[:2] == ["baseline", "5"] for line in said.splitlines())


def test_the_search_is_shown_with_its_confirmation(studies: Path, trained: Path, run_hpo: RunHpo) -> None:
    verdict = result_of("planted").verdict
    said = run_hpo("study", "show", "planted")
    assert verdict in said
    assert "  hpo confirm" not in said
    assert "  hpo refit best --study planted\n" in said
    said = run_hpo("run", str(trained / "planted.yaml"), "--trials", "3", "--device", "cpu")
    assert "confirmed, 1 trial ago" in said
    assert "  hpo confirm planted\n" in said


def test_a_training_of_a_confirmation_is_reproducible_bit_by_bit(studies: Path, run_hpo: RunHpo) -> None:
    assert "the 2 epochs of trial 3 are reproduced bit for bit" in run_hpo(
        "train", "--from", "planted.confirm/3", "--device", "cpu"
    )


# Edge cases and errors


def test_an_unfinished_search_can_be_confirmed(searches: Path, trained: Path, run_hpo: RunHpo) -> None:
    run = ("run", str(trained / "planted.yaml"), "--trials", "9", "--workers", "0")
    run_hpo(*run)
    said = run_hpo("confirm", "planted", "--device", "cpu", "--budget", "0.1")
    assert "the search has only 2 of 9 trials; confirming its result so far" in said
    assert "that exceeds the budget, but fewer trainings could not show a difference" in said
    assert result_of("planted").replicates == 3


def test_the_baseline_wins_without_training_if_no_other_trial_is_complete(run_hpo: RunHpo) -> None:
    invented("s", {}, IMAGES)
    assert "no other trial was compared with the baseline" in run_hpo("confirm", "s")
    confirmation = result_of("s")
    assert (confirmation.winner, confirmation.leader, confirmation.trainings) == ("baseline", None, 0)
    assert not StudyPaths.of("s.confirm").dir.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("confirm", "planted.confirm"), "study planted.confirm is itself the confirmation of planted; give that one"),
        (("confirm", "planted", "--budget", "0"), "--budget 0: give a share above 0, such as 0.33"),
        (("confirm", "plantd"), "no study plantd"),
        (("run", "digits", "--study", "x.confirm"), "study x.confirm: the ending is reserved for what hpo confirm"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str, studies: Path, run_hpo: RunHpo) -> None:
    assert said in run_hpo.fails(*arguments)


def test_a_search_without_a_complete_trial_has_nothing_to_confirm(tmp_path: Path, run_hpo: RunHpo) -> None:
    on_disk(space_of(tmp_path, RUNGS), name="s").queue.ensure_trials(3)
    assert "study s has no complete trial yet" in run_hpo.fails("confirm")


def test_the_confirmation_of_another_study_with_the_name_is_refused(studies: Path, digits: Dataset) -> None:
    shutil.rmtree(studies / "planted")
    shutil.copytree(studies / "hopeless", studies / "planted")
    (studies / "planted" / "study.yaml").write_text(
        (studies / "planted" / "study.yaml").read_text().replace("name: hopeless", "name: planted")
    )
    search = find_study("hopeless")
    renamed = Study(search.optuna, StudyPaths.of("planted"), search.metadata, search.storage_url)
    with pytest.raises(StudyError, match=r"planted\.confirm confirms another study with the name planted; delete"):
        open_confirmation(renamed, search.space(), digits, folds(digits, search.space().baseline.data), data_path=None)


# With folds


def test_with_folds_every_replicate_has_a_value_for_each_of_its_own(tmp_path: Path, run_hpo: RunHpo) -> None:
    text = PLANTED.replace("{name: digits}", "{name: digits, folds: 2}").replace("epochs: 2", "epochs: 1")
    (tmp_path / "f.yaml").write_text(text)
    run_hpo("run", str(tmp_path / "f.yaml"), "--trials", "2", "--device", "cpu")
    run_hpo("confirm", "--budget", "0.1", "--device", "cpu")
    confirmation = result_of("f")
    assert {len(values) for one in confirmation.contenders for values in one.scores.values()} == {2}
    assert {len(one.scores) for one in confirmation.contenders} == {3}
    assert confirmation.epochs == 6 * 2
    found = [training for training in trainings(find_study("f.confirm")) if isinstance(training, Training)]
    assert all(training.values is not None and len(training.values) == 2 for training in found)


# A time limit


def slow_after(monkeypatch: pytest.MonkeyPatch, trainings: int) -> None:
    """All but the first trainings seem to take days."""
    measured = iter([1e-3] * trainings)
    monkeypatch.setattr("hpo.search.pace.seconds_per_epoch", lambda *_, **__: next(measured, 1e6))


def test_a_time_limit_ends_it_with_the_replicates_that_are_done(
    searches: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert searches.is_dir()
    slow_after(monkeypatch, 5)
    said = run_hpo("confirm", "planted", "--minutes", "5", "--device", "cpu")
    assert "the time limit ended it before all planned trainings" in said
    ended = result_of("planted")
    assert ended.out_of_time
    assert ended.trainings == 5
    assert sorted(len(one.scores) for one in ended.contenders) == [2, 3]
    assert ended.advantage is not None
    assert ended.advantage.n == 2, "pairs"
    assert confirmed(find_study("planted"), ConfirmOptions()) == ended, "a refit takes it as it is"

    monkeypatch.undo()
    monkeypatch.setenv("HPO_STUDIES", str(searches))
    assert "the time limit" not in run_hpo("confirm", "planted", "--device", "cpu")
    whole = result_of("planted")
    assert not whole.out_of_time
    assert whole.trainings > 5
    before = scores_of(ended)
    assert all(before[one.key].items() <= one.scores.items() for one in whole.contenders)


def test_a_time_limit_before_any_comparison_is_an_error_that_keeps_what_is_done(
    searches: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_after(monkeypatch, 1)
    said = run_hpo.fails("confirm", "planted", "--minutes", "5", "--device", "cpu")
    assert "before it could compare anything; continue with a larger --minutes or without" in said
    assert not (searches / "planted" / "confirmation.json").exists()
    assert find_study("planted.confirm").counts().finished == 1


def test_the_plan_has_only_trainings_that_fit_the_limit(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(trained / "searched"))
    search = find_study("planted")
    speed = seconds_per_epoch(search)
    assert speed is not None
    plan = Plan(search, search.space(), share=5, within_s=13.5 * speed)  # of two epochs each
    assert plan.budget_epochs == 13
    assert plan.allocation.trainings == 6
