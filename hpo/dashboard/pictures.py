"""Pictures of trainings and studies: learning curves, confusion matrices, mistakes, and a study's history.

Matplotlib, imported with the first picture, draws on its Agg canvas without pyplot and its global state. Thumbnails in
the dashboard are 200 pixels wide, so lines are thick and letters large. Colours are those of Okabe and Ito (2008).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hpo.text import METRIC_WORDS, cut

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray
    from optuna.trial import TrialState
    from torch import Tensor

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
INK, GREY, PALE = "#222222", "#767676", "#DDDDDD"

DPI = 100
TITLE, TEXT = 14.0, 12.0  # points
NUMBERS_UP_TO = 20  # classes; with more, the cells are too small for numbers
NAMES_UP_TO = 100  # classes; a side of 12 inches holds as many names of 6 points
LONGEST_NAME = 18  # characters
SHEET, SHEET_COLUMNS = 24, 6  # images on a sheet, and in a row
SHEET_SIDE = 160, 208  # pixels of an enlarged image's side: the aim and the maximum
LOG_FROM = 50.0  # a loss that falls by more than this factor gets a logarithmic axis

_DASHES: tuple[tuple[str, Any], ...] = (
    *((ORANGE, (0, (7, 2))), (GREEN, (0, (7, 2, 1.5, 2))), (PINK, (0, (1.5, 1.5)))),
    *((YELLOW, (0, (3, 1.5))), (INK, (0, (7, 2, 1.5, 2, 1.5, 2)))),
)
"""Colour and dashes of each baseline's line, told apart in grey too."""
_LABEL_ROOM = 0.13  # of the axes' height, for a name and its value

_LEGEND: dict[str, Any] = {"fontsize": TEXT - 2, "framealpha": 0.85, "edgecolor": "none", "labelcolor": INK}


def learning_curves(
    rows: Sequence[Mapping[str, float]], path: Path, *, title: str = "", metric: str = "accuracy"
) -> None:
    """Draw losses (left) and validation scores (right), if there are any, over epochs, as PNG.

    Folds are faint lines, below the bold line of their mean. Balanced accuracy is drawn if it is the objective.

    Args:
        rows: Lines of a `metrics.jsonl`.
        metric: The study's objective.
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
    if rates := _series(_folds(rows)[0], "lr"):
        # Only the shape, scaled to the panel's height, since a second axis would clutter the panel.
        peak = max(rates.values())
        heights = [0.97 * rate / (peak or 1.0) for rate in rates.values()]
        style: dict[str, Any] = {"color": GREY, "linewidth": 1.3, "transform": axes.get_xaxis_transform()}
        axes.plot(list(rates), heights, ":", label=f"lr, up to {peak:.2g}", **style)
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
    _decorate(axes, f"validation: accuracy {fmean(last):.4f}{of}")
    axes.legend(loc="lower right", **_LEGEND)


def confusion_matrix(confusion: ArrayLike, classes: Sequence[str], path: Path, *, title: str = "") -> None:
    """Draw a confusion matrix as PNG: correct predictions are blue, mistakes orange.

    Args:
        confusion: Counts (K, K) on the CPU, rows are true classes.
        classes: K names. Cells have numbers up to 20 classes, sides have names up to 100.
    """
    import numpy as np

    counts = np.asarray(confusion)
    size = len(classes)
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
    _draw_cells(axes, counts, cell, letters)
    # Texts instead of tick labels, which take a second for 100 classes.
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
    axes.set_title(f"{int(counts.trace()):,} of {total:,} correct" if total else "no images", fontsize=TEXT, color=INK)
    _save(figure, path, title)


def _draw_cells(axes: Axes, counts: NDArray[np.int64], cell: float, letters: float) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    _, depth = confusion_depth(counts)
    full = np.where(np.eye(len(counts), dtype=bool)[..., None], to_rgb(BLUE), to_rgb(ORANGE))
    axes.imshow(1 - depth[..., None] * (1 - full), interpolation="nearest")
    if len(counts) > NUMBERS_UP_TO:
        return
    fitting = min(letters, 0.85 * cell * 72 / (0.64 * len(str(counts.max()))))
    for row, column in np.argwhere(counts):
        color = "white" if depth[row, column] > 0.6 else INK
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=fitting)


def confusion_depth(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of the true class (K, K), and the depth of each cell's colour, from 0, white, to 1, full.

    Mistakes darken with the square root of their share, so that one in forty is visible.
    """
    import numpy as np

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # a class without images has a row of zeros
    return shares, np.where(np.eye(len(counts), dtype=bool), shares, np.sqrt(shares))


def confident_errors(
    images: Tensor | NDArray[np.uint8],
    errors: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw the first 24 images with their true class, predicted class and confidence, as PNG.

    Args:
        images: Pixels (n, C, H, W) uint8, C 1 or 3, one image for each error.
        errors: `true` and `predicted`, each a class name or an index into `classes`, and `confidence` in [0, 1].
        classes: K names.

    Raises:
        ValueError: There are fewer errors than images.
    """
    tiles = [enlarged(image, *SHEET_SIDE) for image in images[:SHEET]]
    if len(errors) < len(tiles):
        raise ValueError(f"{len(tiles)} images and {len(errors)} errors")
    if not tiles:
        _save(_note("no mistakes"), path, title)
        return
    captions = [_caption(error, classes) for error in errors[: len(tiles)]]
    height, width = (side / DPI for side in tiles[0].shape[:2])  # inches, as all lengths here
    room = 72 / 0.58 * (width + 0.1)  # sum of the letters' sizes in a line, in points
    one_line = max(len(f"{true} {guess}") for true, guess in captions) * TEXT < room
    lines = [f"{true} {guess}" if one_line else f"{true}\n{guess}" for true, guess in captions]
    letters = min(TEXT, room / max(len(part) for line in lines for part in line.split("\n")))

    columns = min(SHEET_COLUMNS, len(tiles))
    across, down, head = width + 0.16, height + (0.34 if one_line else 0.54), 0.62 if title else 0.34
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
    key = "mistakes by confidence: true → predicted, confidence"
    figure.text(0.5, 1 - (head - 0.28) / whole[1], key, ha="center", va="top", fontsize=TEXT - 1, color=GREY)
    _save(figure, path, title)


def enlarged(image: Tensor | NDArray[np.uint8], aim: int, most: int) -> NDArray[np.uint8]:
    """Resize (C, H, W) uint8 to (h, w, C): the longer side has about `aim` pixels and at most `most`.

    Small images are enlarged by a whole factor, pixel by pixel.
    """
    import numpy as np
    from PIL import Image

    pixels = np.moveaxis(np.asarray(image), 0, -1)
    side = max(pixels.shape[:2])
    if side > most:
        small = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
        small.thumbnail((most, most))
        return np.atleast_3d(np.array(small))
    factor = max(1, min(round(aim / side), most // side))
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _caption(error: Mapping[str, Any], classes: Sequence[str]) -> tuple[str, str]:
    """Format the true class and the prediction: ("cat", "→ dog, 98 %")."""
    true, predicted = (
        _one_line(classes[named] if isinstance(named, int) else named) for named in (error["true"], error["predicted"])
    )
    percent = 100 * error["confidence"]
    surely = "> 99 %" if percent > 99.5 else f"{percent:.0f} %"  # never 100 % for a mistake
    return true, f"→ {predicted}, {surely}"


def _note(words: str) -> Figure:
    figure = _figure(4.4, 1.1)
    figure.text(0.5, 0.3, words, ha="center", va="center", fontsize=TEXT, color=INK)
    return figure


def study_overview(
    study: optuna.Study, path: Path, *, metric: str, baselines: Mapping[str, float] | None = None, title: str = ""
) -> None:
    """Draw the value of each trial, the best so far, and the baselines' values by name, as PNG."""
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    complete, pruned = _values(study, TrialState.COMPLETE), _values(study, TrialState.PRUNED)
    better = min if study.direction == StudyDirection.MINIMIZE else max
    best = list(accumulate(complete.values(), better))
    lines = dict(baselines or {})
    last = max([*complete, *pruned], default=0)

    figure = _figure(8.4, 4.8)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.085, right=0.76 if lines else 0.985, bottom=0.2, top=0.87)
    if best:
        axes.step([*complete, last], [*best, best[-1]], where="post", color=BLUE, linewidth=2.4, label="best so far")
        label = f"complete ({len(complete)})"
        axes.scatter(
            list(complete), list(complete.values()), s=36, color=SKY, edgecolors="white", label=label, zorder=3
        )
    # The axis fits the complete trials; pruned trials outside it are drawn at the edge.
    low, high = _focus([*complete.values(), *lines.values()] or [*pruned.values(), 0.0])
    if pruned:
        heights = [min(max(value, low), high) for value in pruned.values()]
        style: dict[str, Any] = {"s": 32, "marker": "x", "color": GREY, "linewidths": 1.3, "clip_on": False}
        axes.scatter(list(pruned), heights, label=f"pruned ({len(pruned)})", **style)
    axes.set_ylim(low, high)
    _over(axes, "trial", 0, last)
    _draw_baselines(axes, lines)
    words = METRIC_WORDS.get(metric, metric)
    _decorate(axes, f"validation {words}" + (f": best {best[-1]:.4f}" if best else ""))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.01), columnspacing=1.2, ncols=3, **_LEGEND)
    _save(figure, path, title)


def _draw_baselines(axes: Axes, values: Mapping[str, float]) -> None:
    """Draw a horizontal line for each value, with its name at the right end; close names are moved apart."""
    low, high = axes.get_ylim()
    top = 1.0
    ranked = sorted(values.items(), key=lambda item: -item[1])
    for number, ((name, value), (color, dashes)) in enumerate(zip(ranked, cycle(_DASHES), strict=False)):
        axes.axhline(value, color=color, linewidth=1.8, linestyle=dashes, zorder=1)
        height = max(min((value - low) / (high - low), top), _LABEL_ROOM * (len(ranked) - number - 1))
        top = height - _LABEL_ROOM
        axes.annotate(
            f"{_plain(_ending(name.removeprefix('recipe ')))}\n{value:.4f}",
            xy=(1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=TEXT - 2,
            color=INK,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 1.4,
                "linestyle": dashes,
                "shrinkA": 0,
                "relpos": (0, 0.5),
            },
        )


def _values(study: optuna.Study, state: TrialState) -> dict[int, float]:
    """The finite values of the trials in a state, by trial number."""
    trials = study.get_trials(deepcopy=False, states=(state,))
    return {t.number: t.value for t in trials if t.value is not None and math.isfinite(t.value)}


def _focus(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or 0.05 * (abs(high) or 1.0)
    return low - room, high + room


# Parts of all pictures ---------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _folds(rows: Sequence[Mapping[str, float]]) -> list[list[Mapping[str, float]]]:
    """The rows of each fold; one list, possibly empty, if there are no folds."""
    numbers = sorted({row.get("fold", 1) for row in rows}) or [1]
    return [[row for row in rows if row.get("fold", 1) == number] for number in numbers]


def _series(rows: Sequence[Mapping[str, float]], key: str) -> dict[float, float]:
    """Epoch -> the value of a column, where it is finite."""
    return {row["epoch"]: row[key] for row in rows if math.isfinite(row.get(key, math.nan))}


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
    """Draw a column of the rows, with dots if there are few. Returns the mean of all folds, as far as all have come."""
    folds = [_series(fold, key) for fold in _folds(rows)]
    for fold in folds if len(folds) > 1 else ():
        axes.plot(list(fold), list(fold.values()), style, color=color, linewidth=1.0, alpha=0.4)
    epochs = [epoch for epoch in folds[0] if all(epoch in fold for fold in folds)]
    values = [fmean(fold[epoch] for fold in folds) for epoch in epochs]
    if values:
        marker = "o" if len(values) < 8 else ""
        axes.plot(epochs, values, style, label=label, color=color, linewidth=width, marker=marker, markersize=5)
    return values


def _over(axes: Axes, name: str, first: float, last: float) -> None:
    """Set the horizontal axis to whole numbers from first to last."""
    from matplotlib.ticker import MaxNLocator

    room = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel(name, fontsize=TEXT, color=INK)


def _decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=TEXT, color=INK)
    axes.grid(visible=True, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT - 1, colors=INK, length=3)
    axes.spines[["right", "top"]].set_visible(False)


def _short(name: str) -> str:
    """A name on one line of at most `LONGEST_NAME` characters, escaped for matplotlib."""
    return _plain(_one_line(name))


def _ending(name: str) -> str:
    """The end of a name, in which those of recipes differ."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _one_line(name: str) -> str:
    return cut(" ".join(name.split()), LONGEST_NAME)


def _plain(text: str) -> str:
    """Escape dollar signs, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path, title: str) -> None:
    """Write the PNG. Letters missing from the font are drawn as boxes, without a warning."""
    if title:
        top = 1 - 0.08 / figure.get_figheight()
        size = min(TITLE, 72 * figure.get_figwidth() / (0.7 * len(title)))
        figure.suptitle(_plain(title), y=top, va="top", fontsize=size, color=INK, fontweight="bold")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        figure.savefig(path, format="png", metadata={"Software": None})
