"""Data sets of the Hugging Face hub: .parquet and .arrow files with images, labels and splits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from core.config import DataConfig
from core.data import Dataset, load_dataset, load_images
from core.errors import UserError
from tests.core.layouts import counts_of, picture

TWO = ("cat", "dog")


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"reading it needs pyarrow; install hpo-vision\[parquet\]"):
        load(tmp_path / "set.parquet")


def load(path: Path, **config: Any) -> Dataset:
    return load_dataset(DataConfig(**config), data_path=path)


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def rows(arrow: Any, n: int = 8, *, start: int = 0, label: str = "label", image: str = "image", **more: Any) -> Any:
    """A table as the hub has it: images as bytes and path, labels as indices, names in the metadata."""
    columns = {
        image: [{"bytes": picture(f"{i}"), "path": f"{i}.png"} for i in range(start, start + n)],
        label: [i % 2 for i in range(n)],
        **more,
    }
    features = {image: {"_type": "Image"}, label: {"names": list(TWO), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.table(columns).replace_schema_metadata(metadata)


def write(arrow: Any, path: Path, content: Any) -> Path:
    """Write a table as .parquet, or as .arrow in the form that the `datasets` library writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        __import__("pyarrow.parquet")
        arrow.parquet.write_table(content, path, row_group_size=3)
    else:
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(content, max_chunksize=3)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_single_file_has_classes_by_name(arrow: Any, tmp_path: Path, suffix: str) -> None:
    loaded = load(write(arrow, tmp_path / f"pets{suffix}", rows(arrow, caption=["x"] * 8)))
    assert (loaded.name, loaded.classes, len(loaded.images) + loaded.n_test) == ("pets", TWO, 8)
    assert "columns not used: caption" in loaded.report.notes


@pytest.mark.parametrize(
    "names",
    [
        (
            "data/train-00000-of-00001.parquet",
            "data/validation-00000-of-00001.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0000.parquet"),
        ("train/data-00000-of-00001.arrow", "validation/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),
    ],
)
def test_a_folder_has_splits_by_name(arrow: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, n, start in zip(names, (8, 4, 2), (0, 8, 12), strict=True):
        write(arrow, tmp_path / name, rows(arrow, n, start=start))
    (tmp_path / "README.md").write_text("a card")
    loaded = load(tmp_path)
    assert counts_of(loaded) == {"train": 8, "val": 4, "test": 2}
    assert loaded.classes == TWO
    images, ids, _ = load_images(tmp_path, image_size=(8, 8), channels=3)
    assert len(images) == 2, "predictions are for the test images"
    assert ids == (f"{names[2]}:0", f"{names[2]}:1")


def test_files_of_one_split_are_put_together(arrow: Any, tmp_path: Path) -> None:
    for i in range(2):
        write(arrow, tmp_path / f"train-0000{i}-of-00002.parquet", rows(arrow, 4, start=4 * i))
    assert counts_of(load(tmp_path)) == {"train": 8}


def test_labels_of_minus_one_are_an_unlabelled_test_set(arrow: Any, tmp_path: Path) -> None:
    write(arrow, tmp_path / "train.parquet", rows(arrow))
    content = rows(arrow, 3, start=8)
    hidden = content.set_column(1, "label", arrow.array([-1] * 3)).replace_schema_metadata(content.schema.metadata)
    write(arrow, tmp_path / "test.parquet", hidden)
    loaded = load(tmp_path)
    assert (counts_of(loaded), loaded.report.unlabelled) == ({"train": 8}, 3)
    write(arrow, tmp_path / "train.parquet", hidden)
    with pytest.raises(UserError, match=r"row 0 of train\.parquet: no label"):
        load(tmp_path)


def test_several_columns_of_labels_need_the_option(arrow: Any, tmp_path: Path) -> None:
    content = rows(arrow, label="fine_label", image="img", coarse_label=["pet"] * 4 + ["beast"] * 4)
    path = write(arrow, tmp_path / "train.parquet", content)
    with pytest.raises(UserError, match="its columns fine_label, coarse_label may all have the labels"):
        load(path)
    assert load(path, label_column="coarse_label").classes == ("beast", "pet")
    assert load(path, label_column="fine_label").classes == TWO


def test_files_that_cannot_be_read_are_one_line(arrow: Any, tmp_path: Path) -> None:
    path = write(arrow, tmp_path / "set.parquet", rows(arrow))
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"set\.parquet is damaged or cut short"):
        load(path)
    other = arrow.table({"text": ["x"] * 8, "label": [0, 1] * 4})
    with pytest.raises(UserError, match=r"no column image; name it with data\.path_column"):
        load(write(arrow, path, other))
    empty = rows(arrow).set_column(0, "image", arrow.array([{"bytes": None, "path": "gone.png"}] * 8))
    with pytest.raises(UserError, match=r"8 of 8 images cannot be read: set.parquet:0 \(its row has no bytes"):
        load(write(arrow, path, empty))
    with pytest.raises(UserError, match=r"some of its files are named as splits, and extra\.parquet not"):
        write(arrow, tmp_path / "both/train.parquet", rows(arrow))
        write(arrow, tmp_path / "both/extra.parquet", rows(arrow))
        load(tmp_path / "both")


def test_a_column_of_groups_keeps_them_whole(arrow: Any, tmp_path: Path) -> None:
    content = rows(arrow, 24, patient=[i // 4 for i in range(24)])
    dataset = load(write(arrow, tmp_path / "set.parquet", content), group="patient")
    assert dataset.report.groups == 6
    tested = {int(name.rpartition(":")[2]) // 4 for name in dataset.open_test().ids}
    assert tested
    assert not tested & {int(name.rpartition(":")[2]) // 4 for name in dataset.ids}
