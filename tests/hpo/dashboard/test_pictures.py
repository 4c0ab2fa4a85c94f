"""The pictures: drawn for every kind of run, with the right contents and colours."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from PIL import Image

from hpo.dashboard import pictures
from hpo.dashboard.pictures import confident_errors, confusion_matrix, learning_curves, study_overview

CLASSES = ("cat", "dog")


def history(epochs: int = 20, *, scored: bool = True, averaged: bool = False) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl`."""
    rows: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        loss = 2.3 * math.exp(-epoch / 5)
        accuracy = 1 - 0.9 * math.exp(-epoch / 4)
        row: dict[str, float] = {"epoch": epoch, "step": 10 * epoch, "lr": 0.003, "train_loss": loss}
        if scored:
            row |= {
                "val_loss": loss + 0.1,
                "val_accuracy": accuracy,
                "val_macro_f1": accuracy - 0.02,
                "val_balanced_accuracy": accuracy - 0.01,
                "raw_val_accuracy": accuracy,
            }
        if averaged and epoch > 3:
            row["averaged_val_accuracy"] = accuracy - 0.1
        rows.append(row | {"images_per_s": 1000.0, "elapsed_s": 1.0 * epoch})
    return rows


def folded(*epochs: int) -> list[dict[str, float]]:
    """Lines of a `metrics.jsonl` of folds, each with so many epochs."""
    return [{"fold": fold, **row} for fold, count in enumerate(epochs, 1) for row in history(count)]


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) of the picture."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(path: Path, color: str) -> float:
    """The share of the picture that has this colour, up to a little."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels(path) - wanted).max(-1) < 12).mean())


# Learning curves


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (history(), "accuracy"),
        (history(averaged=True), "balanced_accuracy"),
        (history(1), "nll"),
        (history(2, averaged=True), "accuracy"),
        (history(scored=False), "balanced_accuracy"),
        (history(300), "nll"),
        ([row | {"train_loss": math.nan, "val_loss": math.inf} for row in history(3)], "balanced_accuracy"),
        ([row | {"lr": 0.0} for row in history(3)], "nll"),
        ([], "accuracy"),
        (folded(20, 20, 20), "balanced_accuracy"),
        (folded(20, 7, 1), "nll"),
    ],
    ids=[
        "plain", "averaged", "one epoch", "two epochs", "refit", "long", "diverged", "no rate", "none", "folds",
        "folds of several lengths",
    ],
)  # fmt: skip
def test_curves_are_drawn_for_every_kind_of_history(tmp_path: Path, rows: Any, metric: str) -> None:
    learning_curves(rows, tmp_path / "curves.png", title="trial 3", metric=metric)
    height, width, _ = pixels(tmp_path / "curves.png").shape
    assert height == 460
    assert width == (840 if rows and "val_accuracy" in rows[0] else 560)


def test_training_is_orange_validation_blue_and_the_average_green(tmp_path: Path) -> None:
    learning_curves(history(averaged=True), tmp_path / "all.png")
    learning_curves(history(scored=False), tmp_path / "refit.png")
    for color in (pictures.ORANGE, pictures.BLUE, pictures.PINK, pictures.GREEN):
        assert share_of(tmp_path / "all.png", color) > 0.0005
    assert share_of(tmp_path / "refit.png", pictures.ORANGE) > 0.0005
    assert share_of(tmp_path / "refit.png", pictures.BLUE) == 0


def test_balanced_accuracy_is_drawn_where_it_is_the_objective(tmp_path: Path) -> None:
    for metric in ("accuracy", "balanced_accuracy"):
        learning_curves(history(), tmp_path / f"{metric}.png", metric=metric)
    assert share_of(tmp_path / "accuracy.png", pictures.YELLOW) == 0
    assert share_of(tmp_path / "balanced_accuracy.png", pictures.YELLOW) > 0.0003


def test_folds_alike_are_drawn_as_one_of_them_with_their_mean_above(tmp_path: Path) -> None:
    learning_curves(history(), tmp_path / "one.png")
    learning_curves(folded(20, 20), tmp_path / "two.png")
    for color in (pictures.ORANGE, pictures.BLUE):
        assert share_of(tmp_path / "two.png", color) == pytest.approx(share_of(tmp_path / "one.png", color), rel=0.2)


def test_the_mean_of_folds_goes_as_far_as_all_have_come_and_each_fold_to_its_end(tmp_path: Path) -> None:
    learning_curves(folded(20, 20), tmp_path / "whole.png")
    learning_curves(folded(20, 10), tmp_path / "short.png")
    whole, short = (share_of(tmp_path / name, pictures.ORANGE) for name in ("whole.png", "short.png"))
    assert 0.3 * whole < short < 0.9 * whole
    right = slice(300, 400)  # the second half of the left panel's epochs: a faint line of the longer fold
    halves = [pixels(tmp_path / name)[:, right] for name in ("whole.png", "short.png")]
    faint = [int(((half[..., 0] - half[..., 2]) > 30).sum()) for half in halves]
    assert 0 < faint[1] < faint[0]


# Confusion


@pytest.mark.parametrize("size", [2, 10, 20, 21, 100, 150])
def test_a_confusion_matrix_is_drawn_for_two_classes_and_for_many(tmp_path: Path, size: int) -> None:
    counts = 40 * torch.eye(size, dtype=torch.int64)
    confusion_matrix(counts, [f"class number {i}" for i in range(size)], tmp_path / "c.png", title="validation images")
    assert share_of(tmp_path / "c.png", pictures.BLUE) > 0.5 / size * 0.3  # the diagonal, less the numbers in it
    assert max(pixels(tmp_path / "c.png").shape) <= 1600


def test_colours_are_shares_of_the_true_class_and_mistakes_are_orange(tmp_path: Path) -> None:
    large = torch.tensor([[900, 100], [0, 1000]])
    small = torch.tensor([[9, 1], [0, 1000]])
    wrong = torch.tensor([[0, 10], [10, 0]])
    for name, counts in (("large", large), ("small", small), ("wrong", wrong)):
        confusion_matrix(counts, ["a", "b"], tmp_path / f"{name}.png")
    # A point in the upper right cell, away from its number.
    tint = {}
    for name in ("large", "small", "wrong"):
        picture = pixels(tmp_path / f"{name}.png")
        right, top = np.argwhere(picture[..., 0] < 250)[:, 1].max(), np.argwhere((picture < 250).any(-1))[:, 0].min()
        tint[name] = tuple(picture[top + 95, right - 20])
    assert tint["large"] == tint["small"]
    assert tint["large"][0] > tint["large"][2] + 20  # orange, and to be seen
    assert share_of(tmp_path / "wrong.png", pictures.ORANGE) > 0.1
    assert share_of(tmp_path / "wrong.png", pictures.BLUE) == 0


@pytest.mark.parametrize(
    "counts",
    [torch.zeros(3, 3, dtype=torch.int64), torch.tensor([[5, 0, 0], [0, 0, 0], [1, 0, 123_456]])],
    ids=["no image", "a class without images"],
)
def test_classes_without_images_are_no_division_by_zero(tmp_path: Path, counts: torch.Tensor) -> None:
    confusion_matrix(counts, ["a", "b", "c"], tmp_path / "c.png")
    assert pixels(tmp_path / "c.png").size


def test_odd_names_are_drawn_without_warning_or_mathematics(tmp_path: Path) -> None:
    names = ["$x$ and $y$", r"\frac{", "日本語", "two\nlines", "", "a name that is much longer than its place"]
    confusion_matrix(torch.eye(6, dtype=torch.int64), names, tmp_path / "c.png", title="$\\frac$ " + "long " * 30)
    learning_curves(history(), tmp_path / "l.png", title="50 $ a trial, $2 more")
    assert pixels(tmp_path / "c.png").size


# Mistakes


def mistakes(count: int, true: Any = "cat", predicted: Any = "dog") -> list[dict[str, Any]]:
    """Rows of a report's `errors`."""
    return [{"id": f"{i}", "true": true, "predicted": predicted, "confidence": 1 - i / 50} for i in range(count)]


def chequered(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images of black and white pixels by turns."""
    board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 * 255
    return board.to(torch.uint8).expand(count, channels, height, width)


@pytest.mark.parametrize(
    ("count", "size"),
    [*((count, (1, 8, 8)) for count in (0, 1, 5, 6, 7, 24, 30)), *((count, (3, 96, 96)) for count in (1, 7))],
)
def test_a_sheet_holds_up_to_24_mistakes_in_rows_of_six(tmp_path: Path, count: int, size: tuple[int, ...]) -> None:
    confident_errors(chequered(count, *size), mistakes(count), CLASSES, tmp_path / "e.png", title="test images")
    height, width, _ = pixels(tmp_path / "e.png").shape
    shown = min(count, 24)
    enlarged = 160 if size[1] == 8 else 192
    columns, rows = min(6, shown), math.ceil(shown / 6)
    assert columns * enlarged <= width <= max(columns * enlarged * 1.2, 440)
    assert rows * enlarged <= height <= rows * enlarged * 1.35 + 110


@pytest.mark.parametrize(("side", "drawn"), [(8, 160), (28, 168), (32, 160), (64, 128), (96, 192), (224, 208)])
def test_small_images_are_enlarged_pixel_by_pixel_and_large_ones_reduced(tmp_path: Path, side: int, drawn: int) -> None:
    green, violet = torch.tensor([0, 255, 0]), torch.tensor([255, 0, 255])
    image = green.to(torch.uint8).view(1, 3, 1, 1).repeat(1, 1, side, side)
    image[..., side // 2 :] = violet.view(3, 1, 1)
    confident_errors(image, mistakes(1), CLASSES, tmp_path / "e.png")
    for color in (green, violet):
        where = np.argwhere((pixels(tmp_path / "e.png") == color.numpy()).all(-1))
        tall, wide = np.ptp(where, axis=0) + 1
        assert (tall, wide) == (drawn, pytest.approx(drawn / 2, abs=3 if side > 208 else 0))


@pytest.mark.parametrize(
    ("true", "predicted"),
    [("cat", "dog"), (0, 1), ("a very long name of a class", "$x$"), ("", "two\nlines"), ("日本", "é")],
)
def test_mistakes_are_named_by_classes_or_their_positions(tmp_path: Path, true: Any, predicted: Any) -> None:
    confident_errors(chequered(2, 3, 8, 8), mistakes(2, true, predicted), CLASSES, tmp_path / "e.png")
    names = [CLASSES[name] if isinstance(name, int) else name for name in (true, predicted)]
    confident_errors(chequered(2, 3, 8, 8), mistakes(2, *names), CLASSES, tmp_path / "same.png")
    assert (tmp_path / "e.png").read_bytes() == (tmp_path / "same.png").read_bytes()


@pytest.mark.parametrize(
    ("confidence", "words"), [(0.4, "40 %"), (0.994, "99 %"), (0.996, "> 99 %"), (1.0, "> 99 %"), (0.005, "0 %")]
)
def test_no_mistake_is_called_certain(confidence: float, words: str) -> None:
    error = {"true": "cat", "predicted": "dog", "confidence": confidence}
    assert pictures._caption(error, CLASSES) == ("cat", f"→ dog, {words}")


def test_a_sheet_needs_a_row_for_every_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images and 2 errors"):
        confident_errors(chequered(3, 1, 8, 8), mistakes(2), CLASSES, tmp_path / "e.png")


# Studies


def a_study(direction: str = "maximize") -> optuna.Study:
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(12):
        trial = study.ask()
        value = trial.suggest_float("x", 0.8, 0.9)
        if number % 3 == 2:
            trial.report(value - 0.5, 1)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif number == 4:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
    return study


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_study_is_drawn_with_its_baselines(tmp_path: Path, direction: str) -> None:
    study_overview(a_study(direction), tmp_path / "s.png", metric="accuracy", baselines={"base": 0.84}, title="digits")
    assert share_of(tmp_path / "s.png", pictures.BLUE) > 0.001
    assert share_of(tmp_path / "s.png", pictures.ORANGE) > 0.0005


def test_names_of_close_baselines_are_at_the_ends_of_their_lines_and_do_not_overlap() -> None:
    axes = pictures._figure(8.4, 4.8).subplots()
    axes.set_ylim(0.8, 0.9)
    values = {"the baseline": 0.84, "recipe one": 0.8401, "recipe two": 0.8402, "recipe three": 0.801, "x": 0.8}
    pictures._draw_baselines(axes, values)
    heights = {text.get_text().partition("\n")[0]: text.get_position()[1] for text in axes.texts}
    assert list(heights) == ["two", "one", "the baseline", "three", "x"]
    gaps = np.diff([*heights.values()])
    assert (gaps <= -0.12).all()
    assert 0 <= heights["x"] <= heights["two"] <= 1
    assert all(text.get_position()[0] > 1 for text in axes.texts)  # outside of the axes
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in axes.lines}) == len(values)


def test_a_study_without_a_finished_trial_is_drawn_too(tmp_path: Path) -> None:
    empty = optuna.create_study()
    study_overview(empty, tmp_path / "empty.png", metric="nll")
    trial = empty.ask()
    trial.report(1.0, 1)
    empty.tell(trial, state=optuna.trial.TrialState.PRUNED)
    study_overview(empty, tmp_path / "pruned.png", metric="nll")
    assert pixels(tmp_path / "pruned.png").size


# What holds for all


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    for name in ("one.png", "other.png"):
        learning_curves(history(), tmp_path / name, title="trial 3")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_neither_a_display_nor_pyplot_is_needed_and_matplotlib_only_to_draw(tmp_path: Path) -> None:
    code = """
import sys
import hpo.dashboard.pictures
assert not [name for name in sys.modules if name.startswith(("matplotlib", "optuna", "torch"))]
hpo.dashboard.pictures.learning_curves([{"epoch": 1, "train_loss": 1.0, "lr": 0.1}], sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "l.png")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_trials_pictures_take_at_most_three_tenths_of_a_second_each(tmp_path: Path) -> None:
    """Of processor time, since other work on the machine is not theirs; the best of five."""
    names, counts = [str(digit) for digit in range(10)], 30 * torch.eye(10, dtype=torch.int64) + 1

    def seconds(draw: Any) -> float:
        started = time.process_time()
        draw()
        return time.process_time() - started

    curves = min(seconds(lambda: learning_curves(history(averaged=True), tmp_path / "l.png")) for _ in range(5))
    table = min(seconds(lambda: confusion_matrix(counts, names, tmp_path / "c.png")) for _ in range(5))
    assert curves < 0.3
    assert table < 0.3
