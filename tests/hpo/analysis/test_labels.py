"""Probably wrong labels are found from predictions of networks that were not trained on the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hpo.analysis.labels import mean_probabilities, suspects


def test_planted_wrong_labels_come_first() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 400)
    probabilities = np.full((400, 4), 0.05) + 0.8 * np.eye(4)[true]
    labels = true.copy()
    wrong = rng.choice(400, 20, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4

    order, suggested = suspects(probabilities, labels)

    assert set(order) == set(wrong)
    assert np.array_equal(suggested, true[order])


def test_the_largest_ratio_comes_first() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    probabilities = np.array([
        [0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.18, 0.8, 0.02], [0.02, 0.62, 0.36],
        [0.2, 0.8, 0.0], [0.4, 0.6, 0.0], [0.8, 0.2, 0.0],
    ])  # fmt: skip
    order, suggested = suspects(probabilities, labels)
    assert order.tolist() == [3, 2, 6, 1]  # the difference of the third, 0.62, is larger than that of the fourth, 0.60
    assert suggested.tolist() == [1, 1, 0, 1]


def test_a_label_that_is_excluded_comes_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9], [0.2, 0.8]])
    assert suspects(probabilities, labels)[0].tolist() == [1, 2]


def test_a_class_that_is_hard_to_predict_has_a_threshold_of_its_own() -> None:
    """0.5 is much for a class whose own images reach 0.4, and little for one whose images reach 0.9."""
    labels = np.array([0] * 5 + [1] * 5 + [0, 1])
    easy, hard = [0.9, 0.05, 0.05], [0.35, 0.4, 0.25]
    probabilities = np.array([easy] * 5 + [hard] * 5 + [[0.4, 0.5, 0.1], [0.5, 0.4, 0.1]])
    order, suggested = suspects(probabilities, labels)
    assert (order.tolist(), suggested.tolist()) == ([10], [1])


def test_without_a_contradiction_there_is_no_suspect() -> None:
    order, _ = suspects(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]))
    assert not len(order)


def test_a_class_without_images_is_never_suggested() -> None:
    order, _ = suspects(np.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0]]), np.array([0, 0]))
    assert not len(order)


def test_predictions_are_averaged_over_the_networks_that_validated_an_image(tmp_path: Path) -> None:
    for name, indices, logits in (("a", [0, 2], [[0.0, 0.0], [2.0, 0.0]]), ("b", [2], [[0.0, 2.0]])):
        outputs = {"logits": np.array(logits, dtype=np.float32), "indices": np.array(indices)}
        save_file(outputs, tmp_path / f"{name}.safetensors")

    probabilities, counts = mean_probabilities(sorted(tmp_path.iterdir()), images=3, classes=2)

    assert counts.tolist() == [1, 0, 2]
    assert probabilities == pytest.approx(np.array([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]))
