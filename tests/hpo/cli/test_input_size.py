"""A search over the size of the network's input, and its submission model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.hpo.commands import RunHpo
from tests.hpo.digits import digit_pixels, rows_of

SPACE = """
data: {name: some.npz}
base: {model: {widths: [8], blocks: [1], input_size: 8}, epochs: 4, batch_size: 32}
pruner: {name: none}
sampler: {name: random}
search:
  model.input_size: {choices: [8, 16]}
"""


def test_sizes_are_searched_and_refitted(tmp_path: Path, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels, labels = digit_pixels()
    np.savez("some.npz", images=pixels[:400], labels=labels[:400])
    np.savez("new.npz", images=pixels[400:440])
    Path("space.yaml").write_text(SPACE)
    run_hpo("run", "space.yaml", "--trials", "4", "--study", "own")
    sizes = [json.loads(row["params.model.input_size"]) for row in _trials(run_hpo)]
    assert set(sizes) == {8, 16}
    run_hpo("refit", str(sizes.index(16)), "--study", "own", "--onnx")  # compares the outputs of both
    [preprocess] = Path("studies/own/refit").glob("*/preprocess.json")
    assert json.loads(preprocess.read_text())["image_size"] == [8, 8]
    run_hpo("predict", str(preprocess.parent), "new.npz", "-o", "out.csv")
    assert len(rows_of(Path("out.csv"))) == 40


def _trials(run_hpo: RunHpo) -> list[dict[str, str]]:
    Path("trials.csv").unlink(missing_ok=True)
    run_hpo("study", "trials", "own", "--csv", "-o", "trials.csv")
    return rows_of(Path("trials.csv"))
