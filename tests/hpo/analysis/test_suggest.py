"""Suggested spaces: which parameters are widened, narrowed and dropped, and that all others are unchanged."""

from __future__ import annotations

import math
import random
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.data import load_dataset
from hpo.analysis.evidence import binomial_tail, missing_chance, read_evidence, spread_chance
from hpo.analysis.ranges import narrowed, outer_share, widened
from hpo.analysis.suggest import edges, suggest
from hpo.errors import StudyError
from hpo.space import (
    Categorical,
    Integer,
    Real,
    SearchSpace,
    check_file,
    list_spaces,
    load_space,
)
from hpo.space.fields import config_fields
from hpo.study import Study, find_study
from hpo.study.metadata import config_of
from tests.hpo.commands import hpo
from tests.hpo.confirmation.simulated import Score, add_trials, in_memory, on_disk, space_of

SPACE = """
description: a space of every kind of parameter
data: {name: digits}
base: {epochs: 10, batch_size: 64, optim: {lr_scale: 1.0}}
objective: {metric: accuracy}
trials: 60
sampler: {name: random}
pruner: {name: rungs, rungs: [0.2, 0.5], keep: 0.5}
search:
  optim.name: {choices: [adamw, sgd, swats]}
  optim.lr_scale: {low: 0.1, high: 10, log: true}
  optim.swats.switch_fraction: {low: 0.1, high: 0.6, when: {optim.name: swats}}
  optim.momentum: {low: 0.8, high: 0.98, when: {optim.name: [sgd, swats]}}
  augment.ops: {low: 0, high: 3}
  augment.strength: {low: 0.0, high: 1.0}
  loss.smoothing: {low: 0.0, high: 0.2}
  model.width: {low: 0.5, high: 1.5, step: 0.25}
"""

OVERSAMPLE = Integer("sampling.oversample", {}, 1, 12, log=True)
DECAY = Real("optim.weight_decay", {}, 1e-6, 1e-3, log=True)


def noise(params: Mapping[str, Any], rng: random.Random) -> float:
    return rng.gauss(0.5, 0.05)


def rising(path: str, *, by: float = 1.0) -> Score:
    """Scores that rise (or fall) with one number, in its logarithm, by far more than their noise."""
    return lambda params, rng: by * math.log(params[path] + 0.01) + rng.gauss(0, 0.01)


def near(path: str, best: float) -> Score:
    """Scores that are the best at one value of a number."""
    return lambda params, rng: -abs(params[path] - best) + rng.gauss(0, 0.001)


def suggested(
    tmp_path: Path, score: Score, *, trials: int = 60, text: str = SPACE
) -> tuple[SearchSpace, SearchSpace, str]:
    """The space, what is suggested in its place, and the text of it."""
    space = space_of(tmp_path, text)
    study = in_memory(space)
    add_trials(study, space, score, trials=trials)
    written = suggest(study, space)
    new = space_of(tmp_path, written, "new")
    return space, new, written


def changed(old: SearchSpace, new: SearchSpace) -> set[str]:
    """The parameters that are not what they were, but for their conditions."""
    bare = [{path: {**one.describe(), "when": None} for path, one in space.search.items()} for space in (old, new)]
    return {path for path in bare[0] if bare[0][path] != bare[1].get(path)}


# What every suggestion is


@pytest.mark.parametrize("name", [entry.name for entry in list_spaces() if entry.kind == "space"])
@pytest.mark.parametrize("seed", range(2))
def test_every_suggestion_is_a_valid_space_that_keeps_the_baseline_and_the_best_trial(
    name: str, seed: int, tmp_path: Path
) -> None:
    space = load_space(name)
    study = in_memory(space)
    # Scores that hang on two parameters alone, so that there is something to be seen.
    always = sorted(path for path, one in space.search.items() if not one.when)
    weights = dict.fromkeys(space.search, 0.0) | dict.fromkeys(random.Random(seed).sample(always, 2), 1.0)
    worth = {path: {str(choice): weights[path] * place for place, choice in enumerate(one.labels)}
             for path, one in space.search.items() if isinstance(one, Categorical)}  # fmt: skip

    def score(params: Mapping[str, Any], rng: random.Random) -> float:
        found = (worth[path][str(value)] if path in worth else weights[path] * scaled(space, path, value)
                 for path, value in params.items())  # fmt: skip
        return sum(found) + rng.gauss(0, 0.05)

    add_trials(study, space, score, trials=60, seed=seed, pruned=0.5)
    file = tmp_path / "new.yaml"
    file.write_text(suggest(study, space), encoding="utf-8")
    assert check_file(file) == []
    new = load_space(file)
    for kept in ("objective", "sampler", "pruner", "baseline", "description"):
        assert getattr(new, kept) == getattr(space, kept)
    assert [recipe.name for recipe in new.recipes] == [recipe.name for recipe in space.recipes]
    assert new.express(space.baseline) == new.baseline_params()
    best = read_evidence(study).best
    assert all(new.express(config_of(study.metadata, trial.params)) is not None for trial in best)
    for path, one in new.search.items():
        check_bounds(space.search[path], one)


def scaled(space: SearchSpace, path: str, value: Any) -> float:
    one = space.search[path]
    assert isinstance(one, Integer | Real)
    return float((value - one.low) / (one.high - one.low))


def check_bounds(old: Any, new: Any) -> None:
    """Within the field's own bounds, and of steps on the old grid."""
    assert type(old) is type(new)
    if isinstance(new, Categorical):
        assert set(new.choices) <= set(old.choices)
        return
    for bound in (new.low, new.high):
        config_fields()[new.path].validate(bound)
    assert (new.log, new.step) == (old.log, old.step)
    if new.step is not None:
        assert (new.low - old.low) / new.step == pytest.approx(round((new.low - old.low) / new.step))


def test_noise_rarely_changes_a_parameter(tmp_path: Path) -> None:
    space = load_space("stl10_small")
    count = 0
    for seed in range(4):
        study = in_memory(space)
        add_trials(study, space, noise, trials=40, seed=seed)
        count += len(changed(space, space_of(tmp_path, suggest(study, space), f"new{seed}")))
    assert count <= 0.05 * 4 * len(space.search)


@pytest.mark.parametrize("trials", [0, 19])
def test_too_few_trials_change_nothing_and_the_header_gives_the_reason(tmp_path: Path, trials: int) -> None:
    old, new, text = suggested(tmp_path, rising("optim.lr_scale"), trials=trials)
    assert new.identity() == old.identity()
    assert new.trials == old.trials
    assert f"Nothing is changed: it takes 20 finished trials, and there are {trials}" in text.replace("\n# ", " ")


def test_too_few_complete_trials_change_nothing(tmp_path: Path) -> None:
    space = space_of(tmp_path, SPACE)
    study = in_memory(space)
    add_trials(study, space, lambda params, rng: -len(study.optuna.get_trials(deepcopy=False)), trials=40, pruned=1.0)
    assert edges(study, space) == ()
    assert "and it takes 5" in suggest(study, space).replace("\n# ", " ")


# At a bound


@pytest.mark.parametrize(
    ("path", "by", "bound", "limit", "moved"),
    [
        ("optim.lr_scale", 1, "high", 10, 100),  # half the range in its logarithm is a factor of ten
        ("optim.lr_scale", -1, "low", 0.1, 0.01),
        ("loss.smoothing", 1, "high", 0.2, 0.3),
        ("augment.ops", 1, "high", 3, 4),  # two steps more would be beyond the field, whose end is 4
        ("model.width", 1, "high", 1.5, 2.0),
        ("model.width", -1, "low", 0.5, 0.25),  # 0 would be beyond the field
    ],
)
def test_a_bound_with_a_crowd_is_moved_by_half_the_range(
    path: str, by: int, bound: str, limit: float, moved: float, tmp_path: Path
) -> None:
    space = space_of(tmp_path, SPACE)
    study = in_memory(space)
    add_trials(study, space, rising(path, by=by), trials=60)
    [edge] = edges(study, space)
    assert (edge.path, edge.bound) == (path, bound)
    best = study.optuna.best_trial.params[path]
    crowd = f"best trials are in the quarter of the range at its {'upper' if by > 0 else 'lower'} bound, {limit:g}"
    assert f"{crowd}, and the best of all at {best:.3g}; move it to {moved:g}" in edge.words
    text = suggest(study, space)
    new = space_of(tmp_path, text, "new")
    assert getattr(new.search[path], bound) == pytest.approx(moved)
    assert f"  {edge.yaml_line}\n" in text
    assert f"# widened to {moved:.3g}: " in text


@pytest.mark.parametrize(("path", "by"), [("loss.smoothing", -1), ("augment.strength", 1)])
def test_the_bound_of_a_field_is_kept_with_a_reason(path: str, by: int, tmp_path: Path) -> None:
    space = space_of(tmp_path, SPACE)
    study = in_memory(space)
    add_trials(study, space, rising(path, by=by), trials=60)
    assert edges(study, space) == ()
    assert "the field itself allows no more" in suggest(study, space).replace("\n  # ", " ")


def test_an_excluded_end_of_a_field_is_approached() -> None:
    assert widened(Real("optim.momentum", {}, 0.8, 0.98), "high") == Real("optim.momentum", {}, 0.8, 0.99)
    assert widened(Real("optim.swats.switch_fraction", {}, 0.1, 0.6), "low") == Real(
        "optim.swats.switch_fraction", {}, 0.05, 0.6
    )


@pytest.mark.parametrize(
    ("before", "bound", "after"),
    [
        (OVERSAMPLE, "high", replace(OVERSAMPLE, high=42)),
        (OVERSAMPLE, "low", None),
        (Real("augment.flip", {}, 0.5, 0.8, step=0.3), "high", None),  # a step more is 1.1
        (Real("augment.flip", {}, 0.5, 0.8, step=0.3), "low", Real("augment.flip", {}, 0.2, 0.8, step=0.3)),
        (DECAY, "high", replace(DECAY, high=0.032)),
        (replace(DECAY, high=0.1), "high", None),
        (Real("augment.rotation_degrees", {}, 0, 150), "high", Real("augment.rotation_degrees", {}, 0, 180)),
    ],
)  # fmt: skip
def test_a_range_is_widened_on_its_grid_and_within_its_field(before: Any, bound: Any, after: Any) -> None:
    assert widened(before, bound) == after


# Inside


def test_a_range_is_narrowed_to_the_best_with_a_margin_and_keeps_the_baseline(tmp_path: Path) -> None:
    old, new, text = suggested(tmp_path, near("augment.strength", 0.4))
    narrow = new.search["augment.strength"]
    assert isinstance(narrow, Real)
    assert 0.1 <= narrow.low < 0.3 < 0.4 < narrow.high <= 0.7  # the base's is 0.3
    assert changed(old, new) == {"augment.strength"}
    assert "# narrowed from 0 to 1: the 15 best trials are between" in text


def test_a_distant_baseline_keeps_the_range_wide(tmp_path: Path) -> None:
    old, new, text = suggested(tmp_path, near("augment.strength", 0.85))
    assert changed(old, new) == set()
    assert "and the baseline at 0.3, which is too much of the range" in text.replace("\n  # ", " ")


@pytest.mark.parametrize(
    ("before", "low", "high", "after"),
    [
        (Real("a", {}, 0.0, 1.0), 0.333, 0.5, Real("a", {}, 0.23, 0.6)),  # a tenth more, in two digits, outwards
        (Real("a", {}, 0.0, 1.0), 0.02, 0.95, Real("a", {}, 0.0, 1.0)),
        (Real("a", {}, 1e-6, 1e-3, log=True), 1e-5, 2e-5, Real("a", {}, 5.0e-6, 4.0e-5, log=True)),
        (Real("a", {}, 0.0, 1.0, step=0.1), 0.3, 0.3, Real("a", {}, 0.2, 0.4, step=0.1)),
        (Real("a", {}, 0.0, 0.5, step=0.25), 0.5, 0.5, Real("a", {}, 0.25, 0.5, step=0.25)),
        (Integer("a", {}, 0, 10), 4, 5, Integer("a", {}, 3, 6)),
        (Integer("a", {}, 1, 100_000, log=True), 10, 20, Integer("a", {}, 3, 64, log=True)),
    ],
)
def test_a_range_is_narrowed_outwards_rounded_and_on_its_grid(before: Any, low: float, high: float, after: Any) -> None:
    assert narrowed(before, low, high) == after


# Choices and conditions


def test_an_absent_choice_is_dropped_with_the_parameters_that_need_it(tmp_path: Path) -> None:
    _, new, text = suggested(tmp_path, lambda params, rng: rng.gauss(0, 0.1) - 9 * (params["optim.name"] == "swats"))
    optimizers, momentum = new.search["optim.name"], new.search["optim.momentum"]
    assert isinstance(optimizers, Categorical)
    assert optimizers.choices == ("adamw", "sgd")
    assert re.search(
        r"# dropped swats \(0 of the 15 best trials, \d+ of all 60\); among the 15 best trials: adamw", text
    )
    assert "optim.swats.switch_fraction" not in new.search
    assert "# optim.swats.switch_fraction: no longer searched: optim.name is never swats any more" in text
    assert momentum.when == {"optim.name": ("sgd",)}
    assert "when: {optim.name: sgd}" in text


def test_the_choice_of_the_baseline_is_never_dropped(tmp_path: Path) -> None:
    _, new, _ = suggested(tmp_path, lambda params, rng: rng.gauss(0, 0.1) - 9 * (params["optim.name"] == "adamw"))
    optimizers = new.search["optim.name"]
    assert isinstance(optimizers, Categorical)
    assert "adamw" in optimizers.choices


def test_values_shared_by_late_trials_of_a_sampler_are_not_taken_for_good(tmp_path: Path) -> None:
    # As a sampler that learns does: the second half has the better learning rates, and by chance one width.
    text = SPACE.replace("optim.lr_scale: {low: 0.1, high: 10", "optim.lr_scale: {low: 0.1, high: 1000")
    space = space_of(tmp_path, text)
    study = in_memory(space)
    add_trials(study, space, rising("optim.lr_scale"), trials=40)
    late = space_of(tmp_path, text.replace("model.width: {low: 0.5", "model.width: {low: 1.25")
                    .replace("base: {", "base: {model: {width: 1.25}, ")
                    .replace("low: 0.1, high: 1000", "low: 1.0, high: 1000"), "late")  # fmt: skip
    add_trials(study, late, lambda params, rng: 5 + rising("optim.lr_scale")(params, rng), trials=40, seed=1)
    new = space_of(tmp_path, suggest(study, space), "new")
    assert new.search["model.width"] == space.search["model.width"]


# The probabilities, against drawn numbers


def test_the_probabilities_equal_those_of_simulated_numbers() -> None:
    rng = random.Random(0)
    draws = [sorted(rng.random() for _ in range(6)) for _ in range(4000)]
    assert spread_chance(0.5, 6) == pytest.approx(sum(d[-1] - d[0] <= 0.5 for d in draws) / 4000, abs=0.02)
    assert binomial_tail(4, 6, 0.25) == pytest.approx(sum(d[3] <= 0.25 for d in draws) / 4000, abs=0.02)
    picked = [rng.sample(range(20), 5) for _ in range(4000)]
    assert missing_chance(8, 20, 5) == pytest.approx(sum(min(p) >= 8 for p in picked) / 4000, abs=0.02)
    assert missing_chance(20, 20, 5) == 0
    assert outer_share(OVERSAMPLE, "low") == pytest.approx(math.log(1.5 / 0.5) / math.log(12.5 / 0.5))
    assert outer_share(Real("augment.flip", {}, 0.5, 0.8, step=0.3), "high") == 0.5


# The command, and a study that goes on from it


@pytest.fixture
def old(tmp_path: Path) -> Study:
    space = space_of(tmp_path, SPACE, "old")
    study = on_disk(space, name="old", dataset=load_dataset(space.baseline.data))
    add_trials(study, space, rising("optim.lr_scale"), trials=40)
    return study


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(old: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Suggest a space for the old study with these options: (exit code, output, errors)."""

    def run(*options: str | Path) -> tuple[int, str, str]:
        code = hpo(monkeypatch, "space", "suggest", old.name, *map(str, options))
        return code, *capsys.readouterr()

    return run


def test_the_printed_command_begins_with_the_trials_that_fit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "wider.yaml"
    code, out, _ = run("-o", file)
    assert code == 0
    said = out.splitlines()
    assert said[0] == f"written to {file}, with the reasons as comments:"
    assert "optim.lr_scale: high 10 → 100" in [line.strip() for line in said]
    command = shlex.split(said[-1])
    assert command == ["hpo", "run", str(file), "--take-over", "old"]
    assert hpo(monkeypatch, *command[1:], "--workers", "0") == 0
    new = find_study("wider")
    counts = new.counts()
    assert counts.finished == 40
    assert f"The total is 30 new trials and the {counts.finished} that fit" in file.read_text().replace("\n# ", " ")
    assert counts.waiting == 30


@pytest.mark.usefixtures("old")
def test_a_taken_name_is_replaced_by_a_free_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new ones"
    folder.mkdir()
    assert hpo(monkeypatch, "space", "suggest", "-o", str(folder / "old.yaml")) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/old.yaml' --study old-2 --take-over old")


@pytest.mark.parametrize(
    ("epochs", "base"),
    [
        (10, "\nbase:\n  epochs: 10\n  batch_size: 64\n  optim:\n    lr_scale: 1.0\nsearch:\n"),
        (11, "  precision:\n"),
    ],
    ids=["as in its file", "in full, since it differs from its file"],
)
def test_without_a_file_only_the_space_is_printed(epochs: int, base: str, old: Study, run: Run, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(SPACE.replace("epochs: 10", f"epochs: {epochs}"))
    code, text, _ = run()
    assert code == 0
    assert space_of(tmp_path, text, "piped").baseline == old.space().baseline
    assert base in text


def test_only_suggestions_are_overwritten(run: Run, tmp_path: Path) -> None:
    own, again = tmp_path / "old.yaml", tmp_path / "again.yaml"
    assert run("-o", own) == (2, "", f"hpo: {own} exists and is no suggestion of hpo's; give -o another file\n")
    assert own.read_text() == SPACE
    assert [run("-o", again)[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("place", ["nodir/space.yaml", "."])
def test_an_unwritable_path_is_one_line(place: str, run: Run, tmp_path: Path) -> None:
    code, _, errors = run("-o", tmp_path / place)
    assert code == 2
    assert errors.count("\n") == 1


def test_a_confirmation_is_refused(old: Study) -> None:
    old.metadata["identity"]["confirms"] = "other"  # type: ignore[index]
    with pytest.raises(StudyError, match="is a confirmation and searches nothing; give the search: other"):
        suggest(old, old.space())
