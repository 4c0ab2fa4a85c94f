"""The sections on classes: the confusion matrix, scores per class, and the most confident mistakes.

Validation images are scored by the stored outputs of the winner or the best trial (`hpo.analysis.outputs`), test images
by the recorded scores of a refit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray

from core.text import count
from hpo.analysis.outputs import Choice, Outputs, Refit, choices, read_outputs, refits
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import BLUE, LONGEST_NAME, NUMBERS_UP_TO, ORANGE, PALE, confusion_depth
from hpo.report.page import Section, code, figure, folded, heading, picture, section, table
from hpo.report.words import command
from hpo.text import cut, joined, percent

if TYPE_CHECKING:
    from core.data import Dataset

MARKED = 3
"""Classes marked as the worst."""
_UNFOLDED = 20  # classes in a table; the others are folded
_MISTAKES = 24  # shown


def no_images(data: StudyData) -> list[str]:
    """Why the images are missing, and how to provide them."""
    return [
        f"The images are not here: {data.dataset_error}. With them, this is shown:",
        code(f"hpo report {data.study.name} --data IMAGES"),
    ]


def _no_outputs(data: StudyData, choice: Choice) -> list[str]:
    file = data.study.paths.inside(data.study.paths.trial_validation(choice.trial))
    text = (
        f"The validation outputs of {_role(choice)}, trial {choice.trial}, are not here (`{file}`). They are stored "
        "with the weights of the best trials, on the machine that trained them. Copy the file from there, or train the "
        "trial again as a submission model, whose confusion on the test images is then shown here:"
    )
    return [text, code(command(data.study, f"refit {choice.trial} --study"))]


def _role(choice: Choice) -> str:
    best, winner = "the best trial of the search", choice.winner
    if winner is None:
        return best
    if winner.trial == choice.trial:
        return "the confirmed winner"
    if winner.trial is None:
        return f"{best}, because the confirmed winner, {winner.key}, is none of its trials"
    return f"{best}, because the confirmed winner's outputs were not stored"


def _validation_heading(data: StudyData, outputs: Outputs) -> Markup:
    folds = f", each by the network of its fold of {data.folds}" if data.folds > 1 else ""
    return heading(f"Validation images, trial {outputs.choice.trial} ({_role(outputs.choice)}){folds}")


def _test_heading(refit: Refit) -> Markup:
    return heading(f"Test images, refit `{refit.label}`")


def _tested(data: StudyData) -> Refit | None:
    """The refit whose test scores are shown."""
    return next(iter(refits(data)), None)


# Confusion ----------------------------------------------------------------------------------------------------------


def confusion(data: StudyData) -> Section | None:
    """The confusion matrix of the validation images, and that of the test images if there is a refit."""
    wanted = choices(data)
    if not wanted:
        return None
    outputs, test, classes = read_outputs(data), _tested(data), _classes(data)
    body: list[str]
    if outputs is not None:
        lead = _confusion_text(outputs.confusion, classes, "validation image")
        body = [_validation_heading(data, outputs), _matrix(outputs.confusion, classes)]
    else:
        lead = "The best trial's outputs on its validation images are not available."
        body = no_images(data) if data.dataset is None else _no_outputs(data, wanted[0])
        data.notes.append(f"validation images in the report: {body[0]}")
    if test is not None and (counts := test.confusion) is not None:
        body += [_test_heading(test), _matrix(counts, classes), _confusion_text(counts, classes, "test image")]
    return section("confusion", "Confusion", lead, body)


def _classes(data: StudyData) -> tuple[str, ...]:
    """The classes' names, from study.yaml if the images are missing."""
    from hpo.study.metadata import read_metadata

    if data.dataset is not None:
        return data.dataset.classes
    metadata = read_metadata(data.study.paths) or {}
    return tuple(map(str, metadata.get("classes", ())))


def _confusion_text(counts: NDArray[np.int64], classes: Sequence[str], noun: str) -> str:
    total, right = int(counts.sum()), int(counts.trace())
    words = f"{right:,} of {count(total, noun)} are right ({percent(right / max(1, total), 1)})"
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return f"{words}: no mistake at all."
    most = [divmod(int(place), len(classes)) for place in np.argsort(wrong, axis=None, kind="stable")[::-1][:3]]
    pairs = [f"{classes[t]} taken for {classes[p]} ({wrong[t, p]})" for t, p in most if wrong[t, p] > 0]
    return f"{words}; the most frequent {'mistake' if len(pairs) == 1 else 'mistakes'}: {', '.join(pairs)}."


def _matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """A confusion matrix: correct classes blue, mistakes orange, dark with the root of their fraction."""
    size, names = len(classes), [cut(name, LONGEST_NAME) for name in classes]
    shares, depth = confusion_depth(counts)
    right, longest = np.eye(size, dtype=bool), max(map(len, names))
    fig = go.Figure()
    for mask, color in ((right, BLUE), (~right, ORANGE)):
        shown = mask & (counts > 0)
        labels = np.full((size, size), "", dtype=object)
        for t, p in np.argwhere(shown):
            what = f"{classes[t]}: right" if t == p else f"{classes[t]} taken for {classes[p]}"
            labels[t, p] = f"{what}<br>{count(counts[t, p], 'image')}, {percent(shares[t, p], 1)} of the class"
        cells = {"text": np.where(shown, counts.astype(object), ""), "texttemplate": "%{text}"}
        fig.add_trace(
            go.Heatmap(
                z=np.where(shown, depth, np.nan),
                zmin=0,
                zmax=1,
                colorscale=[[0, "white"], [1, color]],
                showscale=False,
                xgap=1,
                ygap=1,
                hoverongaps=False,
                hovertext=labels,
                hovertemplate="%{hovertext}<extra></extra>",
                **(cells if size <= NUMBERS_UP_TO else {}),
            )
        )
    axis: dict[str, Any] = {
        "tickvals": list(range(size)),
        "ticktext": names,
        "showgrid": False,
        "ticks": "",
        "tickfont": {"size": 12 if size <= NUMBERS_UP_TO else 8},
        "constrain": "domain",
    }
    fig.update_layout(
        showlegend=False,
        xaxis={**axis, "title": "predicted class", "tickangle": -90 if longest > 2 else 0},
        yaxis={**axis, "title": "true class", "autorange": "reversed", "scaleanchor": "x"},
        shapes=[{"type": "rect", "x0": -0.5, "y0": -0.5, "x1": size - 0.5, "y1": size - 0.5, "line": {"color": PALE}}],
    )
    side, room = min(max(36 * size, 320), 900), 7 * longest  # pixels; the room is for the names
    alt = f"Confusion matrix of {size} classes, {int(counts.trace()):,} of {int(counts.sum()):,} images on the diagonal"
    return figure(fig, alt=alt, height=side + 60 + room, min_width=None if size <= 12 else side + room)


# Class by class -----------------------------------------------------------------------------------------------------


def per_class(data: StudyData) -> Section | None:
    """Precision, recall and F1 of each class, the worst first; None without outputs or a refit."""
    parts = []
    if (outputs := read_outputs(data)) is not None:
        title = _validation_heading(data, outputs)
        parts.append(("validation images", title, _class_scores(outputs.confusion, outputs.classes)))
    if (test := _tested(data)) is not None:
        parts.append(("test images", _test_heading(test), test.per_class))
    ranked = [(where, title, sorted(rows, key=lambda row: float(row["f1"]))) for where, title, rows in parts]
    if not ranked:
        return None  # the section on confusion states what is missing
    body = [part for _, title, rows in ranked for part in (title, _class_table(rows))]
    where, _, rows = ranked[0]
    counts = _classes_counts(outputs, test)
    return section("classes", "Classes", _worst_text(rows, where, counts), body)


def _classes_counts(outputs: Outputs | None, test: Refit | None) -> dict[str, dict[str, int]]:
    """True class -> predicted class -> images, of the scores that come first; empty if they are not stored."""
    if outputs is not None:
        counts, classes = outputs.confusion, outputs.classes
    elif test is not None and test.confusion is not None:
        counts, classes = test.confusion, tuple(str(row["class"]) for row in test.per_class)
    else:
        return {}
    return {name: dict(zip(classes, map(int, row), strict=True)) for name, row in zip(classes, counts, strict=True)}


def _class_scores(counts: NDArray[np.int64], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    import torch

    from core.metrics import per_class as scores

    return scores(torch.from_numpy(counts), classes)


def _worst_text(rows: Sequence[Mapping[str, Any]], where: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    worst, best = rows[0], rows[-1]
    if worst["f1"] == best["f1"]:
        return f"On the {where} every class has the F1 {worst['f1']:.3f}."
    return (
        f"On the {where} the worst class is {worst['class']} (F1 {worst['f1']:.3f}): {_why_bad(worst, counts)}; the "
        f"best is {best['class']} ({best['f1']:.3f})."
    )


def _why_bad(row: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]) -> str:
    """Why the scores of a class are low, with the classes that its images were taken for if none was right."""
    if not row["support"]:
        return f"there is no image of it{', but others are taken for it' if _is_predicted(row, counts) else ''}"
    if row["recall"] > 0:
        return (
            "mostly its own images are missed" if row["recall"] < row["precision"] else "mostly others are taken for it"
        )
    others = sorted(counts.get(row["class"], {}).items(), key=lambda item: -item[1])
    taken = joined([f"{name} ({number})" for name, number in others[:3] if number])
    images = count(row["support"], "image")
    never = "it is predicted for other images only" if _is_predicted(row, counts) else "it is never predicted"
    rest = sum(number for _, number in others[3:])
    more = f" and others ({rest})" if rest else ""
    whose = "its image was" if row["support"] == 1 else f"its {images} were"
    return never + (f"; {whose} taken for {taken}{more}" if taken else "")


def _is_predicted(row: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]) -> bool:
    return any(predicted.get(row["class"], 0) for predicted in counts.values())


def _class_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
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
    first, rest = (table(columns, part, right=(1, 2, 3, 4)) for part in (cells[:_UNFOLDED], cells[_UNFOLDED:]))
    more = len(cells) - _UNFOLDED
    return first + folded(f"the other {count(more, 'class', 'classes')}", rest) if more > 0 else first


# The most confident mistakes ----------------------------------------------------------------------------------------


def confident_errors(data: StudyData) -> Section | None:
    """The most confident mistakes on validation images, and the refit's on test images; None without both."""
    outputs, test = read_outputs(data), _tested(data)
    file = None if test is None else data.study.paths.refit(test.label) / "confident_errors.png"
    lead, body = "", []
    if outputs is not None:
        assert data.dataset is not None, "outputs are read with their images"
        errors = mistakes(outputs, data.dataset.ids)
        lead = _mistakes_text(outputs, errors)
        body += [_validation_heading(data, outputs), *_pictures(data.dataset, errors)] if errors else []
    if test is not None and file is not None and file.exists():
        words = f"The most confident mistakes on the test images, refit `{test.label}`"
        lead = lead or f"{words}."
        body += [_test_heading(test), picture(file.read_bytes(), alt=words)]
    return section("errors", "Mistakes", lead, body) if lead else None


def mistakes(outputs: Outputs, ids: Sequence[str], most: int = _MISTAKES) -> list[dict[str, Any]]:
    """The most confident mistakes, as `pictures.confident_errors` takes them, with their `index` in the data set."""
    predicted = outputs.predicted
    wrong = np.flatnonzero(predicted != outputs.labels)
    confidence = outputs.probabilities[wrong, predicted[wrong]]
    return [
        {
            "id": ids[int(outputs.indices[place])],
            "index": int(outputs.indices[place]),
            "true": outputs.classes[int(outputs.labels[place])],
            "predicted": outputs.classes[int(predicted[place])],
            "confidence": float(outputs.probabilities[place, predicted[place]]),
        }
        for place in wrong[np.argsort(-confidence, kind="stable")][:most]
    ]


def _mistakes_text(outputs: Outputs, errors: Sequence[Mapping[str, Any]]) -> str:
    wrong = outputs.predicted != outputs.labels
    if not wrong.any():
        return "There is none: every validation image is right."
    total, confident = int(wrong.sum()), int((outputs.probabilities.max(1)[wrong] > 0.9).sum())
    shown = f"the {len(errors)} most confident" if len(errors) < total else "all of them"
    return (
        f"{total:,} of {count(len(outputs.labels), 'validation image')} are mistaken, {confident:,} with more than "
        f"90 % confidence; here are {shown}. Some of the most confident may be wrong labels."
    )


def _pictures(dataset: Dataset, errors: Sequence[Mapping[str, Any]]) -> list[Markup]:
    shown = image_sheet(dataset, errors, alt=f"The {len(errors)} most confident mistakes on validation images")
    rows = [(error["id"], error["true"], error["predicted"], percent(error["confidence"], 1)) for error in errors]
    names = table(("image", "true", "predicted", "confidence"), rows, right=(3,))
    return [shown, folded("the names of these images", names)]


def image_sheet(dataset: Dataset, errors: Sequence[Mapping[str, Any]], *, alt: str) -> Markup:
    """Images with their true and predicted class, as `pictures.confident_errors` takes them, with their `index`."""
    import torch

    from hpo.dashboard.pictures import confident_errors as draw

    images = dataset.images[torch.tensor([error["index"] for error in errors])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "errors.png"
        draw(images, errors, dataset.classes, path)
        return picture(path.read_bytes(), alt=alt)
