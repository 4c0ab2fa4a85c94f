"""Data sets with a name: scikit-learn's digits, and four that torchvision downloads and reads.

Downloads are verified by torchvision's checksums. Existing files that differ from the published ones load with a
warning; pickled files (CIFAR) that differ are first read by an unpickler restricted to arrays.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import BUILTIN_DATA
from core.data.arrays import ArrayPart, ArraySource
from core.data.roles import TEST, TRAIN
from core.data.source import Source, one_line
from core.errors import UserError

logger = logging.getLogger(__name__)

# Seconds without a response after which a download fails; torchvision has no timeout.
DOWNLOAD_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Known:
    """Facts about a built-in data set."""

    images: int
    test_images: int | None  # None if the set has no test images
    size: str
    classes: int
    torch_class: str = ""
    folder: str = ""  # torchvision's folder of the files, under its root
    files: tuple[str, ...] = ()  # Required files in `folder`
    archives: tuple[str, ...] = ()  # Downloaded files at `url`
    url: str = ""
    archive_folder: str = ""  # torchvision's folder of the archives, under its root
    download_bytes: int = 0


# URLs are torchvision's; sizes are those of the files there.
_KNOWN = {
    "digits": _Known(1797, None, "8×8×1", 10),
    "stl10": _Known(
        5000, 8000, "96×96×3", 10, "STL10", "stl10_binary",
        ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"),
        ("stl10_binary.tar.gz",), "http://ai.stanford.edu/~acoates/stl10/", "", 2_640_397_119,
    ),
    "cifar10": _Known(
        50_000, 10_000, "32×32×3", 10, "CIFAR10", "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        ("cifar-10-python.tar.gz",), "https://www.cs.toronto.edu/~kriz/", "", 170_498_071,
    ),
    "cifar100": _Known(
        50_000, 10_000, "32×32×3", 100, "CIFAR100", "cifar-100-python", ("train", "test", "meta"),
        ("cifar-100-python.tar.gz",), "https://www.cs.toronto.edu/~kriz/", "", 169_001_437,
    ),
    "fashion_mnist": _Known(
        60_000, 10_000, "28×28×1", 10, "FashionMNIST", "FashionMNIST/raw",
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "FashionMNIST/raw", 30_878_645,
    ),
}  # fmt: skip

NAMES = BUILTIN_DATA

# Content of STL-10's class_names.txt, which some copies lack.
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@dataclass(frozen=True)
class DatasetInfo:
    """A row of `hpo data list`."""

    name: str
    images: int  # Training and test images
    size: str  # Height × width × channels
    classes: int
    download_bytes: int  # 0 if nothing is downloaded
    path: Path | None  # Where it is searched for; None if it is part of a package
    on_disk: bool


def catalogue(data_root: Path = Path("data")) -> list[DatasetInfo]:
    """List the built-in data sets, and whether they are on disk under `data_root`."""
    return [
        DatasetInfo(
            name=name,
            images=known.images + (known.test_images or 0),
            size=known.size,
            classes=known.classes,
            download_bytes=known.download_bytes,
            path=data_root / known.folder if known.files else None,
            on_disk=_on_disk(known, data_root),
        )
        for name, known in _KNOWN.items()
    ]


def root_at(name: str, path: Path) -> Path | None:
    """Return torchvision's root if the built-in set is at `path` or above, or None for the user's own images."""
    known = _KNOWN[name]
    if not known.files or not path.is_dir():
        return None
    archives = [path / known.archive_folder / archive for archive in known.archives]
    if (path / known.folder).is_dir() or all(archive.is_file() for archive in archives):
        return path
    above = path.resolve()
    if above.as_posix().endswith(f"/{known.folder}") and all((above / file).is_file() for file in known.files):
        return above.parents[known.folder.count("/")]
    return None


def open_builtin(name: str, root: Path, download: bool) -> Source:
    """Open a built-in set, after downloading it to `root` if it is missing and `download` is on.

    Raises:
        UserError: it is not on disk and cannot be downloaded.
    """
    known = _KNOWN[name]
    if not known.files:
        return _Digits()
    if not _on_disk(known, root):
        _fetch(name, known, root, download)
    return _Torchvision(name, known, root)


def _on_disk(known: _Known, root: Path) -> bool:
    return all((root / known.folder / file).is_file() for file in known.files)


def _fetch(name: str, known: _Known, root: Path, download: bool) -> None:
    """Let torchvision download and unpack the set. It reuses complete archives."""
    reason = "and downloading is off"
    if download or _archives_whole(known, root):
        existed = root.exists()
        logger.info("%s: downloading %s to %s", name, _amount(known.download_bytes), root)
        try:
            with _timeout(DOWNLOAD_TIMEOUT_S), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # tarfile extraction filter, Python 3.12+
                _torch_class(known)(root, download=True)
        except (OSError, RuntimeError, RecursionError, EOFError) as error:
            reason = f"and downloading it failed ({one_line(error)})"
            if not existed:
                _remove_empty(root)  # torchvision creates it before downloading
    if _on_disk(known, root):
        return
    raise UserError(
        f"{name} is not in {root / known.folder}, {reason}: download {' '.join(known.archives)} "
        f"({_amount(known.download_bytes)}) from {known.url} to {root / known.archive_folder}, where it is unpacked on "
        "the next run, or try things out with `hpo run digits`, which needs nothing"
    )


def _archives_whole(known: _Known, root: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    kind = _torch_class(known)
    sums = dict(kind.resources) if hasattr(kind, "resources") else {kind.filename: kind.tgz_md5}
    return all(check_integrity(root / known.archive_folder / archive, sums[archive]) for archive in known.archives)


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _torch_class(known: _Known) -> Any:
    import torchvision.datasets

    return getattr(torchvision.datasets, known.torch_class)


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _remove_empty(folder: Path) -> None:
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            inner.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Digits(ArraySource):
    """scikit-learn's copy of the UCI digits: 8×8 counts from 0 to 16 (Alpaydin and Kaynak 1998)."""

    in_memory = True

    def __init__(self) -> None:
        super().__init__("digits", "digits")

    def stamp(self) -> str:
        return "digits"

    def load(self) -> list[ArrayPart]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return [ArrayPart("", images, tuple(str(label) for label in digits.target), TRAIN)]


class _Torchvision(ArraySource):
    def __init__(self, name: str, known: _Known, root: Path) -> None:
        super().__init__(name, f"{name} in {root / known.folder}")
        self._known = known
        self._root = root

    def stamp(self) -> str:
        files = [self._root / self._known.folder / file for file in self._known.files]
        states = [(file, file.stat()) for file in files]
        return "|".join(f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}" for file, state in states)

    def load(self) -> list[ArrayPart]:
        kind = _torch_class(self._known)
        self._check_files(kind)
        parts = []
        for prefix, split in (("train/", TRAIN), ("test/", TEST)):
            which = {"split": split} if self._known.torch_class == "STL10" else {"train": split == TRAIN}
            try:
                loaded = _without_checksums(kind)(self._root, **which)
            except (RuntimeError, ValueError, OSError, EOFError, AssertionError, KeyError, pickle.PickleError) as error:
                raise self._damaged(one_line(error)) from error
            labels = np.asarray(loaded.labels if hasattr(loaded, "labels") else loaded.targets)
            names = tuple(getattr(loaded, "classes", STL10_CLASSES))
            images = np.asarray(loaded.data)
            if images.shape[1] == 3:  # STL-10 is channels first
                images = images.transpose(0, 2, 3, 1)
            if len(images) != len(labels) or labels.max(initial=0) >= len(names):
                raise self._damaged(
                    f"{len(images)} {prefix[:-1]} images and {len(labels)} labels of {len(names)} classes"
                )
            self.classes = names
            parts.append(ArrayPart(prefix, images, tuple(names[label] for label in labels), split))
        return parts

    def _check_files(self, kind: Any) -> None:
        """Warn about files that are not the published ones, and make sure that unpickling them runs no code."""
        from torchvision.datasets.utils import check_integrity

        folder = self._root / self._known.folder
        sums = dict(getattr(kind, "train_list", []) + getattr(kind, "test_list", []))
        if hasattr(kind, "meta"):
            sums[kind.meta["filename"]] = kind.meta["md5"]
        changed = [
            file for file in self._known.files if file in sums and not check_integrity(folder / file, sums[file])
        ]
        if changed:
            logger.warning("%s: not the published files: %s", self.where, ", ".join(changed))
        if hasattr(kind, "meta"):
            for file in changed:
                try:
                    with (folder / file).open("rb") as pickled:
                        _ArrayUnpickler(pickled, encoding="latin1").load()
                except Exception as error:
                    raise self._damaged(f"{file}: {one_line(error)}") from error

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.where}: its files are damaged ({how}); remove that folder and run again")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers only."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no data set needs")
        return super().find_class(module, name)


def _without_checksums(kind: Any) -> Any:
    """Subclass of torchvision's data set that only checks that the labelled files exist.

    STL-10's own check reads 2.6 GB of unlabelled images each time.
    """
    checked = {name: [[file, None] for file, _ in getattr(kind, name)]
               for name in ("train_list", "test_list") if hasattr(kind, name)}  # fmt: skip
    if "train_list" in checked:
        checked["train_list"] = [row for row in checked["train_list"] if not row[0].startswith("unlabeled")]
    meta = {"meta": {**kind.meta, "md5": None}} if hasattr(kind, "meta") else {}
    return type(kind.__name__, (kind,), {**checked, **meta})
