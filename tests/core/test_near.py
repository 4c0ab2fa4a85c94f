"""Near-duplicates: copies are found whatever was done to them, different images are not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from core.config import DataConfig
from core.data import Dataset, folds, load_dataset, near, split
from core.data.groups import linked
from core.data.near import MIN_SIDE, near_duplicates, reduced

Pixels = NDArray[np.uint8]


def photographs(count: int, seed: int = 0, side: int = 96) -> list[Pixels]:
    """Random textures (3, side, side) with the spectrum of photographs: amplitudes fall with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
    found = []
    for _ in range(count):
        noise = np.fft.rfft2(rng.normal(size=(3, side, side)), axes=(1, 2)) / frequency**1.5
        image = np.fft.irfft2(noise, (side, side), axes=(1, 2))
        found.append(np.clip(127 + 45 * image / image.std(), 0, 255).astype(np.uint8))
    return found


def jpeg(pixels: Pixels, quality: int = 40) -> Pixels:
    buffer = io.BytesIO()
    _pillow(pixels).save(buffer, "JPEG", quality=quality)
    return _array(Image.open(buffer))


def resized(pixels: Pixels) -> Pixels:
    return _array(_pillow(pixels).resize((56, 56)).resize((96, 96)))


def cropped(pixels: Pixels) -> Pixels:
    return _array(_pillow(pixels).crop((5, 1, 93, 90)).resize((96, 96)))


def shifted(pixels: Pixels) -> Pixels:
    return np.pad(pixels, ((0, 0), (5, 0), (0, 4)), mode="edge")[:, :-5, 4:]


def brighter(pixels: Pixels) -> Pixels:
    return np.clip(pixels * 1.1 + 10.0, 0, 255).astype(np.uint8)


def grey(pixels: Pixels) -> Pixels:
    return pixels.mean(axis=0, keepdims=True).astype(np.uint8)


def _pillow(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.moveaxis(pixels, 0, -1))


def _array(image: Image.Image) -> Pixels:
    return np.moveaxis(np.asarray(image), -1, 0)


def pairs_of(images: list[Pixels]) -> list[list[int]]:
    return near_duplicates(reduced(images, len(images))).tolist()


@pytest.mark.parametrize("change", [jpeg, resized, cropped, shifted, brighter, grey], ids=lambda each: each.__name__)
def test_a_changed_copy_is_found_among_different_images(change: Callable[[Pixels], Pixels]) -> None:
    images = photographs(30)
    copies = [change(image) for image in images[:10]]

    assert pairs_of(images + copies) == [[index, 30 + index] for index in range(10)]


def test_different_images_are_no_near_duplicates() -> None:
    assert pairs_of(photographs(300)) == []


def test_mirrored_images_are_different_ones() -> None:
    images = photographs(5)
    assert pairs_of(images + [image[:, :, ::-1] for image in images]) == []


def test_plain_images_of_one_colour_are_no_near_duplicates() -> None:
    """Identical images are found by their digests; plain ones of different colours have nothing in common."""
    assert pairs_of([np.full((3, 64, 64), level, dtype=np.uint8) for level in (0, 90, 255)]) == []


def test_images_too_small_to_tell_are_not_compared() -> None:
    images = photographs(4, side=MIN_SIDE - 1)
    assert pairs_of(images + images) == []


def test_no_image_and_one_image_have_no_pairs() -> None:
    assert pairs_of([]) == []
    assert pairs_of(photographs(1)) == []


def test_a_copy_of_a_copy_is_linked_with_the_original() -> None:
    pairs = np.array([[1, 4], [4, 5], [2, 3]])
    assert linked(np.arange(6), pairs=pairs).tolist() == [0, 1, 2, 2, 1, 1]


def test_the_result_does_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_ROWS", 5)
    images = photographs(12)
    small = reduced(images + [cropped(image) for image in images], 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = near_duplicates(small)
        assert len(alone) == 12
        torch.set_num_threads(2)
        assert np.array_equal(near_duplicates(small), alone)
    finally:
        torch.set_num_threads(threads)


def test_the_progress_rises_to_the_number_of_images() -> None:
    told: list[tuple[int, int]] = []
    near_duplicates(torch.zeros((1300, 48, 48), dtype=torch.uint8), lambda *now: told.append(now))
    assert len(told) > 1
    assert told == sorted(told)
    assert told[-1] == (1300, 1300)


def test_the_search_leaves_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    pairs_of(photographs(2))
    assert torch.get_num_threads() == threads


def test_pairs_beyond_the_limit_are_counted_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The most similar pairs are still compared."""
    caplog.set_level("INFO")
    images = photographs(6)
    monkeypatch.setattr(near, "_ROWS", 2)
    monkeypatch.setattr(near, "PAIRS_PER_IMAGE", 1)
    found = pairs_of(images + [jpeg(image, 90) for image in images] + [jpeg(image, 30) for image in images])
    assert [0, 6] in found
    assert [0, 12] not in found
    assert "least similar pairs of candidates were not compared" in caplog.text


def test_a_long_search_is_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(near, "LARGE", 3)
    pairs_of(photographs(3))
    assert not caplog.records
    pairs_of(photographs(4))
    assert "comparing 4 images for near-duplicates, once; this takes minutes" in caplog.text


def test_copies_far_apart_in_a_large_set_are_found() -> None:
    """Images are compared in blocks."""
    small = reduced([*photographs(1), *([np.zeros((1, 48, 48), dtype=np.uint8)] * 2600), *photographs(1)], 2602)
    assert near_duplicates(small).tolist() == [[0, 2601]]


# In a data set


def load(folder: Path, **config: Any) -> Dataset:
    return load_dataset(DataConfig(name=str(folder), **config))


def write(folder: Path, classes: dict[str, dict[str, Pixels]]) -> Path:
    """Write images by class and name as PNG files, in folders."""
    for label, images in classes.items():
        (folder / label).mkdir(parents=True)
        for name, pixels in images.items():
            _pillow(pixels).save(folder / label / f"{name}.png")
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Two classes of 20 images and a cropped copy of each: 0 and 0_copy, 1 and 1_copy, …"""
    images = photographs(40)
    parts = {"cat": images[:20], "dog": images[20:]}
    copies = {
        label: {f"{index}{end}": change(image) for index, image in enumerate(part) for end, change in ENDS.items()}
        for label, part in parts.items()
    }
    return write(tmp_path / "set", copies)


ENDS: dict[str, Callable[[Pixels], Pixels]] = {"": np.asarray, "_copy": cropped}


def originals(ids: Iterable[str]) -> set[str]:
    return {name.removesuffix(".png").removesuffix("_copy") for name in ids}


def test_copies_are_on_one_side_of_the_test_cut_the_validation_split_and_all_folds(copied: Path) -> None:
    dataset = load(copied)
    assert dataset.report.near == 80
    assert not originals(dataset.ids) & originals(dataset.open_test().ids)
    for seed in range(3):
        config = DataConfig(split_seed=seed, folds=4)
        for parts in (split(dataset, config), *folds(dataset, config)):
            train, val = ({dataset.ids[int(index)] for index in side} for side in (parts.train, parts.val))
            assert val
            assert not originals(train) & originals(val)


def test_ignored_copies_are_divided_like_other_images(copied: Path) -> None:
    dataset = load(copied, near_duplicates="ignored")
    assert dataset.report.near == 0
    assert originals(dataset.ids) & originals(dataset.open_test().ids)


def test_copies_across_given_splits_are_counted_and_stay_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = photographs(12)
    train = {str(index): image for index, image in enumerate(images[:8])}
    write(tmp_path / "set" / "train", {"cat": dict(list(train.items())[:4]), "dog": dict(list(train.items())[4:])})
    test = {"same": images[0], "crop": cropped(images[1]), "jpeg": jpeg(images[5]), "new": images[8]}
    write(tmp_path / "set" / "test", {"cat": test, "dog": {"other": images[9]}})
    write(tmp_path / "set" / "val", {"cat": {"grey": brighter(images[2])}, "dog": {"another": images[10]}})

    dataset = load(tmp_path / "set")
    report = dataset.report

    assert (len(dataset.images), dataset.n_test, int(dataset.in_val.sum())) == (10, 5, 2)
    assert (report.leaked, report.near_leaked, report.near_leaked_val, report.near) == (1, 2, 1, 6)
    assert "2 test images are near-duplicates of training images" in caplog.text
    assert "1 of the given validation images are near-duplicates" in caplog.text


def test_the_fingerprint_tells_whether_near_duplicates_were_kept_together(copied: Path, tmp_path: Path) -> None:
    classes = {"cat": photographs(8), "dog": photographs(8, seed=1)}
    named = {label: {str(index): image for index, image in enumerate(part)} for label, part in classes.items()}
    different = write(tmp_path / "different", named)
    assert load(copied).fingerprint != load(copied, near_duplicates="ignored").fingerprint
    assert load(different).fingerprint == load(different, near_duplicates="ignored").fingerprint
