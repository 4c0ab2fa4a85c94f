"""`promote`: which trial is claimed next, by one worker and by several, and after a kill between any two writes."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.search.options import TrialOptions
from hpo.search.weights import SpaceOnDisk
from hpo.space import SearchSpace
from hpo.space.pruner import PromotePruner, places_of
from hpo.space.samplers import _by_trial_index, build_sampler
from hpo.storage import lease, open_storage
from hpo.storage.lease import LEASE
from hpo.study import Study, open_study
from hpo.trials import PAUSED, effective_trials, is_baseline, is_paused, trial_index_of
from tests.hpo.confirmation.simulated import Images, in_memory, space_of

EPOCHS = 8
RUNGS = (1, 2, 4, 6)
SPACE = f"""
base: {{epochs: {EPOCHS}, batch_size: 64}}
pruner: {{name: promote, rungs: [0.125, 0.25, 0.5, 0.75]}}
sampler: {{name: random}}
search:
  optim.lr_scale: {{low: 0.1, high: 10, log: true}}
  augment.strength: {{low: 0.0, high: 1.0}}
"""


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


@pytest.fixture
def studies(space: SearchSpace) -> Any:
    """Makes studies in memory with the space's pruner and so many trials, the baseline not counted."""

    def made(free: int) -> Study:
        study = in_memory(space)
        study.optuna.pruner = PromotePruner(RUNGS, 3)
        study.optuna.sampler = build_sampler(space.sampler, seed=0)
        study.queue.ensure_trials(free + 1)
        return study

    return made


def score(params: dict[str, Any], epoch: int) -> float:
    """The order at the first rungs is not the final one."""
    early, late = params["augment.strength"], params["optim.lr_scale"] / 10
    return early + (late - early) * epoch / EPOCHS


@dataclass
class Worker:
    """Trains by a formula, as `hpo.search.loop.run_study` trains; `checkpoints` are the epochs saved by all workers."""

    study: Study
    checkpoints: dict[int, int]
    claims: list[tuple[int, int]] = field(default_factory=list)
    """(trial index, rung at which it waited or 0) of each claim."""

    def epochs(self) -> Iterator[None]:
        """Train until nothing can be claimed, an epoch at a time."""
        while (claimed := self.study.queue.claim()) is not None:
            trial, trial_index = claimed
            self.claims.append((trial_index, trial.user_attrs.get(PAUSED, 0)))
            stored = self.study.optuna.get_trials(deepcopy=False)[trial.number]
            params = {**self.study.queue._space.suggest(trial)}  # type: ignore[union-attr]
            if trial_index == 0:
                params = {"augment.strength": 0.5, "optim.lr_scale": 1.0}
            yield from self._train(trial, trial_index, params, set(stored.intermediate_values))

    def _train(self, trial: optuna.Trial, trial_index: int, params: dict[str, Any], stored: set[int]) -> Iterator[None]:
        until, saved = self.study.queue.next_rung(trial), self.checkpoints.get(trial_index, 0)
        for epoch in range(1, EPOCHS + 1):
            if epoch > saved:
                yield
            if epoch not in stored:
                trial.report(score(params, epoch), epoch)
            self.checkpoints[trial_index] = max(epoch, self.checkpoints.get(trial_index, 0))
            if until is not None and epoch == max(until, saved):
                self.study.queue.pause(trial, until, {"epochs": epoch})
                return
        self.study.queue.finish(trial, "complete", score(params, EPOCHS))

    def work(self) -> None:
        """Train all trials, and end the study."""
        while self.study.queue.claimable() or self.study.queue.requeue_lost():
            for _ in self.epochs():
                pass


def free(study: Study) -> list[FrozenTrial]:
    """The effective trials without the baseline, by index."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False))
    return [trial for _, trial in sorted(trials.items()) if not is_baseline(trial)]


def results(study: Study) -> dict[int, Any]:
    """Trial index -> the result of its trial, its places, and the epochs at its last pause."""
    return {
        trial_index_of(t): (
            t.state,
            t.params,
            t.values,
            t.intermediate_values,
            places_of(t),
            t.user_attrs.get("epochs"),
        )
        for t in free(study)
    }


# One worker


@pytest.mark.parametrize(
    ("trials", "reached"),
    [
        (2, {EPOCHS: 2}),  # too few for any rung
        (6, {1: 6, EPOCHS: 2}),  # two would reach the second rung
        (20, {1: 20, 2: 7, 4: 3, EPOCHS: 1}),
        (40, {1: 40, 2: 14, 4: 5, EPOCHS: 2}),  # two would reach the last rung
        (60, {1: 60, 2: 20, 4: 7, 6: 3, EPOCHS: 1}),
        (100, {1: 100, 2: 34, 4: 12, 6: 4, EPOCHS: 2}),
    ],
)
def test_each_rung_is_filled_with_a_third_of_the_one_below_and_the_rest_is_pruned(
    studies: Any, trials: int, reached: dict[int, int]
) -> None:
    study = studies(trials)
    Worker(study, {}).work()
    ends = Counter(trial.last_step for trial in free(study))
    assert {step: sum(n for end, n in ends.items() if end >= step) for step in reached} == reached
    assert sum(ends.values()) == trials
    counts = study.counts()
    assert (counts.complete, counts.finished) == (reached[EPOCHS] + 1, trials + 1)
    assert (counts.paused, counts.waiting, counts.running) == (0, 0, 0)
    assert all(trial.state == TrialState.PRUNED for trial in free(study) if trial.last_step < EPOCHS)


def test_trials_enter_in_batches_of_40_and_20_and_the_lowest_rung_is_filled_first(studies: Any) -> None:
    worker = Worker(studies(70), {})
    worker.work()
    waited = [rung for _, rung in worker.claims]
    batches = [(rung, len(list(same))) for rung, same in itertools.groupby(waited)]
    assert batches == [
        *[(0, 41), (1, 14), (2, 5), (4, 2), (6, 1)],  # the baseline and 40
        *[(0, 20), (1, 6), (2, 2), (4, 1)],
        *[(0, 10), (1, 4), (2, 1)],
    ]
    new = [trial_index for trial_index, rung in worker.claims if rung == 0]
    assert new == list(range(71))


def test_the_best_that_wait_are_promoted_and_of_equals_the_first(studies: Any) -> None:
    study = studies(9)
    values = [0.1, 0.9, 0.5, 0.9, float("nan"), 0.7, 0.2, 0.3, 0.4]
    for value in [0.0, *values]:
        trial, _ = study.queue.claim()
        trial.report(value, 1)
        if is_baseline(trial):
            study.queue.finish(trial, "complete", value)
        else:
            study.queue.pause(trial, 1, {})
    promoted = [study.queue.claim() for _ in range(3)]
    assert [trial_index for _, trial_index in promoted] == [2, 4, 6]
    assert study.queue.claim() is None
    assert study.queue.claimable() == 0
    assert [trial_index_of(trial) for trial in study.queue.paused()] == [3, 9, 8, 7, 1, 5]


def test_a_minimized_score_promotes_the_lowest(tmp_path: Path) -> None:
    study = in_memory(space_of(tmp_path, f"objective: {{metric: nll}}\n{SPACE}"))
    study.optuna.pruner = PromotePruner((1,), 3)
    study.queue.ensure_trials(4)
    for value in (0.0, 0.3, 0.1, 0.2):
        trial, trial_index = study.queue.claim() or pytest.fail("none is waiting")
        trial.report(value, 1)
        study.queue.pause(trial, 1, {}) if trial_index else study.queue.finish(trial, "complete", 0.0)
    assert [trial_index_of(trial) for trial in study.queue._ready()] == [2]


def test_the_rank_at_a_rung_is_stored_with_the_decision(studies: Any) -> None:
    study = studies(9)
    Worker(study, {}).work()
    [best, *_] = ranked = sorted(free(study), key=lambda trial: -trial.intermediate_values[1])
    assert places_of(best)[1] == (1, 9, True)
    assert [places_of(trial)[1].kept for trial in ranked] == [True] * 3 + [False] * 6
    assert [places_of(trial)[1].rank for trial in ranked] == list(range(1, 10))
    assert [places_of(trial)[2].kept for trial in ranked if 2 in places_of(trial)].count(True) == 1


def test_a_trial_that_fails_leaves_its_place_to_the_next(studies: Any) -> None:
    study = studies(9)
    worker = Worker(study, {})
    failed: list[int] = []
    for _ in worker.epochs():
        running = [trial for trial in free(study) if trial.state == TrialState.RUNNING]
        if running and running[0].user_attrs.get(PAUSED) == 1 and not failed:
            failed.append(trial_index_of(running[0]))
            claimed = optuna.Trial(study.optuna, running[0]._trial_id)
            study.queue.finish(claimed, "pruned", failure="diverged")
            break
    worker.work()
    assert sum(2 in trial.intermediate_values for trial in free(study)) == 3
    assert study.counts().failures == 1
    assert study.counts().finished == 10


def test_a_larger_total_continues_and_a_pruned_trial_stays_pruned(studies: Any) -> None:
    study, checkpoints = studies(9), {}
    Worker(study, checkpoints).work()
    before = results(study)
    study.queue.ensure_trials(41)
    Worker(study, checkpoints).work()
    assert study.counts().finished == 41
    assert {trial_index: one for trial_index, one in results(study).items() if trial_index in before} == before


def test_the_sampler_sees_a_paused_trial_as_pruned(studies: Any) -> None:
    study = studies(9)
    for _ in itertools.islice(Worker(study, {}).epochs(), EPOCHS + 4):
        pass
    seen = _by_trial_index(study.optuna)._get_trials(states=(TrialState.PRUNED,))
    assert [(trial.number, trial.last_step) for trial in seen] == [(1, 1), (2, 1), (3, 1)]
    assert all(is_paused(trial) for trial in study.optuna.trials[1:4])


# Disk


def test_the_checkpoints_of_the_worst_paused_trials_go_first(studies: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path))
    study = studies(9)
    for _ in itertools.islice(Worker(study, {}).epochs(), EPOCHS + 9 + 2):
        pass
    for trial_index in range(1, 10):
        file = study.paths.checkpoint(trial_index)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(1000))
    running = [trial_index_of(trial) for trial in free(study) if trial.state == TrialState.RUNNING]
    paused = study.queue.paused()
    assert [trial.user_attrs[PAUSED] for trial in paused] == [2] + [1] * 7
    SpaceOnDisk(study, TrialOptions(keep_gb=3000e-9)).keep_within()
    best = [trial_index_of(trial) for trial in paused[:2]]
    assert study.paths.trial_indices_with_checkpoints() == {*best, *running}


# Kills


class Killed(BaseException):
    """Takes the place of SIGKILL."""


@contextmanager
def killed_at(storage: Any, write: int) -> Iterator[None]:
    """Raise Killed instead of a write of the storage, counted from 0, and instead of all after it."""
    numbers = itertools.count()

    def guarded(method: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            if next(numbers) >= write:
                raise Killed
            return method(*args, **keywords)

        return call

    names = ("set_trial_state_values", "set_trial_user_attr", "set_trial_system_attr", "set_trial_param")
    with mock.patch.multiple(
        storage,
        **{name: guarded(getattr(storage, name)) for name in (*names, "set_trial_intermediate_value")},
        create_new_trial=guarded(storage.create_new_trial),
    ):
        yield


def test_after_a_kill_between_any_two_writes_the_results_are_those_of_an_undisturbed_study(
    studies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = studies(9)
    Worker(twin, {}).work()
    monkeypatch.setattr("hpo.storage.lease._GRACE_S", -1)  # also before the lease was written
    dead = {**lease.own_lease(), "start": 1}
    for write in itertools.count():
        study, checkpoints = studies(9), {}
        with killed_at(study.optuna._storage, write), monkeypatch.context() as patch:
            patch.setattr(lease, "own_lease", lambda: dead)
            try:
                Worker(study, checkpoints).work()
                break  # there were not so many writes
            except Killed:
                pass
        study.queue.reclaim()
        Worker(study, checkpoints).work()
        assert results(study) == results(twin), f"killed before write {write}"
        assert study.counts().finished == 10
    assert write > 100


def test_a_paused_trial_is_never_running_under_the_lease_of_a_dead_process(
    studies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, dead = studies(9), {**lease.own_lease(), "start": 1}
    with monkeypatch.context() as patch:
        patch.setattr(lease, "own_lease", lambda: dead)
        for _ in itertools.islice(Worker(study, {}).epochs(), EPOCHS + 9 + 1):
            pass
    study.queue.reclaim()
    set_state = study.optuna._storage.set_trial_state_values

    def and_another_reclaims(*arguments: Any) -> bool:
        done = bool(set_state(*arguments))
        assert study.queue.reclaim() == []
        return done

    monkeypatch.setattr(study.optuna._storage, "set_trial_state_values", and_another_reclaims)
    for _ in range(3):
        trial, _ = study.queue.claim()
        assert PAUSED in trial.user_attrs


def test_who_loses_the_race_for_a_paused_trial_does_not_take_its_lease(
    studies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = studies(9)
    for _ in itertools.islice(Worker(study, {}).epochs(), EPOCHS + 9):
        pass
    stale = study.queue.paused()[0]
    assert stale.user_attrs[LEASE] is None
    trial, _ = study.queue.claim(ending=True)
    assert trial.number == stale.number
    winner = trial.user_attrs[LEASE]
    monkeypatch.setattr(lease, "own_lease", lambda: {**winner, "pid": 1})
    assert not study.queue._take(stale)
    assert study.optuna.trials[trial.number].user_attrs[LEASE] == winner


# Several workers


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_any_number_of_workers_that_may_die_end_at_the_exact_total(
    studies: Any, monkeypatch: pytest.MonkeyPatch, workers: int, seed: int
) -> None:
    draw, study, checkpoints = random.Random(seed), studies(60), {}
    study.settings.retries = 1000
    dead: set[int] = set()
    now = itertools.count()
    active = {next(now): Worker(study, checkpoints).epochs() for _ in range(workers)}
    current = 0
    here = {"host": lease.host(), "boot": None, "start": 1}
    monkeypatch.setattr(lease, "own_lease", lambda: {**here, "pid": current})
    monkeypatch.setattr(lease, "is_abandoned", lambda trial: trial.user_attrs[LEASE]["pid"] in dead)
    for _ in range(20_000):
        if not active:
            if not (study.queue.claimable() or study.queue.requeue_lost()):
                break
            active[next(now)] = Worker(study, checkpoints).epochs()
        current = draw.choice(list(active))
        if draw.random() < 0.02:  # killed; another takes its place
            del active[current]
            dead.add(current)
            study.queue.reclaim()
            active[next(now)] = Worker(study, checkpoints).epochs()
        elif next(active[current], "over") == "over":
            del active[current]
    counts = study.counts()
    assert counts.finished == 61
    assert (counts.running, counts.paused, counts.waiting) == (0, 0, 0)
    reached = [sum(rung in trial.intermediate_values for trial in free(study)) for rung in (*RUNGS, EPOCHS)]
    assert reached[0] == 60
    for rung, least in enumerate((60, 20, 7, 3, 1)):
        assert least <= reached[rung] <= least + workers  # several may promote at the same time


# Storages


def test_of_two_processes_that_claim_a_paused_trial_one_wins(tmp_path: Path) -> None:
    url = str(tmp_path / "journal.log")
    first, second = open_storage(url), open_storage(url)
    study = optuna.create_study(storage=first, study_name="s")
    study.enqueue_trial({})
    [number] = [trial._trial_id for trial in study.trials]
    assert first.set_trial_state_values(number, TrialState.RUNNING)
    assert first.set_trial_state_values(number, TrialState.WAITING)
    sync = first._sync_with_backend  # type: ignore[attr-defined]

    def and_then_the_other_claims() -> None:
        sync()
        with mock.patch.object(first, "_sync_with_backend", sync):
            if second.get_trial(number).state == TrialState.WAITING:
                assert second.set_trial_state_values(number, TrialState.RUNNING)

    with mock.patch.object(first, "_sync_with_backend", and_then_the_other_claims):
        assert not first.set_trial_state_values(number, TrialState.RUNNING)


def test_a_database_shows_a_paused_trial_to_all_processes(space: SearchSpace, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    here = open_study(space, name="s", dataset=Images(), storage_url=url)  # type: ignore[arg-type]
    here.queue.ensure_trials(9)
    there = open_study(space, name="s", dataset=Images(), storage_url=url)  # type: ignore[arg-type]
    baseline, _ = there.queue.claim() or pytest.fail("none is waiting")
    there.queue.finish(baseline, "complete", 0.5)
    trial, trial_index = here.queue.claim() or pytest.fail("none is waiting")
    space.suggest(trial)
    trial.report(0.5, 1)
    assert here.queue.pause(trial, 1, {"epochs": 1})
    [seen] = there.queue.paused()
    assert (trial_index_of(seen), seen.params, seen.intermediate_values) == (trial_index, trial.params, {1: 0.5})
    again, _ = there.queue.claim(ending=True) or pytest.fail("it is not waiting")
    assert again.number == trial.number
    storage: Any = here.optuna._storage
    storage.set_trial_user_attr(again._trial_id, LEASE, {**lease.own_lease(), "pid": 1})  # of another process
    storage.set_trial_state_values(again._trial_id, TrialState.WAITING)  # repeated after an outage
    assert here.optuna.trials[again.number].state == TrialState.RUNNING
    for study in (here, there):
        study.optuna._storage._backend.engine.dispose()
