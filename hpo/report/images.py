"""What is mistaken for what, class by class, and the mistakes themselves.

Validation images are judged by the predictions that the winner or the best trial kept (`hpo.analysis.outputs`). What
a refit wrote down of the test images stands beside, and says what it is.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from hpo.analysis.facts import Facts
from hpo.analysis.outputs import Judged, Missing, judged, tested, wanted
from hpo.dashboard.pictures import BLUE, INK, ORANGE, PALE
from hpo.report.page import Section, figure, folded, heading, paragraph, picture, table
from hpo.report.samples import augmented_samples
from hpo.text import count, percent

if TYPE_CHECKING:
    from core.data import Dataset

__all__ = ["augmented_samples", "confident_errors", "confusion", "mistakes", "per_class"]

NUMBERS_UP_TO = 20
"""Classes: a cell of more than 20 × 20 is too small for a number."""
MARKED = 3
"""Classes that are marked as the worst."""
ERRORS = 24
"""Mistakes that are shown."""


# Confusion ---------------------------------------------------------------------------------------------------------


def confusion(facts: Facts) -> Section | None:
    """The confusion matrix of the validation images, and that of the test images where a refit saw them."""
    found, test = judged(facts), tested(facts)
    if isinstance(found, Missing) and not wanted(facts):
        return None
    body: list[str] = []
    classes = _classes(facts)
    if isinstance(found, Judged):
        body += [heading(_whose(facts, found)), _matrix(found.table, classes)]
        lead = _confusion_words(found.table, classes, "validation image")
    else:
        body += found.body
        lead = "What the best trial said of its validation images is not at hand."
        facts.notes.append(f"validation images in the report: {found.why}")
    if test is not None and (table := test.table) is not None:
        body += [heading(f"Test images, {test.name}"), _matrix(table, classes)]
        body.append(paragraph(_confusion_words(table, classes, "test image")))
    return Section("confusion", "Confusion", lead, "\n".join(body))


def _whose(facts: Facts, found: Judged) -> str:
    folds = f", each by the network of its fold of {facts.folds}" if facts.folds > 1 else ""
    return f"Validation images, trial {found.trial} ({found.why}){folds}"


def _classes(facts: Facts) -> tuple[str, ...]:
    """The classes' names; of a study whose images are not here, as study.yaml has them."""
    from hpo.study.metadata import read_metadata

    dataset = facts.dataset()
    if dataset is not None:
        return dataset.classes
    metadata = read_metadata(facts.study.paths) or {}
    return tuple(map(str, metadata.get("classes", ())))


def _confusion_words(counts: NDArray[np.int64], classes: Sequence[str], noun: str) -> str:
    total, right = int(counts.sum()), int(counts.trace())
    words = f"{right:,} of {count(total, noun)} are right ({percent(right / max(1, total), 1)})"
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"{words}: no mistake at all."
    most = np.argsort(wrong, axis=None, kind="stable")[::-1][:3]
    pairs = [(int(place) // len(classes), int(place) % len(classes)) for place in most]
    told = [f"{classes[t]} taken for {classes[p]} ({wrong[t, p]})" for t, p in pairs if wrong[t, p] > 0]
    return f"{words}; the most frequent {'mistake' if len(told) == 1 else 'mistakes'}: {', '.join(told)}."


def _matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """A confusion matrix: what is right is blue, mistakes orange, which grow dark with the root of their share."""
    size = len(classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # a class without images has a row of zeros
    right = np.eye(size, dtype=bool)
    numbered = size <= NUMBERS_UP_TO
    fig = go.Figure()
    for mask, depth, color in ((right, shares, BLUE), (~right, np.sqrt(shares), ORANGE)):
        shown = mask & (counts > 0)
        fig.add_trace(
            go.Heatmap(
                z=np.where(shown, depth, np.nan),
                x=list(range(size)),
                y=list(range(size)),
                zmin=0,
                zmax=1,
                colorscale=[[0, "white"], [1, color]],
                showscale=False,
                xgap=1,
                ygap=1,
                hoverongaps=False,
                # A cell of 100 × 100 has a text only where there is something to tell.
                text=[
                    [_cell(counts, shares, classes, t, p) if shown[t, p] else "" for p in range(size)]
                    for t in range(size)
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if numbered:
        for true, predicted in np.argwhere(counts):
            share = shares[true, predicted]
            dark = (share if true == predicted else math.sqrt(share)) > 0.6
            fig.add_annotation(
                x=int(predicted),
                y=int(true),
                text=str(counts[true, predicted]),
                showarrow=False,
                font={"color": "white" if dark else INK, "size": 12 if size <= 12 else 10},
            )
    names = [_short(name) for name in classes]
    axis: dict[str, Any] = {
        "tickvals": list(range(size)),
        "ticktext": names,
        "showgrid": False,
        "ticks": "",
        "tickfont": {"size": 12 if size <= NUMBERS_UP_TO else 8},
        "constrain": "domain",
    }
    side = min(max(36 * size, 320), 900)
    fig.update_layout(
        showlegend=False,
        xaxis={**axis, "title": "predicted class", "tickangle": -90 if max(map(len, names)) > 2 else 0},
        yaxis={**axis, "title": "true class", "autorange": "reversed", "scaleanchor": "x"},
        plot_bgcolor="white",
        shapes=[{"type": "rect", "x0": -0.5, "y0": -0.5, "x1": size - 0.5, "y1": size - 0.5, "line": {"color": PALE}}],
    )
    right_words = f"{int(counts.trace()):,} of {int(counts.sum()):,} images on the diagonal"
    longest = max(map(len, names)) * 7
    return figure(
        fig,
        alt=f"Confusion matrix of {size} classes, {right_words}",
        height=side + 60 + longest,
        min_width=None if size <= 12 else side + longest,
    )


def _cell(counts: NDArray[np.int64], shares: NDArray[np.float64], classes: Sequence[str], t: int, p: int) -> str:
    what = f"{classes[t]}: right" if t == p else f"{classes[t]} taken for {classes[p]}"
    return f"{what}<br>{counts[t, p]:,} images, {percent(shares[t, p], 1)} of the class"


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


# Class by class ----------------------------------------------------------------------------------------------------


def per_class(facts: Facts) -> Section | None:
    """Precision, recall and F1 of each class, the worst first."""
    found, test = judged(facts), tested(facts)
    if not isinstance(found, Judged) and test is None:
        return None  # the confusion's section says what is missing
    body = []
    lead = ""
    if isinstance(found, Judged):
        rows = _scores(found.table, found.classes)
        lead = _worst_words(rows, "validation images")
        body += [heading(_whose(facts, found)), _class_table(rows)]
    if test is not None:
        rows = sorted(test.per_class, key=lambda row: float(row["f1"]))
        lead = lead or _worst_words(rows, "test images")
        body += [heading(f"Test images, {test.name}"), _class_table(rows)]
    return Section("classes", "Classes", lead, "\n".join(body))


def _scores(counts: NDArray[np.int64], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """`core.metrics.per_class`, the worst F1 first."""
    import torch

    from core.metrics import per_class as of_classes

    return sorted(of_classes(torch.from_numpy(counts), classes), key=lambda row: float(row["f1"]))


def _worst_words(rows: Sequence[Mapping[str, Any]], whose: str) -> str:
    worst, best = rows[0], rows[-1]
    if worst["f1"] == best["f1"]:
        return f"On the {whose} every class has the F1 {worst['f1']:.3f}."
    weak = "misses its own images" if worst["recall"] < worst["precision"] else "takes in images of other classes"
    return (
        f"On the {whose} the worst class is {worst['class']} (F1 {worst['f1']:.3f}): it {weak} more than the other way "
        f"round; the best is {best['class']} ({best['f1']:.3f})."
    )


def _class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, the worst first; long ones are folded behind the first twenty."""
    marked = [row for row in rows[:MARKED] if row["f1"] < rows[-1]["f1"]]
    cells = [
        (
            f"▼ {row['class']}" if row in marked else str(row["class"]),
            *(f"{float(row[key]):.3f}" for key in ("precision", "recall", "f1")),
            f"{row['support']:,}",
        )
        for row in rows
    ]
    columns = ("class (▼ the worst)" if marked else "class", "precision", "recall", "F1", "images")
    head = table(columns, cells[:NUMBERS_UP_TO], right=(1, 2, 3, 4))
    rest = cells[NUMBERS_UP_TO:]
    return head + (folded(f"the other {len(rest)} classes", table(columns, rest, right=(1, 2, 3, 4))) if rest else "")


# The most confident mistakes ---------------------------------------------------------------------------------------


def confident_errors(facts: Facts) -> Section | None:
    """The validation images that were taken for something else most surely; None where nothing is known of any."""
    found, test = judged(facts), tested(facts)
    pictured = None if test is None else facts.study.paths.refit(test.label) / "confident_errors.png"
    tested_here = pictured is not None and pictured.exists()
    if not isinstance(found, Judged) and not tested_here:
        return None  # the confusion's section says what is missing
    lead, body = "", []
    if isinstance(found, Judged):
        dataset = facts.dataset()
        assert dataset is not None, "what is judged has images"
        errors = mistakes(found, dataset.ids)
        lead = _mistakes_words(found, errors)
        if errors:
            body += [heading(_whose(facts, found)), *_errors_shown(dataset, errors)]
    if tested_here:
        assert test is not None
        assert pictured is not None
        words = f"The most confident mistakes on the test images, {test.name}"
        lead = lead or f"{words}."
        body += [heading(f"Test images, {test.name}"), picture(pictured.read_bytes(), alt=words)]
    return Section("errors", "Mistakes", lead, "\n".join(body))


def mistakes(found: Judged, ids: Sequence[str], most: int = ERRORS) -> list[dict[str, Any]]:
    """The most confident mistakes, as `pictures.confident_errors` takes them, with their `index` among all."""
    predicted = found.predicted
    wrong = np.flatnonzero(predicted != found.labels)
    confidence = found.probabilities[wrong, predicted[wrong]]
    return [
        {
            "id": ids[int(found.indices[place])],
            "index": int(found.indices[place]),
            "true": found.classes[int(found.labels[place])],
            "predicted": found.classes[int(predicted[place])],
            "confidence": float(found.probabilities[place, predicted[place]]),
        }
        for place in wrong[np.argsort(-confidence, kind="stable")][:most]
    ]


def _mistakes_words(found: Judged, errors: Sequence[Mapping[str, Any]]) -> str:
    wrong = int((found.predicted != found.labels).sum())
    if not wrong:
        return "There is none: every validation image is right."
    sure = int((found.probabilities.max(1)[found.predicted != found.labels] > 0.9).sum())
    shown = f"the {len(errors)} most confident" if len(errors) < wrong else "all of them"
    return (
        f"{wrong:,} of {count(len(found.labels), 'validation image')} are mistaken, {sure:,} with more than 90 % "
        f"confidence; here are {shown}. Some of the surest may be wrong labels."
    )


def _errors_shown(dataset: Dataset, errors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    import torch

    from hpo.dashboard.pictures import confident_errors as draw

    images = dataset.images[torch.tensor([error["index"] for error in errors])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "errors.png"
        draw(images, errors, dataset.classes, path)
        yield picture(path.read_bytes(), alt=f"The {len(errors)} most confident mistakes on validation images")
    rows = [(error["id"], error["true"], error["predicted"], percent(error["confidence"], 1)) for error in errors]
    yield folded("which images these are", table(("image", "true", "predicted", "confidence"), rows, right=(3,)))
