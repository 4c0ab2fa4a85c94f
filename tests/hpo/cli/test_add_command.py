"""`hpo study add`: one more trial with chosen parameters."""

from __future__ import annotations

import re

import pytest

from core.data import Dataset
from hpo.study import Study, join_study
from tests.hpo.commands import RunHpo
from tests.hpo.invented import SPACE, invented_study


@pytest.fixture
def own(digits: Dataset) -> Study:
    return invented_study(SPACE, digits, "own", trials=2)


def test_a_trial_with_chosen_parameters_is_queued_and_the_total_raised(own: Study, run_hpo: RunHpo) -> None:
    said = run_hpo("study", "add", "own", "--params", "optim.name=sgd", "--params", "loss.smoothing=0.1")
    assert said.startswith("queued as the last trial of 3: optim.name=sgd ")
    assert said.endswith("; run it with\n  hpo worker own\n")
    study = join_study("own")
    claimed = study.queue.claim()
    assert claimed is not None
    drawn = study.space().suggest(claimed[0])
    assert (drawn["optim.name"], drawn["loss.smoothing"], claimed[1]) == ("sgd", 0.1, 2)
    baseline = study.space().baseline.flat()
    assert drawn["optim.momentum"] == baseline["optim.momentum"]
    study.queue.release(claimed[0])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ([], "--params is missing"),
        (["epochs=3"], "--params epochs: study own does not search it; it searches optim.name, optim.lr_scale"),
        (["loss.smoothing=0.9"], r"loss.smoothing=0.9: study own cannot draw that; loss.smoothing: .*high: 0.2"),
        (["optim.name=x"], "optim.name"),
    ],
)
def test_parameters_that_the_study_cannot_draw_are_refused(
    own: Study, run_hpo: RunHpo, params: list[str], said: str
) -> None:
    options = [word for text in params for word in ("--params", text)]
    assert re.search(said, run_hpo.fails("study", "add", "own", *options))
    assert own.counts().waiting == 0
