"""The table of layouts: what each way of storing images is read as, or the words of its error.

Run as a script with a layout's name, a folder and a cache folder, it prints what that layout is read as.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config import DataConfig
from core.data import Dataset, load_dataset

Content = bytes | str


def picture(path: str, kind: str = "PNG") -> bytes:
    """An image of 8×8 pixels that depends on its path."""
    pixels = np.random.default_rng(zlib.crc32(path.encode())).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def images(*folders: str, n: int = 4, suffix: str = ".png", start: int = 0) -> dict[str, Content]:
    """`n` images in each folder: `cat/0.png`, `cat/1.png`, …"""
    paths = [f"{folder}/{i}{suffix}" if folder else f"{i}{suffix}" for folder in folders for i in range(start, n)]
    return {path: picture(path) for path in paths}


def table(header: str, *rows: str) -> str:
    return "\n".join([header, *rows]) + "\n"


@dataclass(frozen=True)
class Layout:
    """Files, how they are read, and what is expected."""

    files: Mapping[str, Content]
    classes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """Images by the split that the source gives."""
    config: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""
    """The file or folder in it that is given; empty is the whole."""
    unlabelled: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    """Part of one of the notes."""
    error: str = ""
    """Part of the error; empty if it is read."""
    skip_broken: bool = False

    def write(self, folder: Path, *, zipped: bool) -> Path:
        """Write the files, and return the path to give."""
        if zipped:
            with zipfile.ZipFile(folder / "set.zip", "w") as archive:
                for path, content in self.files.items():
                    archive.writestr(path, content)
            return folder / "set.zip"
        for path, content in self.files.items():
            file = folder / "set" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if path.endswith("/"):
                file.mkdir(exist_ok=True)
            else:
                file.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / "set" / self.at

    @property
    def is_zipped_too(self) -> bool:
        """Whether the same is expected of the files in a .zip."""
        return not self.at

    def load(self, path: Path, cache: Path | None = None) -> Dataset:
        return load_dataset(DataConfig(**self.config), data_path=path, cache_dir=cache, skip_broken=self.skip_broken)


def counts_of(dataset: Dataset) -> dict[str, int]:
    """Images by the split that the source gives."""
    found: Counter[str] = Counter()
    for splits in dataset.report.counts.values():
        found.update(splits)
    return dict(found)


TWO = ("cat", "dog")
SPLIT = images("train/cat", "train/dog") | images("test/cat", "test/dog", n=2)
KAGGLE = images("train_images", "test_images", n=8) | {
    "train.csv": table("id_code,diagnosis,age", *(f"{i},{TWO[i % 2]},{i}" for i in range(8))),
    "test.csv": table("id_code", *map(str, range(8))),
    "sample_submission.csv": table("id_code,diagnosis", *(f"{i},cat" for i in range(8))),
}
"""The layout of a competition: the same ids in both folders."""


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def noise(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def rows(*columns: Iterable[Any], separator: str = ",") -> list[str]:
    return [separator.join(map(str, cells)) for cells in zip(*columns, strict=True)]


CATS_AND_DOGS = [TWO[i % 2] for i in range(8)]
EIGHT = images("", n=8)
NAMES = [f"{i}.png" for i in range(8)]
PIXELS = ",".join(f"pixel{i}" for i in range(16))


def pixel_rows(labels: Iterable[str], seed: int = 0) -> list[str]:
    values = np.random.default_rng(seed).integers(0, 256, (100, 16))
    return [",".join([label, *map(str, row)]) for label, row in zip(labels, values, strict=False)]


def zip_of(files: Mapping[str, Content]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return buffer.getvalue()


FOLDERS = {
    "class folders": Layout(images(*TWO), TWO, {"train": 8}),
    "train and test": Layout(SPLIT, TWO, {"train": 8, "test": 4}),
    "train, val and test": Layout(SPLIT | images("val/cat", "val/dog", n=3), TWO, {"train": 8, "val": 6, "test": 4}),
    "valid, as Roboflow names it": Layout(SPLIT | images("valid/cat", n=3), TWO, {"train": 8, "val": 3, "test": 4}),
    "Training and Testing": Layout(
        images("Training/glioma", "Training/no_tumor") | images("Testing/glioma", "Testing/no_tumor", n=2),
        ("glioma", "no_tumor"),
        {"train": 8, "test": 4},
    ),
    "splits in themselves": Layout(
        images("training_set/training_set/cats", "training_set/training_set/dogs")
        | images("test_set/test_set/cats", "test_set/test_set/dogs", n=2),
        ("cats", "dogs"),
        {"train": 8, "test": 4},
    ),
    "seg_train, seg_test and seg_pred": Layout(
        images("seg_train/seg_train/sea", "seg_train/seg_train/street")
        | images("seg_test/seg_test/sea", n=2)
        | images("seg_test/seg_test/street", n=2)
        | images("seg_pred/seg_pred", n=5),
        ("sea", "street"),
        {"train": 8, "test": 4},
        left_out={"images in seg_pred": 5},
    ),
    "train_images and test_images with classes": Layout(
        images("train_images/cat", "train_images/dog") | images("test_images/cat", "test_images/dog", n=2),
        TWO,
        {"train": 8, "test": 4},
    ),
    "train2017 and val2017": Layout(
        images("train2017/cat", "train2017/dog") | images("val2017/cat", n=2), TWO, {"train": 8, "val": 2}
    ),
    "folders around everything": Layout(
        {f"archive/photos/{path}": content for path, content in SPLIT.items()}, TWO, {"train": 8, "test": 4}
    ),
    "a folder around everything with two split words": Layout(
        images("pets_train_test/cat", "pets_train_test/dog"), TWO, {"train": 8}
    ),
    "splits inside classes": Layout(
        images("cat/train", "dog/train") | images("cat/test", "dog/test", n=2), TWO, {"train": 8, "test": 4}
    ),
    "splits and classes inside folders": Layout(
        images("a/train/cat", "a/train/dog", "b/train/cat"),
        error="its folders a, b have splits and class folders of their own; give one of them",
    ),
    "an unlabelled test folder": Layout(
        images("train/cat", "train/dog") | images("test1", n=5), TWO, {"train": 8}, unlabelled=5
    ),
    "a test folder with a single folder": Layout(
        images("train/cat", "train/dog") | images("test/images", n=5), TWO, {"train": 8}, unlabelled=5
    ),
    "an unlabelled test folder in itself": Layout(
        images("train/cat", "train/dog") | images("test/test", n=5), TWO, {"train": 8}, unlabelled=5
    ),
    "a test folder with one class": Layout(
        images("train/cat", "train/dog") | images("test/cat", n=2), TWO, {"train": 8, "test": 2}
    ),
    "a test folder with classes and loose images": Layout(
        SPLIT | images("test", n=2), error="test/0.png and 1 more images are outside the class folders, others of test"
    ),
    "a class in test that training lacks": Layout(
        SPLIT | images("test/owl"), error="the test set has class owl, missing in the training images"
    ),
    "a class in val that training lacks": Layout(
        SPLIT | images("val/cat", "val/owl"), error="the validation set has class owl, missing in the training images"
    ),
    "two folders for training": Layout(
        images("train_1/cat", "train_2/cat"), error="its folders train_1, train_2 are all named as train splits"
    ),
    "only a test folder": Layout(images("test/cat", "test/dog"), error="a test folder without a train folder"),
    "only a folder with test in its name": Layout(
        images("my_test_photos/cat", "my_test_photos/dog"),
        error="its only folder my_test_photos may be a test split without a folder for training, or the whole set",
    ),
    "a class called train": Layout(
        images("bus", "train"),
        error="its folder train may be a train split or a class beside bus; put the class folders into a folder train, "
        "or, if train is a class, set data.class_depth=1",
    ),
    "a class called train, by the option": Layout(
        images("bus", "train"), ("bus", "train"), {"train": 8}, {"class_depth": 1}
    ),
    "a class called train within train": Layout(
        images("train/bus", "train/train") | images("test/bus", "test/train", n=2),
        ("bus", "train"),
        {"train": 8, "test": 4},
    ),
    "a class called bullet_train": Layout(
        images("bullet_train", "bus", "car"),
        error="its folder bullet_train may be a train split or a class beside bus, car",
    ),
    "class folders beside a test folder": Layout(
        images("cat", "dog", "test/cat"), error="its folder test may be a test split or a class beside cat, dog"
    ),
    "every class holds a folder of the same name": Layout(
        images("n01/images", "n02/images"), ("n01", "n02"), {"train": 8}
    ),
    "groups of classes": Layout(
        images("a/airfield", "a/aquarium", "b/bakery"),
        error="the folder a holds the folders airfield, aquarium: its classes can be read in several ways: "
        "data.class_depth=1 reads 2 classes (a, b); data.class_depth=2 reads 3 classes (airfield, aquarium, bakery)",
    ),
    "groups of classes, by the option": Layout(
        images("a/airfield", "a/aquarium", "b/bakery"),
        ("airfield", "aquarium", "bakery"),
        {"train": 12},
        {"class_depth": 2},
    ),
    "images beside segmentations": Layout(
        images("images/cat", "images/dog", "segmentations/cat", "segmentations/dog"),
        error="data.class_depth=1 reads 2 classes (images, segmentations); "
        "data.class_depth=2 reads 2 classes (cat, dog)",
    ),
    "a set nested in itself": Layout(
        images("daisy", "rose", "flowers/daisy", "flowers/rose"),
        error="the folder flowers holds the folders daisy, rose: its classes can be read in several ways: "
        "data.class_depth=1 reads 3 classes (daisy, flowers, rose); "
        "data.class_depth=last reads 2 classes (daisy, rose)",
    ),
    "subjects inside classes": Layout(
        images("walk/anna", "walk/ben", "run/anna", "run/carl"),
        error="data.class_depth=1 reads 2 classes (run, walk); data.class_depth=2 reads 3 classes (anna, ben, carl)",
    ),
    "subjects inside classes, by the option": Layout(
        images("walk/anna", "walk/ben", "run/anna", "run/carl"), ("run", "walk"), {"train": 16}, {"class_depth": 1}
    ),
    "a folder beside a class's images": Layout(
        images("cat", "cat/masks", "dog"), error="the folder cat holds 4 images and the folder masks"
    ),
    "classes of different depth, by the option": Layout(
        images("pets/cat", "pets/dog", "owl"), ("cat", "dog", "owl"), {"train": 12}, {"class_depth": "last"}
    ),
    "a class folder that is not deep enough": Layout(
        images("pets/cat", "pets/dog", "owl"),
        config={"class_depth": 2},
        error="owl/0.png is in 1 folder below its split",
    ),
    "classes in file names": Layout(
        {f"train/{name}.{i}.png": picture(f"{name}{i}") for name in TWO for i in range(4)},
        error=r"set data.label_from=filename and data.label_pattern='^(.+?)[\W_]*\d*\.\w+$', "
        "which reads 2 classes (cat, dog)",
    ),
    "classes in file names, by the option": Layout(
        {f"train/{name}.{i}.png": picture(f"{name}{i}") for name in TWO for i in range(4)} | images("test1", n=3),
        TWO,
        {"train": 8},
        {"label_from": "filename", "label_pattern": r"^([a-z]+)\."},
        unlabelled=3,
    ),
    "file names in which the pattern finds nothing": Layout(
        images("", n=4) | {"cat.1.png": picture("x")},
        config={"label_from": "filename", "label_pattern": r"^([a-z]+)\."},
        error="finds no class in 4 of 5 train file names: 0.png, 1.png, 2.png, 3.png",
    ),
    "file names without a pattern": Layout(
        EIGHT, config={"label_from": "filename"}, error="data.label_from=filename needs data.label_pattern"
    ),
    "an empty class folder": Layout(images(*TWO) | {"owl/": ""}, error="the class folder owl has no image"),
    "an image outside the classes": Layout(images(*TWO) | images("", n=1), error="0.png is outside the class folders"),
    "one class": Layout(images("cat"), error="a single class, cat"),
    "no images": Layout(
        {"notes.txt": "x", "more.txt": "y", ".hidden": "z"}, error="no images found, but .txt files: 2, hidden files: 1"
    ),
    "an archive in it": Layout({"images.zip": zip_of(images(*TWO))}, error="an archive in it, images.zip; unpack it"),
    "other files": Layout(
        images(*TWO)
        | {"README.md": "x", "cat/labels.txt": "y", "dog/.DS_Store": "z", "model.bin": "x", "LICENSE": "x"},
        TWO,
        {"train": 8},
        left_out={".bin files": 1, ".md files": 1, ".txt files": 1, "files without suffix": 1, "hidden files": 1},
    ),
    "files without a suffix": Layout(
        {path.removesuffix(".png"): content for path, content in images(*TWO).items()}, TWO, {"train": 8}
    ),
    "suffixes in capitals": Layout(images(*TWO, suffix=".PNG"), TWO, {"train": 8}),
    "numbers as classes": Layout(images("10", "9", "100"), ("9", "10", "100"), {"train": 12}),
    "equal numbers as classes": Layout(
        images("1", "01", "2"),
        ("01", "1", "2"),
        {"train": 12},
        note="the classes 01, 1 differ only by case or leading zeros",
    ),
    "classes that differ by case": Layout(
        images("Cat", "cat", "dog"),
        ("Cat", "cat", "dog"),
        {"train": 12},
        note="the classes Cat, cat differ only by case",
    ),
    "a class in two normal forms": Layout(
        images("cafe\u0301", n=4) | images("caf\u00e9", n=8, start=4) | images("tea"),
        ("caf\u00e9", "tea"),
        {"train": 12},
        note="the class caf\u00e9 is written in 2 Unicode normal forms",
    ),
    "a class with control characters": Layout(
        images("cat", "d\x1bog"), error=r"the class folder 'd\x1bog': its label 'd\x1bog' has control characters"
    ),
}

TABLES = {
    "a table of paths": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        at="set.csv",
        note="read from set.csv: the columns path, label",
    ),
    "semicolons, a byte order mark and Windows paths": Layout(
        images("images", n=8)
        | {
            "set.csv": "\ufeff"
            + table(
                "File Name;Class;Remark", *rows((f"images\\{n}" for n in NAMES), CATS_AND_DOGS, NAMES, separator=";")
            )
        },
        TWO,
        {"train": 8},
        at="set.csv",
        note="columns not used: Remark",
    ),
    "tabs": Layout(
        EIGHT | {"set.tsv": table("image\ttarget", *rows(NAMES, CATS_AND_DOGS, separator="\t"))},
        TWO,
        {"train": 8},
        at="set.tsv",
    ),
    "ids without suffix": Layout(
        images("pictures", n=8) | {"set.csv": table("image_id,category", *rows(range(8), CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        at="set.csv",
    ),
    "suffixes in another case": Layout(
        images("", n=8, suffix=".JPG")
        | {"set.csv": table("file,labels", *rows((f"{i}.jpg" for i in range(8)), CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        at="set.csv",
    ),
    "ids of several images": Layout(
        images("a", "b", n=8) | {"set.csv": table("id,label", *rows(range(8), CATS_AND_DOGS))},
        at="set.csv",
        error="set.csv:2: 0 may be a/0.png, b/0.png; name their folder with data.images",
    ),
    "ids of several images, by the option": Layout(
        images("a", "b", n=8) | {"set.csv": table("id,label", *rows(range(8), CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        {"images": "b"},
        at="set.csv",
    ),
    "one column per class": Layout(
        EIGHT | {"set.csv": table("image,cat,dog", *rows(NAMES, [1, 0] * 4, [0, 1] * 4))},
        TWO,
        {"train": 8},
        at="set.csv",
        note="and one column for each of 2 classes",
    ),
    "several classes per image": Layout(
        EIGHT | {"set.csv": table("image,cat,dog", *rows(NAMES, [1, 1] * 4, [0, 1] * 4))},
        at="set.csv",
        error="its columns cat, dog have 0 and 1, but 4 of 8 rows have none or several",
    ),
    "a split column": Layout(
        EIGHT
        | {
            "set.csv": table(
                "filepaths,labels,data set", *rows(NAMES, CATS_AND_DOGS, ["train"] * 4 + ["valid"] * 2 + ["test"] * 2)
            )
        },
        TWO,
        {"train": 4, "val": 2, "test": 2},
        at="set.csv",
        note="the columns filepaths, labels, data set",
    ),
    "two split columns": Layout(
        EIGHT
        | {
            "set.csv": table("path,label,a,b", *rows(NAMES, CATS_AND_DOGS, ["train", "val"] * 4, ["train", "test"] * 4))
        },
        at="set.csv",
        error="its columns a, b all have splits; remove all but one",
    ),
    "an unknown split": Layout(
        EIGHT | {"set.csv": table("path,label,split", *rows(NAMES, CATS_AND_DOGS, ["train"] * 7 + ["later"]))},
        at="set.csv",
        error="set.csv:9: split is 'later'; write train, val or test",
    ),
    "splits by folders": Layout(
        SPLIT | {"set.csv": table("path,label", *rows(SPLIT, (path.split("/")[1] for path in SPLIT)))},
        TWO,
        {"train": 8, "test": 4},
        at="set.csv",
    ),
    "unlabelled test rows": Layout(
        EIGHT
        | {
            "set.csv": table(
                "path,label,split", *rows(NAMES, [*CATS_AND_DOGS[:6], "", ""], ["train"] * 6 + ["test"] * 2)
            )
        },
        TWO,
        {"train": 6},
        at="set.csv",
        unlabelled=2,
    ),
    "two columns of labels": Layout(
        EIGHT | {"set.csv": table("path,label,category", *rows(NAMES, CATS_AND_DOGS, ["pet"] * 8))},
        at="set.csv",
        error="data.label_column=label reads 2 classes (cat, dog); data.label_column=category reads 1 classes (pet)",
    ),
    "columns of other names": Layout(
        EIGHT | {"set.csv": table("photo,breed", *rows(NAMES, CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        {"path_column": "Photo", "label_column": "breed"},
        at="set.csv",
    ),
    "no column of labels": Layout(
        EIGHT | {"set.csv": table("path,breed", *rows(NAMES, CATS_AND_DOGS))},
        at="set.csv",
        error="name it with data.label_column; its header is path, breed",
    ),
    "no column of paths": Layout(
        EIGHT | {"set.csv": table("photo,label", *rows(NAMES, CATS_AND_DOGS))},
        at="set.csv",
        error="name it with data.path_column; its header is photo, label",
    ),
    "labels as floats": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, ["0.0", "10.0", "2.0", "0.0"] * 2))},
        ("0.0", "2.0", "10.0"),
        {"train": 8},
        at="set.csv",
    ),
    "a label that is NaN": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, [*CATS_AND_DOGS[:7], "nan"]))},
        at="set.csv",
        error="set.csv:9: its label is nan, which is no class",
    ),
    "a label that is infinite": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, ["-inf", *CATS_AND_DOGS[:7]]))},
        at="set.csv",
        error="set.csv:2: its label is -inf",
    ),
    "an empty label": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, [*CATS_AND_DOGS[:7], ""]))},
        at="set.csv",
        error="set.csv:9: no label; fill it in or remove the row",
    ),
    "a label with control characters": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, [*CATS_AND_DOGS[:7], "do\x07g"]))},
        at="set.csv",
        error=r"set.csv:9: its label 'do\x07g' has control characters",
    ),
    "repeated and empty rows": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, CATS_AND_DOGS), "0.png,cat", ",", ",")},
        TWO,
        {"train": 8},
        at="set.csv",
        left_out={"empty rows": 2, "repeated rows": 1},
    ),
    "rows that contradict each other": Layout(
        EIGHT | {"set.csv": table("path,label", *rows(NAMES, CATS_AND_DOGS), "0.png,dog")},
        at="set.csv",
        error="set.csv:10: 0.png is in line 2 too, with the class cat instead of dog; remove one of the two",
    ),
    "missing files": Layout(
        EIGHT | {"set.csv": table("path,label", *rows([*NAMES[:5], "x.png", "y.png", "z.png"], CATS_AND_DOGS))},
        at="set.csv",
        error="3 of 8 rows name files that do not exist: x.png, y.png, z.png; fix the paths",
    ),
    "missing files, skipped": Layout(
        EIGHT | {"set.csv": table("path,label", *rows([*NAMES[:7], "z.png"], CATS_AND_DOGS))},
        TWO,
        {"train": 7},
        at="set.csv",
        skip_broken=True,
    ),
    "a row of pixels per image": Layout(
        {"set.csv": table(f"label,{PIXELS}", *pixel_rows("01201201"))},
        ("0", "1", "2"),
        {"train": 8},
        at="set.csv",
        note="images of 4×4 columns of pixels",
    ),
    "rows of pixels with splits": Layout(
        {
            "set.csv": table(
                f"label,Usage,{PIXELS}", *pixel_rows([f"{i % 2},Training" for i in range(6)] + [",Test"] * 2)
            )
        },
        ("0", "1"),
        {"train": 6},
        at="set.csv",
        unlabelled=2,
    ),
    "pixels that are not square": Layout(
        {"set.csv": table("label," + ",".join(f"pixel{i}" for i in range(20)), "0," + ",".join(["1"] * 20))},
        at="set.csv",
        error="its 20 columns of pixels are no square grey image",
    ),
    "pixels in a folder": Layout(
        {"train.csv": table(f"label,{PIXELS}", *pixel_rows("01201201"))},
        error="no images found, but a table in it, train.csv; give that file, unpacked, if it has paths or pixels",
    ),
    "tables of a competition": Layout(
        KAGGLE,
        TWO,
        {"train": 8},
        unlabelled=8,
        left_out={".csv files": 3},
        note="columns not used: age",
    ),
    "a table beside a folder of images": Layout(
        images("images", n=8) | {"labels.csv": table("file_name,label", *rows(NAMES, CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        left_out={".csv files": 1},
    ),
    "metadata.csv beside its images": Layout(
        {f"train/{path}": content for path, content in EIGHT.items()}
        | {"train/metadata.csv": table("file_name,label", *rows(NAMES, CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        left_out={".csv files": 1},
    ),
    "images that no table has": Layout(
        images("images", n=10) | {"labels.csv": table("file_name,label", *rows(NAMES, CATS_AND_DOGS))},
        TWO,
        {"train": 8},
        left_out={".csv files": 1, "images not in labels.csv": 2},
    ),
    "folders and a table that differ": Layout(
        images("part_1", "part_2")
        | {
            "labels.csv": table(
                "path,label", *rows((f"part_{1 + i // 4}/{i % 4}.png" for i in range(8)), CATS_AND_DOGS)
            )
        },
        error="its folders give 2 classes (part_1, part_2), and its table labels.csv 2 (cat, dog); choose by "
        "data.label_from=folder or data.label_from=table",
    ),
    "folders and a table that differ, by the option": Layout(
        images("part_1", "part_2")
        | {
            "labels.csv": table(
                "path,label", *rows((f"part_{1 + i // 4}/{i % 4}.png" for i in range(8)), CATS_AND_DOGS)
            )
        },
        TWO,
        {"train": 8},
        {"label_from": "table"},
        left_out={".csv files": 1},
    ),
    "folders and a table that agree": Layout(
        images(*TWO) | {"labels.csv": table("path,label", *rows(images(*TWO), ["cat"] * 4 + ["dog"] * 4))},
        TWO,
        {"train": 8},
        left_out={".csv files": 1},
    ),
    "two tables of labels": Layout(
        images("images", n=8)
        | {name: table("file_name,label", *rows(NAMES, CATS_AND_DOGS)) for name in ("a.csv", "b.csv")},
        error="its tables a.csv, b.csv may all have the labels; give one of them, or remove the others",
    ),
    "no table where one is asked for": Layout(
        images(*TWO),
        config={"label_from": "table"},
        error="no table in it has labels and the images' paths or ids; it has no .csv",
    ),
    "arrays with a validation part": Layout(
        {
            "set.npz": npz(
                x_train=noise(8),
                y_train=[0, 1] * 4,
                x_val=noise(4, 1),
                y_val=[0, 1] * 2,
                x_test=noise(2, 2),
                y_test=[0, 1],
            )
        },
        ("0", "1"),
        {"train": 8, "val": 4, "test": 2},
        at="set.npz",
    ),
    "arrays with an unlabelled test part": Layout(
        {"set.npz": npz(x_train=noise(8), y_train=[0, 1] * 4, x_test=noise(3, 2), ages=[1, 2])},
        ("0", "1"),
        {"train": 8},
        at="set.npz",
        unlabelled=3,
        note="arrays not used: ages",
    ),
    "arrays with a label that is NaN": Layout(
        {"set.npz": npz(x=noise(8), y=["cat", "dog"] * 3 + ["nan", "cat"])},
        at="set.npz",
        error="image 6: its label is nan, which is no class",
    ),
}

LAYOUTS = FOLDERS | TABLES


def summary(layout: Layout, path: Path, cache: Path) -> dict[str, Any]:
    """What must be the same in every process and on every machine."""
    dataset = layout.load(path, cache)
    return {
        "classes": dataset.classes,
        "fingerprint": dataset.fingerprint,
        "test": dataset.open_test().fingerprint,
        "labels": dataset.labels.tolist(),
        "report": [dataset.report.counts, dataset.report.left_out, dataset.report.notes],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            if not layout.error:
                here = Path(folder) / str(number)
                here.mkdir()
                found[name] = summary(layout, layout.write(here, zipped=False), Path(sys.argv[1]))
    print(json.dumps(found))
