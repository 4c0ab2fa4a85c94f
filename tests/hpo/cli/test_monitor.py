"""`hpo study top`: what is seen of a running study, how fast it is, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

import hpo.cli.console
import hpo.cli.monitor
from core.data import Dataset
from hpo.analysis.live import Rate, look, rate_of
from hpo.cli.console import TableOf, say_screen
from hpo.cli.monitor import screen, top_command
from hpo.space import SearchSpace
from hpo.storage.lease import LEASE, own_lease
from hpo.study import Study
from hpo.text import short_names
from hpo.trials import TAKEN_FROM, TRIAL_INDEX
from tests.hpo.commands import RunHpo
from tests.hpo.confirmation.simulated import in_memory, on_disk, space_of
from tests.hpo.invented import SPACE as INVENTED
from tests.hpo.invented import invented_study

SPACE = """
base: {epochs: 20, batch_size: 64}
pruner: {name: rungs, rungs: [0.1, 0.5], keep: 0.5}
search:
  optim.name: {choices: [adamw, sgd]}
  optim.lr_scale: {low: 0.1, high: 10, log: true}
  augment.strength: {low: 0.0, high: 1.0}
"""
NOON = datetime(2026, 1, 30, 12)
PARAMS = {"optim.name": "adamw", "optim.lr_scale": 1.0, "augment.strength": 0.3}


def at(minutes: float) -> datetime:
    return NOON + timedelta(minutes=minutes)


def trial(
    state: TrialState,
    begun: float | None = None,
    ended: float | None = None,
    *,
    space: SearchSpace | None = None,
    value: float | None = None,
    reported: Mapping[int, float] | None = None,
    places: Mapping[int, Any] | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """A trial that ran from one minute past noon to another."""
    finished = state in (TrialState.COMPLETE, TrialState.PRUNED)
    made = create_trial(
        state=state,
        value=(0.5 if value is None else value) if finished else None,
        params=PARAMS if space is not None and begun is not None else {},
        distributions={} if space is None or begun is None else dict(space.distributions),
        intermediate_values=dict(reported or {}),
        user_attrs=attributes,
        system_attrs={f"rung:{rung}": place for rung, place in (places or {}).items()},
    )
    made.datetime_start = None if begun is None else at(begun)
    made.datetime_complete = None if ended is None else at(ended)
    return made


COMPLETE, PRUNED, RUNNING, FAIL, WAITING = (
    TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL, TrialState.WAITING,
)  # fmt: skip


# How fast it is


@pytest.mark.parametrize(
    ("attempts", "now", "per_h"),
    [
        ([trial(COMPLETE, 0, 10), trial(COMPLETE, 10, 20)], 20, None),  # two are no rate
        ([trial(COMPLETE, k, k + 1) for k in range(6)], 6, 60),
        # Two workers side by side: twice as many in the same time.
        ([trial(COMPLETE, 10 * k, 10 * k + 10) for k in range(3)] * 2, 30, 12),
        # A night between is no time of work, and neither is the time since the last one ended.
        ([trial(COMPLETE, 600 * k, 600 * k + 10) for k in range(3)], 5000, 6),
        # What runs now is; and what was cut off was.
        ([*(trial(COMPLETE, 10 * k, 10 * k + 10) for k in range(3)), trial(RUNNING, 30)], 60, 3),
        ([*(trial(COMPLETE, 10 * k, 10 * k + 10) for k in range(3)), trial(FAIL, 30, 60)], 60, 3),
        # Trials of another study say nothing of these machines.
        ([trial(COMPLETE, 10 * k, 10 * k + 10, taken_from="old/1") for k in range(9)], 90, None),
        # The last twenty count: forty slow ones are forgotten.
        ([trial(PRUNED, 60 * k - 2400, 60 * k - 2340) for k in range(40)]
         + [trial(COMPLETE, k, k + 1) for k in range(20)], 20, 60),
    ],
)  # fmt: skip
def test_the_rate_is_that_of_the_last_trials_while_any_ran(
    attempts: list[FrozenTrial], now: float, per_h: float | None
) -> None:
    rate = rate_of(attempts, at(now))
    assert (None if rate is None else rate.trials_per_h) == (None if per_h is None else pytest.approx(per_h))


def test_the_images_of_workers_side_by_side_add_up() -> None:
    # Each of two workers: 100 images a second for ten minutes a trial.
    attempts = [trial(COMPLETE, 10 * k, 10 * k + 10, images_per_s=100.0, elapsed_s=600.0) for k in range(3)] * 2
    assert rate_of(attempts, at(30)) == Rate(pytest.approx(12), pytest.approx(200))  # type: ignore[arg-type]


# What is seen


@pytest.fixture
def space(tmp_path: Path) -> SearchSpace:
    return space_of(tmp_path, SPACE)


def of(study: Study, *trials: FrozenTrial, total: int) -> Study:
    """The study with these trials, each a slot."""
    for trial_index, one in enumerate(trials):
        one.user_attrs.setdefault(TRIAL_INDEX, trial_index)
        study.optuna.add_trial(one)
    study.optuna.set_user_attr("trials", total)
    return study


def running_study(space: SearchSpace, study: Study) -> Study:
    """Four trials over, two that run, one of them elsewhere, and three that wait."""
    here = own_lease()
    there = {"host": "gpu7", "boot": "x", "pid": 4711, "start": 1}
    return of(
        study,
        trial(COMPLETE, 0, 10, space=space, value=0.8, base=True, lease=here, device="CPU, 2 threads", elapsed_s=600.0,
              images_per_s=100.0),
        trial(PRUNED, 10, 14, space=space, reported={1: 0.1, 2: 0.2}, elapsed_s=240.0, images_per_s=100.0),
        trial(PRUNED, 14, 15, space=space, failure="diverged"),
        trial(COMPLETE, 10, 20, space=space, value=0.9, lease=there, device="NVIDIA H200", elapsed_s=600.0),
        trial(RUNNING, 20, space=space, lease=here, reported={1: 0.3, 2: 0.55}, places={2: [1, 3, True]}),
        trial(RUNNING, 20, space=space, lease=there, recipe="old"),
        *[trial(WAITING)] * 0, trial(WAITING), trial(WAITING), trial(WAITING),
        total=9,
    )  # fmt: skip


def shown(study: Study, now: float, capsys: pytest.CaptureFixture[str]) -> list[str]:
    say_screen(screen(look(study, at(now))))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_running_study_is_seen_whole(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    study = running_study(space, in_memory(space))
    view = look(study, at(25))
    lines = shown(study, 25, capsys)
    assert lines[0] == (
        "study simulated (space space): 4 of 9 trials finished: 2 complete, 1 pruned, 1 failed to train, 2 running, "
        "3 waiting"
    )
    assert lines[1] == "best accuracy 0.9000: trial 3"
    # Four trials in 25 minutes of work, five to come; 600 s and 240 s at 100 images a second in 1,500 s.
    assert lines[2] == "25 min since it began, 10 trials/h, 56 images/s, about 31 min left"
    assert view.left_s == pytest.approx(5 * 25 * 60 / 4)
    here, there = lines[5:7]
    pid = own_lease()["pid"]
    assert here.split()[:2] == ["4", f"{own_lease()['host']}:{pid}"]
    assert "CPU, 2 threads" in here, "the device that the worker's last trial was trained on"
    assert "█░░░░░░░░░░░ 2/20" in here
    assert "0.5500  rung 2: 1st of 3, kept  optim.name=adamw lr_scale=1 strength=0.3" in here
    assert there.split()[:2] == ["5", "gpu7:4711"]
    assert "NVIDIA H200" in there
    assert "░░░░░░░░░░░░ 0/20" in there
    assert "recipe old" in there
    latest = [line.split()[0] for line in lines[9:13]]
    assert latest == ["3", "2", "1", "0"], "the last to end first"
    assert "diverged" in lines[10]
    assert "pruned at 2/20" in lines[11]


def test_before_three_trials_are_over_the_time_left_is_unknown(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    study = of(in_memory(space), trial(RUNNING, 0, space=space, lease=own_lease()), total=1)
    assert shown(study, 2, capsys)[1] == "2 min since it began, time left unknown yet"


def test_a_retried_trial_names_its_slot(space: SearchSpace, capsys: pytest.CaptureFixture[str]) -> None:
    study = of(
        in_memory(space),
        trial(FAIL, 0, 1, space=space, trial_index=0, interrupted=True),
        trial(RUNNING, 1, space=space, lease=own_lease(), trial_index=0),
        total=1,
    )
    lines = shown(study, 2, capsys)
    assert "0 of 1 trial finished: 1 running" in lines[0]
    assert lines[4].startswith("1 (index 0)")


def test_the_trial_of_a_dead_process_is_told_from_one_that_runs(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = {**own_lease(), "start": 1}
    study = of(in_memory(space), trial(RUNNING, 0, space=space, lease=dead), trial(WAITING), total=2)
    study.settings.command = "hpo run space --study simulated"
    view = look(study, at(1))
    assert not view.over
    assert view.left_s is None
    lines = shown(study, 1, capsys)
    assert lines[0].endswith("1 left by a dead process, 1 waiting")
    assert lines[-2:] == ["no worker trains anything; resume with", "  hpo run space --study simulated"]


def test_all_views_agree_on_a_dead_worker_and_name_the_command_of_the_next_one(
    run_hpo: RunHpo, digits: Dataset
) -> None:
    """After `hpo run --workers 0`, the command of the study only queues trials."""
    study = invented_study(INVENTED, digits, "s", trials=2, running=1, waiting=1)
    study.settings.command = "hpo run space --study s --trials 4 --workers 0"
    [running] = study.optuna.get_trials(states=(TrialState.RUNNING,))
    study.optuna._storage.set_trial_user_attr(running._trial_id, LEASE, {**own_lease(), "start": 1})
    top, show = run_hpo("study", "top", "s", "--once"), run_hpo("study", "show", "s")
    for said in (top, show):
        assert "1 left by a dead process, 1 waiting" in said
    for said in (top, show, run_hpo("study", "list")):
        assert "1 running" not in said
    assert top.splitlines()[-1] == "  hpo worker s"
    assert show.partition("next:\n")[2].splitlines()[0] == "  hpo worker s"
    assert f"trial {running.number} (index {running.number}) is RUNNING, but its process" in run_hpo(
        "study", "doctor", "s", code=1
    )


@pytest.mark.parametrize(("total", "last"), [(1, "nothing runs or waits any more"), (3, "  hpo run space --study s")])
def test_a_study_that_is_over_says_so_or_how_to_go_on(
    total: int, last: str, space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    study = of(in_memory(space), trial(COMPLETE, 0, 1, space=space), total=total)
    study.settings.command = "hpo run space --study s"
    assert look(study, at(2)).over
    assert shown(study, 2, capsys)[-1] == last


def test_trials_that_were_taken_over_are_over_but_no_time_of_this_study(
    space: SearchSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = [trial(COMPLETE, -900, -890, space=space, **{TAKEN_FROM: f"old/{k}"}) for k in range(4)]
    study = of(in_memory(space), *taken, trial(RUNNING, 0, space=space, lease=own_lease()), total=5)
    assert shown(study, 2, capsys)[2] == "2 min since it began, time left unknown yet"


@pytest.mark.parametrize("width", [100, 120])
def test_on_a_terminal_no_row_is_wider_than_it(
    width: int, space: SearchSpace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        hpo.cli.console, "console", Console(width=width, highlight=False, force_terminal=True, no_color=True)
    )
    study = running_study(space, in_memory(space))
    rows = [part for part in screen(look(study, at(25))) if isinstance(part, TableOf)]
    say_screen(rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(1 + len(part.rows) for part in rows), "a row is a line"
    assert any(line.rstrip().endswith("…") for line in lines), "the parameters are cut, and nothing else"
    assert all("█" in line or "░" in line for line in lines[1:3])


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["optim.lr_scale"], ["lr_scale"]),
        (["optim.name", "model.width"], ["optim.name", "width"]),
        (["augment.strength", "other.strength"], ["augment.strength", "other.strength"]),
        (["a.b.c", "d.b.c"], ["a.b.c", "d.b.c"]),
        (["batch_size", "optim.batch_size"], ["batch_size", "optim.batch_size"]),
    ],
)
def test_a_name_is_as_short_as_it_can_be_told_apart(paths: list[str], short: list[str]) -> None:
    assert list(short_names(paths).values()) == short


# The command


@pytest.fixture
def live(space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of one trial that runs, on disk, and a terminal to see it on."""
    terminal = Console(width=110, height=30, force_terminal=True, highlight=False)
    monkeypatch.setattr(hpo.cli.console, "console", terminal)
    monkeypatch.setattr(hpo.cli.monitor, "console", terminal)
    study = on_disk(space, name="live")
    study.queue.ensure_trials(1)
    return study


def test_it_looks_again_until_nothing_runs(
    live: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        """The worker's part: claims the trial, and then ends it."""
        looks.append(seconds)
        if len(looks) == 1:
            claimed = live.queue.claim()
            assert claimed is not None
            claimed_trials.append(claimed[0])
        else:
            claimed_trials[0].report(0.4, 20)
            live.queue.finish(claimed_trials[0], "complete", 0.4)

    claimed_trials: list[Any] = []
    monkeypatch.setattr(hpo.cli.monitor.time, "sleep", sleep)
    top_command("live", storage=None, every_s=0.5, once=False)
    assert looks == [0.5, 0.5]
    out = capsys.readouterr().out
    for seen in ("1 waiting", "1 running", "1 complete", "nothing runs or waits any more"):
        assert seen in out


def test_ctrl_c_ends_it_quietly(live: Study, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hpo.cli.monitor.time, "sleep", interrupted)
    run_hpo("study", "top", live.name)
    assert run_hpo.error == ""


@pytest.mark.parametrize("options", [["--once"], []])
def test_once_or_without_a_terminal_it_looks_once(
    options: list[str], live: Study, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    if not options:
        plain = Console(highlight=False)
        monkeypatch.setattr(hpo.cli.console, "console", plain)
        monkeypatch.setattr(hpo.cli.monitor, "console", plain)
    monkeypatch.setattr(hpo.cli.monitor.time, "sleep", lambda _: pytest.fail("it waits"))
    assert "0 of 1 trial finished: 1 waiting" in run_hpo("study", "top", live.name, *options)


def test_a_study_that_is_not_there_is_one_line(run_hpo: RunHpo) -> None:
    assert run_hpo.fails("study", "top", "nowhere").startswith("hpo: no study nowhere in ")
