"""Groups: images of one group, such as a patient, stay on one side of every split."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import DataConfig
from core.data import Dataset, Splits, folds, load_dataset, split
from core.data.splits import cut_test
from core.errors import UserError
from tests.core.test_data import load, photo, write_folder, write_zip

PATIENT = r"^(p\d+)_"
CLASSES = ("cat", "dog", "emu")


def patients(sizes: list[int], classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    """One patient for each size, with that many images of every class."""
    return {
        f"{name}/p{patient}_{i}.png": photo(10_000 * k + 100 * patient + i, size=4)
        for k, name in enumerate(classes)
        for patient, size in enumerate(sizes)
        for i in range(size)
    }


def grouped(root: Path, **config: Any) -> Dataset:
    return load(root, {"group": PATIENT, **config})


def patients_of(ids: list[str]) -> set[str]:
    return {name.rpartition("/")[2].partition("_")[0] for name in ids}


def sides(dataset: Dataset, parts: Splits) -> tuple[set[str], set[str]]:
    return tuple(patients_of([dataset.ids[i] for i in part.tolist()]) for part in (parts.train, parts.val))  # type: ignore[return-value]


# Every split keeps groups whole


@pytest.mark.parametrize("sizes", [[2] * 30, [12, 9, 7, 5, 4, 3, 2, 1], [2, 2, 2, 2, 2, 2, 2, 2, 20], [3] * 5], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_on_both_sides_of_any_split(tmp_path: Path, sizes: list[int], seed: int) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients(sizes)))
    tested = patients_of(list(dataset.open_test().ids))
    pool = patients_of(list(dataset.ids))
    assert tested
    assert not tested & pool
    for parts in (
        split(dataset, DataConfig(split_seed=seed)),
        *folds(dataset, DataConfig(split_seed=seed, folds=3)),
    ):
        train, val = sides(dataset, parts)
        assert val
        assert not train & val
        assert train | val == pool


def test_every_image_validates_in_one_fold(tmp_path: Path) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([5, 4, 3, 3, 2, 2, 1, 1])))
    validated = torch.cat([parts.val for parts in folds(dataset, DataConfig(folds=4))])
    assert validated.sort().values.tolist() == list(range(len(dataset.ids)))


def test_groups_with_a_common_image_are_one_group(tmp_path: Path) -> None:
    files = patients([2] * 24)
    for patient in range(0, 24, 2):  # pairs of patients share an image, of another class even
        files[f"cat/p{patient}_0.png"] = files[f"dog/p{patient + 1}_0.png"]
    dataset = grouped(write_folder(tmp_path / "set", files))
    assert dataset.report.leaked == 0
    for seed in range(5):
        for parts in (
            split(dataset, DataConfig(split_seed=seed)),
            *folds(dataset, DataConfig(split_seed=seed, folds=3)),
        ):
            pairs = [{int(name[1:]) // 2 for name in side} for side in sides(dataset, parts)]
            assert not pairs[0] & pairs[1]


# Sizes


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.25, 0.4])
def test_the_fractions_are_met_to_within_a_group(tmp_path: Path, fraction: float) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([2] * 40)), test_fraction=fraction)
    total, pool = 40 * 2 * len(CLASSES), len(dataset.ids)
    assert abs(dataset.n_test - fraction * total) <= 2 * len(CLASSES)
    parts = split(dataset, DataConfig(val_fraction=fraction))
    assert abs(len(parts.val) - fraction * pool) <= 3 * 2 * len(CLASSES)


def test_validation_is_stratified(tmp_path: Path) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([4, 3, 3, 2, 2, 2, 1, 1, 1, 1] * 3)))
    for seed in range(5):
        counts = split(dataset, DataConfig(split_seed=seed)).val
        assert len(set(torch.bincount(dataset.labels[counts]).tolist())) == 1  # as patients have all classes alike


@pytest.mark.parametrize("seed", range(20))
def test_the_test_cut_leaves_two_groups_of_every_class_and_never_overshoots_by_more_than_a_group(seed: int) -> None:
    draw = random.Random(seed)
    labels, groups = [], []
    for group in range(draw.randint(3, 40)):
        kinds = draw.sample(CLASSES, draw.randint(1, 3))
        size = draw.choice([1, 2, 5, 20])
        labels += draw.choices(kinds, k=size)
        groups += [str(group)] * size
    digests = [draw.randbytes(8) for _ in labels]
    chosen = cut_test(digests, labels, 0.2, groups=groups)
    of_group: dict[str, set[bool]] = defaultdict(set)
    trained: dict[str, set[str]] = defaultdict(set)
    for group, label, is_test in zip(groups, labels, chosen, strict=True):
        of_group[group].add(is_test)
        if not is_test:
            trained[label].add(group)
    assert all(len(sides) == 1 for sides in of_group.values())
    for label in set(labels):
        assert len(trained[label]) >= min(2, len({g for g, own in zip(groups, labels, strict=True) if own == label}))
    assert sum(chosen) <= 0.2 * len(labels) + max(Counter(groups).values()) + len(CLASSES)


# Nothing but the data decides the test set


def test_the_test_cut_does_not_depend_on_names_order_or_seeds(tmp_path: Path) -> None:
    def tested(root: Path, **config: Any) -> set[bytes]:
        return {image.numpy().tobytes() for image in grouped(root, **config).open_test().images}

    files = patients([3, 2, 2, 1, 1, 4, 2])
    expected = tested(write_folder(tmp_path / "set", files))
    renamed = {}
    for name, content in files.items():
        folder, _, rest = name.partition("/p")
        patient, _, number = rest.partition("_")
        renamed[f"{folder}/p{90 - int(patient)}_{9 - int(number[0])}.png"] = content
    assert tested(write_folder(tmp_path / "renamed", renamed)) == expected
    assert tested(tmp_path / "set", split_seed=7, val_fraction=0.5) == expected


def test_the_fingerprint_tells_groupings_apart_but_not_names_of_groups(tmp_path: Path) -> None:
    files = {f"{name}/p{i}_q{i // 2}.png": photo(100 * k + i) for k, name in enumerate(CLASSES) for i in range(12)}
    root = write_folder(tmp_path / "set", files)
    given = {f"train/{name}": content for name, content in files.items()}
    given |= {f"test/{name}/p99_q99.png": photo(9000 + k) for k, name in enumerate(CLASSES)}
    root = write_folder(tmp_path / "given", given)  # the same pool for any grouping
    plain = load(root).fingerprint
    single, also, pairs = (load(root, {"group": group}).fingerprint for group in (PATIENT, r"p\d+", r"_(q\d+)"))
    assert single == also
    assert len({plain, single, pairs}) == 3


def test_a_cache_distinguishes_groupings(tmp_path: Path) -> None:
    root, cache = write_folder(tmp_path / "set", patients([2] * 12)), tmp_path / "cache"
    plain = load(root, cache_dir=cache)
    first = load(root, {"group": PATIENT}, cache_dir=cache)
    again = load(root, {"group": PATIENT}, cache_dir=cache)
    assert plain.groups is None
    assert first.groups is not None
    assert torch.equal(first.groups, again.groups)
    assert first.open_test().ids == again.open_test().ids


def validated(dataset: Dataset, seed: int) -> Tensor:
    return split(dataset, DataConfig(split_seed=seed)).val


def test_seeds_vary_the_validation_images_of_few_groups_of_different_sizes(tmp_path: Path) -> None:
    dataset = grouped(write_folder(tmp_path / "set", patients([9, 8, 7, 6, 5, 4, 3, 2])))
    drawn = {tuple(validated(dataset, seed).tolist()) for seed in range(12)}
    assert len(drawn) >= 3
    assert torch.equal(validated(dataset, 5), validated(dataset, 5))


# Where groups come from


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (r"^(p\d+)_", ["p1", "p1", "p2"]),
        (r"p\d+", ["p1", "p1", "p2"]),
        (r"(\d)_(\d)", ["1/0", "1/1", "2/0"]),
        (r"(p\d+)|(q)", ["p1/None", "p1/None", "p2/None"]),
        (r"^(.*/p\d+)_", ["cat/p1", "dog/p1", "cat/p2"]),
    ],
)
def test_a_regular_expression_is_searched_in_file_names_or_with_a_slash_in_paths(
    tmp_path: Path, group: str, expected: list[str]
) -> None:
    names = ["cat/p1_0.png", "dog/p1_1.png", "cat/p2_0.png"]
    more = [f"{name}/p{i}_{i % 7}.png" for name in ("cat", "dog") for i in range(3, 9)]
    dataset = load(
        write_folder(tmp_path / "set", {name: photo(i) for i, name in enumerate([*names, *more])}),
        {"group": group, "test_fraction": 0.01},
    )
    assert dataset.groups is not None
    group_of = dict(zip(dataset.ids, dataset.groups.tolist(), strict=True))
    test = set(dataset.open_test().ids)
    for first, a in zip(names, expected, strict=True):
        for second, b in zip(names, expected, strict=True):
            if not {first, second} & test:
                assert (group_of[first] == group_of[second]) == (a == b)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (r"^(q\d+)_", r"data\.group=\^\(q\\d\+\)_ is not found in 24 of 24 file names: cat/p0_0\.png, cat/p0_1\.png"),
        (r"/(q\d+)_", "is not found in 24 of 24 paths"),
        (r"(p\d", r"data\.group=\(p\\d: neither a column of .*set nor a regular expression \(missing \)"),
        (r"p", "all images are in the group p"),
    ],
)
def test_a_group_that_is_not_found_is_one_line(tmp_path: Path, group: str, message: str) -> None:
    root = write_folder(tmp_path / "set", patients([2] * 4))
    with pytest.raises(UserError, match=message) as raised:
        load(root, {"group": group})
    assert "\n" not in str(raised.value)


# What cannot be divided


def test_a_group_on_both_sides_of_a_given_split_is_refused(tmp_path: Path) -> None:
    files = {f"train/{name}": content for name, content in patients([2] * 6).items()}
    files |= {
        f"test/{name}/p{patient}_9.png": photo(patient, size=4)
        for name, patient in zip(CLASSES, (9, 3, 4), strict=True)
    }
    root = write_folder(tmp_path / "set", files)
    with pytest.raises(UserError, match="2 groups have images inside and outside its test set: p3, p4; move them"):
        grouped(root)
    load(root)


def test_a_class_in_one_group_is_refused(tmp_path: Path) -> None:
    files = patients([2] * 6, ("cat", "dog")) | {f"emu/p3_{i}.png": photo(700 + i, size=4) for i in range(9)}
    with pytest.raises(UserError, match="a single group outside the test set has class emu; training and validation"):
        grouped(write_folder(tmp_path / "set", files))


def test_too_few_groups_for_a_test_set_or_for_folds_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add a test folder, or a third group to each class"):
        grouped(write_folder(tmp_path / "two", patients([8, 8])))
    dataset = grouped(write_folder(tmp_path / "set", patients([4] * 5)))
    with pytest.raises(UserError, match=r"data\.folds=5 needs as many groups, and there are 4; lower it"):
        folds(dataset, DataConfig(folds=5))


def test_without_groups_nothing_changes(tmp_path: Path) -> None:
    dataset = load_dataset(DataConfig())
    assert dataset.groups is None
    assert dataset.fingerprint == load_dataset(DataConfig(split_seed=3)).fingerprint
    assert np.array_equal(split(dataset, DataConfig()).val, split(dataset, DataConfig(test_fraction=0.1)).val)


# Columns


def table(rows: list[tuple[str, str, str]], header: str = "path,label,patient") -> bytes:
    return "\n".join([header, *(",".join(row) for row in rows), ""]).encode()


def listed_patients() -> tuple[dict[str, bytes], list[tuple[str, str, str]]]:
    """Images of 12 patients whose names say nothing, and a row for each."""
    files: dict[str, bytes] = {}
    rows = []
    for patient in range(12):
        for k, label in enumerate(CLASSES):
            name = f"images/{len(files):03}.png"
            files[name] = photo(100 * patient + k, size=4)
            rows.append((name, label, f"P{patient}"))
    return files, rows


def as_csv(root: Path, files: dict[str, bytes], content: bytes) -> Path:
    return write_folder(root, {**files, "labels.csv": content}) / "labels.csv"


def as_folder(root: Path, files: dict[str, bytes], content: bytes) -> Path:
    return write_folder(root, {**files, "labels.csv": content})


def as_zip(root: Path, files: dict[str, bytes], content: bytes) -> Path:
    return write_zip(root.with_suffix(".zip"), {**files, "labels.csv": content})


@pytest.mark.parametrize("pack", [as_csv, as_folder, as_zip])
@pytest.mark.parametrize("group", ["patient", "Patient"])
def test_a_column_of_a_table_keeps_its_groups_whole(tmp_path: Path, pack: Any, group: str) -> None:
    files, rows = listed_patients()
    dataset = load(pack(tmp_path / "set", files, table(rows)), {"group": group})
    patient_of = {name: patient for name, _, patient in rows}
    test = {patient_of[name] for name in dataset.open_test().ids}
    assert test
    assert dataset.report.groups == 12
    assert any("patient" in note and note.startswith("read from") for note in dataset.report.notes)
    for parts in (split(dataset, DataConfig()), *folds(dataset, DataConfig(folds=3))):
        train, val = ({patient_of[dataset.ids[i]] for i in part.tolist()} for part in (parts.train, parts.val))
        assert not train & val
        assert not test & (train | val)


def test_a_column_wins_over_the_folders_that_agree_with_its_table(tmp_path: Path) -> None:
    files, rows = listed_patients()
    inside = {f"{label}/{i}.png": (files[name], patient) for i, (name, label, patient) in enumerate(rows)}
    listing = table([(name, name.split("/")[0], patient) for name, (_, patient) in inside.items()])
    root = write_folder(tmp_path / "set", {name: content for name, (content, _) in inside.items()} | {"a.csv": listing})
    assert load(root, {"group": "patient"}).report.groups == 12
    assert load(root).report.groups == 0


def test_a_column_of_a_csv_with_pixels_is_one_too(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [[p % 2, f"P{p // 4}", *draw.integers(0, 256, 16)] for p in range(48)]
    header = ["label", "patient", *(f"pixel{i}" for i in range(16))]
    (tmp_path / "set.csv").write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]))
    dataset = load(tmp_path / "set.csv", {"group": "patient"})
    assert dataset.report.groups == 12
    parts = split(dataset, DataConfig())
    train, val = ({int(dataset.ids[i]) // 4 for i in part.tolist()} for part in (parts.train, parts.val))
    assert not train & val


def test_a_row_without_a_group_is_named(tmp_path: Path) -> None:
    files, rows = listed_patients()
    rows[5] = (*rows[5][:2], "")
    with pytest.raises(UserError, match=r"labels\.csv:7: no patient, the column of data\.group; fill it in"):
        load(as_csv(tmp_path / "set", files, table(rows)), {"group": "patient"})


def test_given_validation_images_may_not_share_a_group_with_training_images(tmp_path: Path) -> None:
    files = {f"train/{name}": content for name, content in patients([2] * 6).items()}
    files |= {f"val/{name}/p{i}_9.png": photo(i, size=4) for name, i in zip(CLASSES, (9, 3, 4), strict=True)}
    dataset = grouped(write_folder(tmp_path / "set", files))
    with pytest.raises(UserError, match=r"2 groups have images inside and outside its val set; .*data\.val=drawn"):
        split(dataset, DataConfig())
    for parts in (split(dataset, DataConfig(val="drawn")), *folds(dataset, DataConfig(folds=2))):
        train, val = sides(dataset, parts)
        assert not train & val
