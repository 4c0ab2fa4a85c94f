"""A loss, a transform and an optimizer of the user's own in a study: run, resumed, refitted, and no part of a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpo import load_bundle
from hpo.study import find_study
from tests.hpo.commands import RunHpo
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
PARTS, SPACE = blocks(PAGE, "python")[1], blocks(PAGE, "yaml")[1]
SHORT = ("--set", "epochs=2", "--set", "batch_size=128", "--device", "cpu")


@pytest.fixture
def module(own_module: Callable[[str], str]) -> str:
    """The example of the documentation in the working directory, under a module's name of its own."""
    name = own_module(PARTS)
    Path("parts.yaml").write_text(SPACE.replace("parts:", f"{name}:"))
    return name


def test_the_example_of_the_docs_is_checked_searched_resumed_and_refitted(
    module: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no fault found" in run_hpo("space", "check", "parts.yaml")
    run_hpo("run", "parts.yaml", "--trials", "2", *SHORT)
    run_hpo("run", "parts.yaml", "--trials", "3", *SHORT)
    study = find_study("parts")
    assert study.counts().complete + study.counts().pruned == 3
    assert set(study.optuna.trials[1].params) == {"optim.lr", "loss.kwargs.margin", "augment.kwargs.std"}
    run_hpo("refit", "0", "--study", "parts", "--device", "cpu")
    monkeypatch.delitem(sys.modules, module)
    Path(f"{module}.py").unlink()  # a model does without the code of its training
    bundle = load_bundle(study.paths.refit("00000"), "cpu")
    assert len(bundle.predict(np.zeros((1, 8, 8, 1), dtype=np.uint8)).names) == 1
    assert "imports" not in (study.paths.refit("00000") / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":MarginLoss", ":MarginLos", "loss.name: module {} .* has no MarginLos; did you mean MarginLoss?"),
        ("{margin: 0.5}", "{margn: 0.5, margin: 0.5}", "{}:MarginLoss has no argument margn; did you mean margin?"),
        ("augment.kwargs.std", "augment.kwargs.sd", "augment.kwargs.sd: the baseline has no value: give one in base"),
        (", lr: 0.001", "", "optim.lr_scale has no reference for {}:Lion of your own: give optim.lr instead"),
        ("lr: 0.001}", "lr: 0.001, kwargs: {weight_decay: 0.1}}", "optim.kwargs.weight_decay is optim.weight_decay"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_trained(
    module: str, run_hpo: RunHpo, old: str, new: str, message: str
) -> None:
    Path("parts.yaml").write_text(Path("parts.yaml").read_text().replace(old, new))
    run_hpo("run", "parts.yaml", code=2)
    assert re.search(message.format(module).replace("?", r"\?"), run_hpo.error)
    assert not Path("studies").exists()


@pytest.mark.parametrize(
    ("field", "source", "message"),
    [
        ("loss", "def part(): return lambda logits, targets: logits", "returns a tensor (2, 10) for 2 images"),
        ("augment", "def part(): return lambda images: images[7]", "fails with images (2, 1, 8, 8): IndexError"),
        ("optim", "def part(params, lr): return None", "returns None, not a torch.optim.Optimizer"),
    ],
)
def test_a_part_that_fails_is_refused_before_a_study_begins(
    own_module: Callable[[str], str], run_hpo: RunHpo, field: str, source: str, message: str
) -> None:
    own = f"{field}: {{name: '{own_module(source)}:part'{', lr: 0.1' if field == 'optim' else ''}}}"
    Path("space.yaml").write_text(f"base: {{epochs: 1, {own}}}\nsearch:\n  model.dropout: {{low: 0.0, high: 0.5}}\n")
    assert message in run_hpo.fails("run", "space.yaml", "--device", "cpu")
    assert not Path("studies").exists()


def test_a_study_does_not_continue_with_another_loss(module: str, run_hpo: RunHpo) -> None:
    run_hpo("run", "parts.yaml", "--trials", "1", *SHORT)
    study = find_study("parts")
    named = {f"{module}:{name}" for name in ("MarginLoss", "Noise", "Lion")}
    assert study.metadata["code"].keys() == named
    stored = study.metadata["code"][f"{module}:MarginLoss"]["files"]
    assert list(stored) == [f"{module}.py"]
    from hpo.errors import StudyError
    from hpo.study.metadata import check_code

    changed = {"code": {f"{module}:MarginLoss": {"folder": ".", "files": {f"{module}.py": "another"}}}}
    with pytest.raises(StudyError, match=rf"begun with other code of {module}:MarginLoss: {module}.py has changed"):
        check_code("parts", changed, {f"{module}:MarginLoss": "loss.name"})
    with pytest.raises(StudyError, match="begun with other code"):
        study.metadata["code"] |= changed["code"]
        study.check_sources(study.space().baseline)
    assert run_hpo("study", "doctor", "parts")
