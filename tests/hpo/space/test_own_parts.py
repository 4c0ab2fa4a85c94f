"""Samplers and pruners of the user's own code and of OptunaHub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.space.own_parts import _from_hub
from hpo.study import find_study
from tests.hpo.commands import RunHpo
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
STEERING, SPACE = blocks(PAGE, "python")[2], blocks(PAGE, "yaml")[2]
SHORT = ("--set", "epochs=2", "--set", "batch_size=128", "--device", "cpu")


@pytest.fixture
def steered(own_module: Callable[[str], str], tmp_path: Path) -> Path:
    """The example of the documentation, in the working directory."""
    file = tmp_path / "steered.yaml"
    file.write_text(SPACE.replace("steering:", f"{own_module(STEERING)}:"))
    return file


def test_the_example_of_the_docs_searches_and_prunes(steered: Path, run_hpo: RunHpo) -> None:
    assert "no fault found" in run_hpo("space", "check", str(steered))
    run_hpo("run", str(steered), "--trials", "6", *SHORT)
    first, *others = find_study("steered").optuna.trials
    assert first.state == TrialState.COMPLETE  # the baseline
    pruned = [trial for trial in others if trial.state == TrialState.PRUNED]
    assert pruned
    assert all(trial.last_step == 1 and trial.intermediate_values[1] < 0.5 for trial in pruned)


def test_the_baseline_is_never_pruned(steered: Path, run_hpo: RunHpo) -> None:
    steered.write_text(steered.read_text().replace("score: 0.5", "score: 2"))
    run_hpo("run", str(steered), "--trials", "3", *SHORT)
    states = [trial.state for trial in find_study("steered").optuna.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_proposals_depend_on_the_seed_and_the_trials_before_alone(steered: Path, run_hpo: RunHpo) -> None:
    steered.write_text(steered.read_text().replace("keep: 0.7", "keep: 0.2"))

    def drawn(name: str, *totals: int, seed: int = 0) -> list[float]:
        for total in totals:
            options = ("--study", name, "--trials", str(total), "--seed", str(seed))
            run_hpo("run", str(steered), *options, *SHORT)
        return [trial.params["optim.lr_scale"] for trial in find_study(name).optuna.trials]

    whole = drawn("whole", 6)
    assert drawn("in-parts", 2, 6) == whole
    assert drawn("other", 6, seed=1) != whole


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":KeepBest", ":KeepBst", "has no KeepBst; did you mean KeepBest?"),
        ("keep: 0.7", "kep: 0.7", "has no argument kep; did you mean keep?"),
        ("{epoch: 1, score: 0.5}", "{epoch: 1}", "needs score, which has no default"),
        (":Hopeless", ":KeepBest", "has no argument epoch"),
        ('Hopeless", kwargs: {epoch: 1, score: 0.5}', 'KeepBest"', "returns a KeepBest, not Optuna's BasePruner"),
        ("keep: 0.7", "keep: 0.7, seed: -1", "fails: ValueError"),
    ],
)
def test_a_mistake_is_one_line_before_a_study_begins(
    steered: Path, run_hpo: RunHpo, tmp_path: Path, old: str, new: str, message: str
) -> None:
    steered.write_text(steered.read_text().replace(old, new))
    for command in (("space", "check"), ("run",)):
        run_hpo(*command, str(steered), code=2)
        [line] = run_hpo.error.strip().splitlines()
        assert message in line
    assert not (tmp_path / "studies").exists()


# OptunaHub. A package is read from OptunaHub's cache, laid out as a download leaves it: nothing is downloaded here.

ON_HUB = SPACE.replace("steering:KeepBest", "hub:samplers/keep/best:KeepBest").replace(
    "steering:Hopeless", "hub:pruners/hopeless:Hopeless"
)


@pytest.fixture
def from_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A space whose sampler and pruner are packages in OptunaHub's cache."""
    pytest.importorskip("optunahub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTUNAHUB_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "none")  # a download fails
    for package in ("samplers/keep/best", "pruners/hopeless"):
        folder = tmp_path / "cache/github.com/optuna/optunahub-registry/main/package" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(STEERING)
    _from_hub.cache_clear()
    file = tmp_path / "on_hub.yaml"
    file.write_text(ON_HUB)
    return file


def test_packages_of_optunahub_search_and_prune_like_own_code(from_hub: Path, steered: Path, run_hpo: RunHpo) -> None:
    for file in (from_hub, steered):
        run_hpo("run", str(file), "--trials", "4", *SHORT)
    one, other = (find_study(name).optuna.trials for name in ("on_hub", "steered"))
    assert [trial.params for trial in one] == [trial.params for trial in other]
    assert [trial.state for trial in one] == [trial.state for trial in other]
    assert TrialState.PRUNED in {trial.state for trial in one}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":KeepBest", ":KeepBst", "has no KeepBst; did you mean KeepBest?"),
        ("keep: 0.7", "kep: 0.7", "has no argument kep; did you mean keep?"),
        ("keep/best", "keep/bst", "hub:samplers/keep/bst:KeepBest cannot be loaded from OptunaHub; check its name and"),
        (
            ":KeepBest",
            "",
            "must be hub:samplers/PACKAGE:NAME or hub:pruners/PACKAGE:NAME, not 'hub:",
        ),
    ],
)
def test_a_mistake_in_a_name_on_optunahub_is_one_line(
    from_hub: Path, run_hpo: RunHpo, old: str, new: str, message: str
) -> None:
    from_hub.write_text(from_hub.read_text().replace(old, new))
    run_hpo("space", "check", str(from_hub), code=2)
    assert message in run_hpo.error


def test_a_name_on_optunahub_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    monkeypatch.setitem(sys.modules, "optunahub", None)
    _from_hub.cache_clear()
    (tmp_path / "on_hub.yaml").write_text(ON_HUB)
    run_hpo("space", "check", str(tmp_path / "on_hub.yaml"), code=2)
    [line] = run_hpo.error.strip().splitlines()
    assert "sampler.name: hub:samplers/keep/best:KeepBest needs optunahub (" in line
    assert line.endswith("pip install 'hpo-vision[hub]'")
