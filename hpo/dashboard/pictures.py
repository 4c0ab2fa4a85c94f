"""Pictures of trainings and studies, and their place in the dashboard.

Matplotlib's Agg canvas is used without pyplot: no display, no global state, nothing to close. Matplotlib is imported
when the first picture is drawn. The dashboard shows a picture 200 pixels wide before it is opened, so lines are thick,
letters large, and every colour is from the palette of Okabe and Ito (2008), which colour-blind people can tell apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.storage.optuna_access import storage_of, trial_by_number
from hpo.text import METRIC_WORDS

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from hpo.storage.optuna_access import OptunaArtifactStore

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"

DPI = 100
TITLE, TEXT = 14.0, 12.0  # points
NUMBERS_UP_TO = 20  # classes: a cell of more than 20 × 20 is too small for a number
NAMES_UP_TO = 100  # classes: a side of 12 inches holds so many names of 6 points
LONGEST_NAME = 18  # characters
SHEET, SHEET_COLUMNS = 24, 6  # images of a sheet, and of a row of it
SHEET_SIDE = 160, 208  # pixels that a side of an image on a sheet is enlarged to, about, and that it has at most
LOG_FROM = 50.0  # a loss that falls by more than this factor is drawn on a logarithmic axis

_LEGEND: dict[str, Any] = {"fontsize": TEXT - 2, "framealpha": 0.85, "edgecolor": "none", "labelcolor": INK}
_MIME_TYPES = {".png": "image/png"}  # all else that we attach is text


def learning_curves(
    rows: Sequence[Mapping[str, float]], path: Path, *, title: str = "", metric: str = "accuracy"
) -> None:
    """Draws losses on the left and validation scores on the right, over epochs, as PNG.

    Folds lie over each other, each a faint line, and their mean is the line that stands out, as far as all have come.

    Args:
        rows: lines of a `metrics.jsonl`; without validation scores only the training loss is drawn.
        metric: the study's objective; balanced accuracy is drawn where it is the objective.
    """
    scored = any("val_accuracy" in row for row in rows)
    width = 8.4 if scored else 5.6
    figure = _figure(width, 4.6)
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    figure.subplots_adjust(left=0.62 / width, right=1 - 0.12 / width, bottom=0.12, top=0.865, wspace=0.2)
    _draw_losses(panels[0], rows)
    if scored:
        _draw_scores(panels[1], rows, metric)
    epochs = [row["epoch"] for row in rows]
    for axes in panels:
        _over(axes, "epoch", min(epochs, default=1), max(epochs, default=1))
    _save(figure, path, title)


def _draw_losses(axes: Axes, rows: Sequence[Mapping[str, float]]) -> None:
    drawn = [_line(axes, rows, "train_loss", "training", ORANGE), _line(axes, rows, "val_loss", "validation", BLUE)]
    values = [value for series in drawn for value in series]
    if values and min(values) > 0 and max(values) > LOG_FROM * min(values):
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    epochs, rates = _series(_folds(rows)[0], "lr")
    if rates:
        # Its shape alone, in the panel's height: a second scale would be one too many.
        peak = max(rates) or 1.0
        heights = [0.97 * rate / peak for rate in rates]
        label = f"lr, up to {max(rates):.2g}"
        axes.plot(epochs, heights, ":", color=GREY, linewidth=1.3, label=label, transform=axes.get_xaxis_transform())
    _decorate(axes, "loss")
    if axes.lines:
        axes.legend(loc="upper right", **_LEGEND)


def _draw_scores(axes: Axes, rows: Sequence[Mapping[str, float]], metric: str) -> None:
    _line(axes, rows, "val_accuracy", "accuracy", BLUE)
    _line(axes, rows, "val_macro_f1", "macro-F1", PINK, style="--", width=1.8)
    if metric == "balanced_accuracy":
        _line(axes, rows, "val_balanced_accuracy", "balanced accuracy", YELLOW, style="-.", width=1.8)
    if any("averaged_val_accuracy" in row for row in rows):
        _line(axes, rows, "raw_val_accuracy", "accuracy, raw weights", SKY, width=1.3)
        _line(axes, rows, "averaged_val_accuracy", "accuracy, averaged weights", GREEN, width=1.3)
    folds = _folds(rows)
    last = [[row["val_accuracy"] for row in fold if "val_accuracy" in row][-1] for fold in folds]
    of = "" if len(folds) == 1 else f" ({len(folds)} folds)"
    _decorate(axes, f"validation: accuracy {sum(last) / len(last):.4f}{of}")
    axes.legend(loc="lower right", **_LEGEND)


def confusion_matrix(confusion: Tensor, classes: Sequence[str], path: Path, *, title: str = "") -> None:
    """Draws a confusion matrix as PNG: numbers are counts, colours are shares of the true class.

    What is right is blue. Mistakes are orange, and grow dark with the root of their share, so that one in forty shows.

    Args:
        confusion: (K, K) int64 counts, rows are true classes.
        classes: K names; numbers stand in the cells up to 20 classes, and names at the sides up to 100.
    """
    import numpy as np
    from matplotlib.colors import to_rgb

    counts = confusion.cpu().numpy()
    size = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # a class without images has a row of zeros
    right = np.eye(size, dtype=bool)
    depth = np.where(right, shares, np.sqrt(shares))[..., None]  # (K, K, 1): 0 is white, 1 the full colour
    colors = 1 - depth * (1 - np.where(right[..., None], to_rgb(BLUE), to_rgb(ORANGE)))

    cell = min(max(2.8 / size, 0.45), 12 / size)  # inches, as all lengths here
    letters = min(TEXT, 0.72 * 72 * cell)  # points
    names = [_short(name) for name in classes] if size <= NAMES_UP_TO else []
    longest = max(map(len, names), default=0)
    upright = longest * 0.6 * letters / 72 > cell
    beside = 0.45 + longest * 0.62 * letters / 72
    below = 0.4 + (beside - 0.45 if upright else 0.22 if names else 0)
    matrix = cell * size
    width, height = max(beside + matrix + 0.15, 4.4), below + matrix + 0.62
    figure = _figure(width, height)
    left = beside + (width - beside - matrix - 0.15) / 2
    axes = figure.add_axes((left / width, below / height, matrix / width, matrix / height))
    axes.imshow(colors, interpolation="nearest")
    if size <= NUMBERS_UP_TO:
        digits = len(str(counts.max()))
        fitting = min(letters, 0.85 * cell * 72 / (0.64 * digits))
        for row, column in np.argwhere(counts):
            dark = depth[row, column, 0] > 0.6
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                color="white" if dark else INK,
                fontsize=fitting,
            )
    # Texts in place of ticks: a hundred of those take a second.
    axes.set_xticks([])
    axes.set_yticks([])
    style: dict[str, Any] = {"fontsize": letters, "color": INK}
    turn: dict[str, Any] = {"rotation": 90} if upright else {}
    for place, name in enumerate(names):
        axes.text(place, size - 0.5 + 0.06 / cell, name, ha="center", va="top", **style, **turn)
        axes.text(-0.5 - 0.06 / cell, place, name, ha="right", va="center_baseline", **style)
    axes.spines[:].set_color(PALE)
    figure.text((left + matrix / 2) / width, 0.08 / height, "predicted", ha="center", fontsize=TEXT, color=INK)
    figure.text(0.08 / width, (below + matrix / 2) / height, "true", va="center", rotation=90, fontsize=TEXT, color=INK)
    total = int(counts.sum())
    axes.set_title(f"{int(counts.trace()):,} of {total:,} right" if total else "no images", fontsize=TEXT, color=INK)
    _save(figure, path, title)


def confident_errors(
    images: Tensor | NDArray[np.uint8],
    errors: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draws the first 24 images under what they are, what they were taken for, and how surely, as PNG.

    Small images are enlarged pixel by pixel, by a whole factor: nothing is drawn that the network did not see.

    Args:
        images: (n, C, H, W) uint8, C 1 or 3, one for each of the errors.
        errors: `true` and `predicted`, each a class's name or its position in `classes`, and `confidence`, in [0, 1].
        classes: K names.
    """
    tiles = [_tile(image) for image in images[:SHEET]]
    if len(errors) < len(tiles):
        raise ValueError(f"{len(tiles)} images and {len(errors)} errors")
    if not tiles:
        _save(_note("no mistakes"), path, title)
        return
    captions = [_caption(error, classes) for error in errors[: len(tiles)]]
    height, width = (side / DPI for side in tiles[0].shape[:2])  # inches, as all lengths here
    room = 72 / 0.58 * (width + 0.1)  # points of letters beside each other
    one_line = max(len(f"{true} {guess}") for true, guess in captions) * TEXT < room
    lines = [f"{true} {guess}" if one_line else f"{true}\n{guess}" for true, guess in captions]
    letters = min(TEXT, room / max(len(part) for line in lines for part in line.split("\n")))

    columns = min(SHEET_COLUMNS, len(tiles))
    across, down, head = width + 0.16, height + (0.34 if one_line else 0.54), 0.62
    whole = max(columns * across + 0.16, 4.4), head + math.ceil(len(tiles) / columns) * down + 0.04
    margin = (whole[0] - columns * across + 0.16) / 2
    figure = _figure(*whole)
    for place, (tile, line) in enumerate(zip(tiles, lines, strict=True)):
        left = margin + place % columns * across
        bottom = whole[1] - head - place // columns * down - height
        axes = figure.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
        axes.imshow(tile, interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        beneath = (left + width / 2) / whole[0], (bottom - 0.05) / whole[1]
        figure.text(*beneath, _plain(line), ha="center", va="top", fontsize=letters, color=INK)
    key = "mistakes, the surest first: true → predicted, how sure"
    figure.text(0.5, 1 - 0.34 / whole[1], key, ha="center", va="top", fontsize=TEXT - 1, color=GREY)
    _save(figure, path, title)


def _tile(image: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(C, H, W) as an image of a sheet, (h, w) or (h, w, 3): enlarged by a whole factor, or reduced."""
    import numpy as np
    from PIL import Image

    pixels = np.moveaxis(np.asarray(image), 0, -1)
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    side = max(pixels.shape[:2])
    if side > SHEET_SIDE[1]:
        small = Image.fromarray(np.ascontiguousarray(pixels))
        small.thumbnail((SHEET_SIDE[1], SHEET_SIDE[1]))
        return np.asarray(small)
    factor = max(1, min(round(SHEET_SIDE[0] / side), SHEET_SIDE[1] // side))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _caption(error: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, str]:
    """What it is, and what it was taken for: ("cat", "→ dog, 98 %")."""
    true, predicted = (
        _one_line(classes[named] if isinstance(named, int) else named) for named in (error["true"], error["predicted"])
    )
    percent = 100 * error["confidence"]
    surely = "> 99 %" if percent > 99.5 else f"{percent:.0f} %"  # a mistake is never made with certainty
    return true, f"→ {predicted}, {surely}"


def _note(words: str) -> Figure:
    """A small figure of a few words, where there is nothing to draw."""
    figure = _figure(4.4, 1.1)
    figure.text(0.5, 0.3, words, ha="center", va="center", fontsize=TEXT, color=INK)
    return figure


def study_overview(
    study: optuna.Study, path: Path, *, metric: str, baselines: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """Draws every trial's value, the best so far, and what was to be beaten, as PNG.

    Args:
        metric: the name of the objective.
        baselines: values to draw as horizontal lines: the base, the recipes.
    """
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    values = {
        state: {
            trial.number: trial.value
            for trial in study.get_trials(deepcopy=False, states=(state,))
            if trial.value is not None and math.isfinite(trial.value)
        }
        for state in (TrialState.COMPLETE, TrialState.PRUNED)
    }
    complete, pruned = values[TrialState.COMPLETE], values[TrialState.PRUNED]
    better = min if study.direction == StudyDirection.MINIMIZE else max
    best = list(accumulate(complete.values(), better))
    lines = dict(baselines or {})
    last = max([*complete, *pruned], default=0)

    figure = _figure(8.4, 4.8)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.985, bottom=0.2, top=0.87)
    for (name, value), color in zip(lines.items(), cycle((ORANGE, GREEN, PINK, YELLOW)), strict=False):
        axes.axhline(value, color=color, linewidth=1.8, linestyle="--", label=f"{_short(name)} {value:.4f}", zorder=1)
    if best:
        axes.step([*complete, last], [*best, best[-1]], where="post", color=BLUE, linewidth=2.4, label="best so far")
        label = f"complete ({len(complete)})"
        axes.scatter(*_columns(complete), s=36, color=SKY, edgecolors="white", label=label, zorder=3)
    # Pruned trials must not flatten what matters: those far below (or above) stand at the edge.
    low, high = _focus([*complete.values(), *lines.values()] or [*pruned.values(), 0.0])
    if pruned:
        numbers, heights = _columns(pruned)
        heights = [min(max(value, low), high) for value in heights]
        axes.scatter(
            numbers,
            heights,
            s=32,
            marker="x",
            color=GREY,
            linewidths=1.3,
            clip_on=False,
            label=f"pruned ({len(pruned)})",
        )
    axes.set_ylim(low, high)
    _over(axes, "trial", 0, last)
    words = METRIC_WORDS.get(metric, metric)
    _decorate(axes, f"validation {words}" + (f": best {best[-1]:.4f}" if best else ""))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(
            loc="lower center", bbox_to_anchor=(0.5, 0.01), columnspacing=1.2, ncols=min(3 + len(lines), 5), **_LEGEND
        )
    _save(figure, path, title)


def _columns(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _focus(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with some room around the values."""
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.05 * (abs(high) or 1.0)
    return low - room, high + room


def attach_artifacts(study: optuna.Study, number: int, paths: Sequence[Path], store: OptunaArtifactStore) -> None:
    """Puts files into the artifact store, so that the dashboard shows them on the trial's page.

    Pictures are shown there; text (the configuration) is offered with its name. The trial must not be finished yet:
    Optuna's storages change nothing in a finished one.

    Args:
        number: the trial's.
        store: the one that the dashboard reads, `Study.artifact_store`.
    """
    from optuna.artifacts import upload_artifact

    trial = trial_by_number(study, number)
    for path in paths:
        upload_artifact(
            artifact_store=store,
            file_path=str(path),
            study_or_trial=trial,
            storage=storage_of(study),
            mimetype=_MIME_TYPES.get(path.suffix, "text/plain"),
        )


# What all pictures share --------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _folds(rows: Sequence[Mapping[str, float]]) -> list[list[Mapping[str, float]]]:
    """The rows of each fold; those without folds, and no rows at all, are one."""
    numbers = sorted({row.get("fold", 1) for row in rows}) or [1]
    return [[row for row in rows if row.get("fold", 1) == number] for number in numbers]


def _mean_series(folds: Sequence[Sequence[Mapping[str, float]]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and the folds' mean, where every fold has a finite value."""
    each = [dict(zip(*_series(fold, key), strict=True)) for fold in folds]
    epochs = [epoch for epoch in each[0] if all(epoch in fold for fold in each)]
    return epochs, [sum(fold[epoch] for fold in each) / len(each) for epoch in epochs]


def _series(rows: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values where the rows have a finite one."""
    found = [(row["epoch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, float]],
    key: str,
    label: str,
    color: str,
    *,
    width: float = 2.4,
    style: str = "-",
) -> list[float]:
    """Draws a column of the rows, with dots where there are too few for a line; returns its values."""
    folds = _folds(rows)
    for fold in folds if len(folds) > 1 else ():
        axes.plot(*_series(fold, key), style, color=color, linewidth=1.0, alpha=0.4)
    epochs, values = _mean_series(folds, key)
    if values:
        marker = "o" if len(values) < 8 else ""
        axes.plot(epochs, values, style, label=label, color=color, linewidth=width, marker=marker, markersize=5)
    return values


def _over(axes: Axes, what: str, first: float, last: float) -> None:
    """The horizontal axis of whole numbers from first to last."""
    from matplotlib.ticker import MaxNLocator

    room = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel(what, fontsize=TEXT, color=INK)


def _decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=TEXT, color=INK)
    axes.grid(visible=True, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT - 1, colors=INK, length=3)
    axes.spines[["right", "top"]].set_visible(False)


def _short(name: str) -> str:
    """A name on one line, of at most `LONGEST_NAME` characters, as matplotlib takes it."""
    return _plain(_one_line(name))


def _one_line(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _plain(text: str) -> str:
    """Keeps matplotlib from taking dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path, title: str) -> None:
    """Writes the PNG. A letter that the font lacks is a box, and no warning."""
    if title:
        top = 1 - 0.08 / figure.get_figheight()
        size = min(TITLE, 72 * figure.get_figwidth() / (0.7 * len(title)))
        figure.suptitle(_plain(title), y=top, va="top", fontsize=size, color=INK, fontweight="bold")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        figure.savefig(path, format="png", metadata={"Software": None})
