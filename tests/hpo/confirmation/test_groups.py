"""A confirmation's new splits keep groups of images whole, as the search's do."""

from __future__ import annotations

from pathlib import Path

from core.config import TrainConfig
from core.data import folds
from hpo.confirmation.trials import replicated
from tests.core.test_data import write_folder
from tests.core.test_groups import grouped, patients, sides


def test_no_group_is_on_both_sides_of_a_confirmations_splits(tmp_path: Path) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([5, 4, 3, 3, 2, 2, 1, 1])))
    config = TrainConfig().override({"data.group": r"^(p\d+)_"})
    drawn = set()
    for count in (None, 3):
        for replicate in range(4):
            found = replicated(config.override({"data.folds": count}), replicate, seed=0, dataset=dataset)
            for parts in folds(dataset, found.data):
                train, val = sides(dataset, parts)
                assert not train & val
                drawn.add(frozenset(val))
    assert len(drawn) > 3
