"""`data.val_part`: the disjoint validation sets of a `split_seed`, which a confirmation takes in turn."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import DataConfig
from core.data import Dataset, Splits, load_dataset, split, val_parts
from core.errors import UserError
from tests.core.test_data import write_folder
from tests.core.test_groups import grouped, patients, sides


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


def parts_of(dataset: Dataset, **config: object) -> list[Splits]:
    data = DataConfig.model_validate(config)
    parts = range(val_parts(dataset, data))
    return [split(dataset, data.model_copy(update={"val_part": part})) for part in parts]


def validated(parts: list[Splits]) -> list[int]:
    return torch.cat([one.val for one in parts]).sort().values.tolist()


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 4), (0.2, 5), (0.1, 10), (1 / 3, 3), (0.5, 2)])
def test_every_image_validates_once_where_the_fraction_divides_the_images(
    digits: Dataset, fraction: float, count: int
) -> None:
    found = parts_of(digits, val_fraction=fraction)
    assert len(found) == count
    assert validated(found) == list(range(len(digits.labels)))


@pytest.mark.parametrize(("fraction", "count"), [(0.15, 6), (0.3, 3), (0.4, 2), (0.6, 1), (0.9, 1)])
def test_other_fractions_leave_some_images_out_and_validate_none_twice(
    digits: Dataset, fraction: float, count: int
) -> None:
    found = parts_of(digits, val_fraction=fraction)
    assert len(found) == count
    once = validated(found)
    assert len(set(once)) == len(once)
    assert len(once) == pytest.approx(count * fraction * len(digits.labels), abs=1)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2, 0.25, 0.3, 0.6])
def test_each_part_has_the_fraction_of_all_images_and_of_each_class(digits: Dataset, fraction: float) -> None:
    classes = digits.labels.bincount()
    for one in parts_of(digits, val_fraction=fraction):
        assert abs(len(one.val) - fraction * len(digits.labels)) < 1
        assert len(one.train) + len(one.val) == len(digits.labels)
        assert ((digits.labels[one.val].bincount(minlength=10) - fraction * classes).abs() < 2.5).all()


def test_the_seed_alone_decides(digits: Dataset) -> None:
    first, again, other = (parts_of(digits, split_seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.val, b.val) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.val, b.val) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 4), (0.4, 2), (0.15, 7)])  # 1/4, 2/5 and 1/7 of the groups
def test_groups_stay_whole_and_validate_at_most_once(tmp_path: Path, fraction: float, count: int) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([5, 4, 3, 3, 2, 2, 1, 1] * 2)))
    found = parts_of(dataset, val_fraction=fraction)
    assert len(found) == count
    once = validated(found)
    assert len(set(once)) == len(once)
    for one in found:
        train, val = sides(dataset, one)
        assert val
        assert not train & val


def made(folder: Path, images: np.ndarray, labels: list[str]) -> Dataset:
    np.savez(folder / "set.npz", images=images, labels=labels)
    return load_dataset(DataConfig(name=str(folder / "set.npz"), test_fraction=0.1))


def test_copies_stay_together_and_validate_once(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (120, 8, 8), dtype=np.uint8)
    images[60:80] = images[40:60]
    dataset = made(tmp_path, images, ["a", "b"] * 60)
    for seed in range(5):
        found = parts_of(dataset, split_seed=seed)
        assert validated(found) == list(range(len(dataset.labels)))
        for one in found:
            assert not set(dataset.twins[one.val].tolist()) & set(dataset.twins[one.train].tolist())


def test_a_class_of_two_images_always_has_one_to_train_on(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (63, 8, 8), dtype=np.uint8)
    dataset = made(tmp_path, images, ["a"] * 30 + ["b"] * 30 + ["c"] * 3)
    assert (dataset.labels == 2).sum() == 2
    for seed in range(20):
        for one in parts_of(dataset, split_seed=seed):
            assert (dataset.labels[one.train] == 2).any()


def test_all_parts_of_a_seed_can_be_trained_on_or_none_is_drawn(tmp_path: Path) -> None:
    """The images of a class are copies of two, so a part that has both leaves none for training."""
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    images[40:] = images[[40, 41] * 10]
    dataset = made(tmp_path, images, ["a"] * 20 + ["b"] * 20 + ["c"] * 20)
    possible = []
    for seed in range(40):
        drawn = []
        for part in range(2):
            with suppress(UserError):
                drawn.append(split(dataset, DataConfig(val_fraction=0.5, split_seed=seed, val_part=part)))
        assert len(drawn) in (0, 2)
        possible.append(bool(drawn))
    assert any(possible)
    assert not all(possible)


def test_a_part_that_does_not_exist_is_an_error(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"data\.val_part=4: .* gives 4 disjoint validation sets, counted from 0"):
        split(digits, DataConfig(val_part=4))
