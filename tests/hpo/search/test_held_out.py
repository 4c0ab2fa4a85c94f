"""The views that a refit tries."""

from __future__ import annotations

import pytest

from core.config import AugmentConfig
from hpo.search.held_out import useful_views


@pytest.mark.parametrize(
    ("changes", "side", "names"),
    [
        ({}, 32, ("flip", "flip_shift")),
        ({"flip": 0.0}, 32, ("shift",)),
        ({"crop_pad_fraction": 0.0}, 32, ("flip",)),
        ({"crop_pad_fraction": 0.02}, 96, ("flip",)),  # crops by 2 pixels, a view shifts by 3
        ({"crop_pad_fraction": 0.03}, 96, ("flip", "flip_shift")),
        ({"crop_pad_fraction": 0.0, "crop_area_min": 0.81}, 96, ("flip", "flip_shift")),  # crops by 5 % of the side
        ({"crop_pad_fraction": 0.0, "crop_area_min": 0.9}, 96, ("flip",)),
        ({"flip": 0.0, "crop_pad_fraction": 0.0}, 32, ()),
    ],
)
def test_only_views_like_the_training_images_are_useful(
    changes: dict[str, float], side: int, names: tuple[str, ...]
) -> None:
    assert useful_views(AugmentConfig(**changes), (side, side)) == names
