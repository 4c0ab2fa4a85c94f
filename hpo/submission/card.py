"""The model card: the README of a bundle, which says what the model is, how good, how that is known, and what it is
not for.

Its frame is that of Mitchell et al. 2019, arXiv 1810.03993: use, data, metrics class by class, limits. The key choice
is that no sentence is written by hand for one model: each follows from a number in the bundle or its report, and is
left out where the number is not there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.config import TrainConfig
from core.tta import VIEWS
from hpo.confirmation.result import Confirmation
from hpo.submission.bundle import CLASSES, CONFIG, METRICS, ONNX, ORIGIN, PREPROCESS, README, Bundle
from hpo.text import duration

Report = Mapping[str, Any]

# Of the table of classes: shown whole up to so many, and of more only the worst and the best.
WHOLE_TABLE, WORST, BEST = 30, 10, 5
# Of a list of classes in a sentence.
NAMED = 8
# Test images of a class, below which its recall is a rough guess: with 30, one of 0.9 is known to within 0.11 (1.96
# standard deviations of a binomial share).
FEW = 30
# The largest class over the smallest, from which on accuracy tells of the large ones mostly: of two classes, three
# quarters.
IMBALANCED = 3.0
# Recall below which a class is missed more often than found.
HALF = 0.5

SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "loss": "NLL",
    "ece": "ECE",
}
CONFUSION, ERRORS, CURVES, SUBMISSION = (
    "confusion.png",
    "confident_errors.png",
    "learning_curves.png",
    "submission.csv",
)


def write_card(folder: Path, bundle: Bundle, report: Report) -> None:
    """Writes the card into a bundle's folder, when all else is there: it shows what it finds."""
    files = {path.name for path in folder.iterdir()}
    (folder / README).write_text(model_card(bundle, report, files=files), encoding="utf-8")


def model_card(bundle: Bundle, report: Report, *, files: Collection[str] = ()) -> str:
    """The card as Markdown.

    Args:
        report: what `metrics.json` holds; keys that it lacks are passed over.
        files: the names of those beside the card, of which it shows the pictures and the ONNX file.
    """
    sections = (
        _head(bundle, report),
        _use(bundle, files),
        _quality(bundle, report, files),
        _limits(bundle, report),
        _data(bundle, report),
        _model(bundle, report),
        _search(report),
        _configuration(bundle, report),
        _folder(bundle, files),
    )
    return "\n\n".join("\n\n".join(blocks) for section in sections if (blocks := list(section))) + "\n"


# What it is, and how it is used -------------------------------------------------------------------------------------


def _head(bundle: Bundle, report: Report) -> Iterator[str]:
    height, width = bundle.image_size
    kind = "grey" if bundle.in_channels == 1 else "colour"
    yield f"# A classifier of {len(bundle.classes)} classes, trained on {_text(bundle.data_name)}"
    of_study = "" if bundle.study is None else f" of study {_code(bundle.study)}"
    if bundle.trial is not None:
        base = (report.get("confirmation") or {}).get("winner") == "base"
        trial = f" from {'the base, ' if base else ''}trial {bundle.trial}{of_study}"
    elif report.get("recipe") is not None:
        trial = f" from the recipe {_code(report['recipe'])}{of_study}"
    else:
        trial = of_study and f" from the base{of_study}"
    yield (
        f"Written by `hpo refit`{trial}. It takes {kind} images, resized to {width}×{height} pixels, and names one of "
        f"{len(bundle.classes)} classes: {_listed(bundle.classes, WHOLE_TABLE)}."
    )
    accuracy = _value(report, "test", "with_tta", "accuracy")
    if accuracy is not None:
        interval = _interval(report["test"]["with_tta"], "accuracy", percent=True)
        yield (
            f"**{100 * accuracy:.1f} %** of {report['test']['images']:,} test images that it had never seen are named "
            f"right{f' (95 % interval {interval})' if interval else ''}."
        )


def _use(bundle: Bundle, files: Collection[str]) -> Iterator[str]:
    yield "## How to use it"
    version = bundle.versions.get("hpo-vision")
    yield (
        f"Install `hpo-vision`{f' {version}' if version else ''}. In this folder, with `photos` an image, a folder, "
        "`.zip`, `.tar.*`, `.npz`, or a `.csv` of paths:"
    )
    yield "```sh\nhpo predict . photos -o submission.csv\n```"
    yield "Or in Python, where `photos` may also be Pillow images, numpy arrays or torch tensors of 8-bit pixels:"
    yield _PYTHON_SNIPPET
    if ONNX in files:
        yield (
            f"Without torch, by `{ONNX}`, which holds everything between the pixels and the probabilities: "
            "normalisation, views, networks and temperature. It reads no files: what is turned by an EXIF tag, "
            "transparent, or has 16 bits must be made upright, opaque and 8-bit first, as `hpo predict` does."
        )
        height, width = bundle.image_size
        grey = bundle.in_channels == 1
        yield _ONNX_SNIPPET.format(
            file=ONNX,
            mode="L" if grey else "RGB",
            width=width,
            height=height,
            order="[None, None]" if grey else ".transpose(2, 0, 1)[None]",
            channels=bundle.in_channels,
        )


_PYTHON_SNIPPET = """\
```python
from hpo import load_bundle

found = load_bundle(".").predict("photos")
for name, label, confidence in zip(found.ids, found.names, found.confidences.tolist()):
    print(name, label, f"{confidence:.3f}")
```"""

_ONNX_SNIPPET = """\
```python
import json, numpy, onnxruntime
from PIL import Image

model = onnxruntime.InferenceSession("{file}")
image = Image.open("photo.jpg").convert("{mode}").resize(({width}, {height}), Image.Resampling.BICUBIC)
pixels = numpy.asarray(image){order}  # (N, {channels}, {height}, {width}) uint8
[probabilities] = model.run(["probabilities"], {{"images": pixels}})
print(json.loads(model.get_modelmeta().custom_metadata_map["classes"])[probabilities[0].argmax()])
```"""


# How good it is -----------------------------------------------------------------------------------------------------


def _quality(bundle: Bundle, report: Report, files: Collection[str]) -> Iterator[str]:
    yield "## How good it is"
    table = _score_table(bundle, report)
    if table:
        yield table
        yield _what_the_scores_are(bundle, report)
    yield from _openings(report)
    yield from _class_table(report)
    if CONFUSION in files:
        yield f"![Which classes are taken for which, on the test images]({CONFUSION})"
    if ERRORS in files:
        yield "The mistakes that it was surest of, on test images:"
        yield f"![Test images that were named wrongly, the most confident first]({ERRORS})"
    yield from _calibration(report)


def _score_table(bundle: Bundle, report: Report) -> str:
    rows = []
    kinds = {"without_tta": "one view", "with_tta": "as it answers"}
    if bundle.views == "none" and bundle.temperature == 1:
        del kinds["without_tta"]  # the same
    for part, name in (("val", "validation"), ("test", "test")):
        for key, answers in kinds.items():
            scores = report.get(part, {}).get(key)
            if scores is None:
                continue
            cells = [_scored(scores, column) for column in SCORES]
            rows.append([f"{name} ({report[part]['images']:,})", answers, *cells])
    return _table(["images", "answers", *SCORES.values()], rows, right=range(2, 2 + len(SCORES))) if rows else ""


def _scored(scores: Mapping[str, Any], column: str) -> str:
    """ "0.9778 (0.961–0.989)"; a dash where there is no such score."""
    value = scores.get(column)
    if value is None or not math.isfinite(value):
        return "–"
    interval = _interval(scores, column)
    return f"{value:.4f} ({interval})" if interval else f"{value:.4f}"


def _interval(scores: Mapping[str, Any], column: str, *, percent: bool = False) -> str | None:
    """ "0.961–0.989", or "96.1–98.9 %"."""
    found = scores.get("intervals", {}).get(column)
    if found is None or None in found:
        return None
    low, high = found
    return f"{100 * low:.1f}–{100 * high:.1f} %" if percent else f"{low:.3f}–{high:.3f}"


def _what_the_scores_are(bundle: Bundle, report: Report) -> str:
    networks, folds = len(bundle.weights), bundle.config.data.folds
    if networks > 1 and folds is not None:
        validated = (
            "out-of-fold: each image was judged by the one member that had not seen it. The test scores are the "
        )
        validated += "whole ensemble's."
    elif folds is not None:
        validated = f"out-of-fold: the trial trained {folds} networks, and each image was judged by the one that had "
        validated += "not seen it. The test scores are this model's."
    else:
        validated = "those of weights that had not seen these images; the test scores are this model's, which was "
        validated += "trained on the validation images too."
    intervals = any(
        "intervals" in report.get(part, {}).get(key, {})
        for part in ("val", "test")
        for key in ("without_tta", "with_tta")
    )
    bootstrap = " In brackets: 95 % intervals by bootstrap over the images, which do not tell of another training."
    return (
        "One view is without test-time augmentation and temperature. NLL is the negative log-likelihood, ECE the "
        "expected calibration error; of both less is better. The validation scores are "
        f"{validated}{bootstrap if intervals else ''} `{METRICS}` has all."
    )


def _openings(report: Report) -> Iterator[str]:
    opened = report.get("test", {}).get("opened")
    if opened == 1:
        yield "The test images were looked at once, after everything else was decided."
    elif opened:
        yield (
            f"The test images of this study have been looked at {opened} times. Whoever chose between those models by "
            "their test scores has made them flatter this one."
        )


def _per_class(report: Report) -> list[dict[str, Any]]:
    test = report.get("test", {})
    rows: list[dict[str, Any]] = (test.get("with_tta") or test.get("without_tta") or {}).get("per_class", [])
    return rows


def _class_table(report: Report) -> Iterator[str]:
    rows = _per_class(report)
    if not rows:
        return
    shown = rows
    which = f"Class by class, on the {report['test']['images']:,} test images:"
    if len(rows) > WHOLE_TABLE:
        order = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])
        shown = [*order[:WORST], *order[-BEST:]]
        which = f"The {WORST} classes with the lowest F1 on the test images, and the {BEST} with the highest; "
        which += f"`{METRICS}` has all {len(rows)}:"
    yield which
    yield _table(
        ["class", "precision", "recall", "F1", "images"],
        [
            [_text(row["class"]), *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
            for row in shown
        ],
        right=range(1, 5),
    )


def _calibration(report: Report) -> Iterator[str]:
    found = report.get("temperature")
    if not found:
        return
    value, why = found["value"], found.get("why")
    words = "the logits are left as they are" if value == 1 else f"the logits are divided by {value:.3g}"
    fits = "the temperature that fits the validation images best (Guo et al. 2017)" if why is None else _text(why)
    text = f"Calibration: {words}{', ' if why is None else ', since '}{fits}."
    for name, score in (("NLL", "nll"), ("ECE", "ece")) if value != 1 else ():
        before, after = (found.get(f"val_{score}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            text += f" Their {name} was {before:.4f} before and is {after:.4f} after."
    of_test = _value(report, "test", "with_tta", "ece")
    if of_test is not None:
        text += (
            f" On the test images confidence and accuracy lie {100 * of_test:.1f} points apart on average, over 15 "
            "bins of confidence (ECE)."
        )
    yield text


# What it is not for -------------------------------------------------------------------------------------------------


def _limits(bundle: Bundle, report: Report) -> Iterator[str]:
    yield "## What it should not be used for"
    yield "\n".join(f"- {limit}" for limit in _each_limit(bundle, report))


def _each_limit(bundle: Bundle, report: Report) -> Iterator[str]:
    height, width = bundle.image_size
    yield (
        f"Images of anything but its {len(bundle.classes)} classes. It has no answer “none of these”: whatever it is "
        "shown gets one of their names, often with confidence."
    )
    yield (
        f"Images from elsewhere, unseen. It was trained and judged on {_text(bundle.data_name)} alone; of another "
        "camera, light, place or way of cropping the scores above say nothing. Label some by hand, and measure."
    )
    shape = "are not square" if width == height else f"have not the shape {width}:{height}"
    yield (
        f"What does not show in {width}×{height} pixels: larger images are reduced to that, smaller ones enlarged, and "
        f"those that {shape} are distorted."
        + (" Colours are not seen: it was trained on grey images." if bundle.in_channels == 1 else "")
    )
    yield from _class_limits(_per_class(report))
    if report.get("test"):
        yield (
            "Decisions about people without a person who looks at each and can overrule it. How its mistakes are "
            "spread over groups of people was not measured."
        )
    else:
        yield "Anything that matters: it has not been judged on test images."


def _class_limits(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    present = [row for row in rows if row["support"]]
    if not present:
        return
    missed = sorted((row for row in present if row["recall"] < HALF), key=lambda row: row["recall"])
    if missed:
        named = _listed([f"{row['class']} ({row['recall']:.2f})" for row in missed])
        yield f"Finding all images of a class that it misses more often than it finds it, by its recall: {named}."
    few = sorted((row for row in rows if row["support"] < FEW), key=lambda row: row["support"])
    if len(few) == len(rows):
        yield (
            f"Comparing classes: none has more than {max(row['support'] for row in rows)} test images, so that the "
            "numbers of a single class are a rough guess."
        )
    elif few:
        named = _listed([f"{row['class']} ({row['support']})" for row in few])
        yield f"Relying on the numbers of a class with fewer than {FEW} test images, which are a rough guess: {named}."
    large, small = (pick(present, key=lambda row: row["support"]) for pick in (max, min))
    if large["support"] >= IMBALANCED * small["support"]:
        yield (
            f"Images in which classes are as frequent as they are not here: {_text(large['class'])} has "
            f"{large['support']:,} test images, {_text(small['class'])} {small['support']:,}. Accuracy counts the "
            "frequent ones more; balanced accuracy and macro-F1 count all alike."
        )


# Where it comes from ------------------------------------------------------------------------------------------------


def _data(bundle: Bundle, report: Report) -> Iterator[str]:
    data, config = report.get("data", {}), bundle.config.data
    yield "## Data"
    source = "" if bundle.source in (None, bundle.data_name) else f", from {_code(bundle.source)}"
    lines = [f"{_text(bundle.data_name)}{source}; fingerprint {_code(bundle.fingerprint)}."]
    counts = {
        "to train on": data.get("train"),
        "held back from the first training to decide by": report.get("val", {}).get("images"),
        "to test on": report.get("test", {}).get("images"),
    }
    if any(counts.values()):
        lines.append(f"Images: {', '.join(f'{count:,} {what}' for what, count in counts.items() if count)}.")
    if config.folds is not None:
        lines.append(
            f"Validation: {config.folds} folds, stratified by class and drawn with `data.split_seed` "
            f"{config.split_seed}; each image validated in one of them."
        )
    else:
        lines.append(
            f"Validation: {100 * config.val_fraction:g} % of the images outside the test set, stratified by class and "
            f"drawn with `data.split_seed` {config.split_seed}."
        )
    if data.get("own_test") is True:
        lines.append("Test: the images that the data set itself sets aside.")
    elif data.get("own_test") is False:
        lines.append(
            f"Test: {100 * config.test_fraction:g} % of all images, cut off by their pixels alone, so that no seed "
            "changes it."
        )
    if data.get("broken"):
        lines.append(f"{data['broken']:,} files could not be read, and were left out.")
    yield "\n".join(f"- {line}" for line in lines)


def _model(bundle: Bundle, report: Report) -> Iterator[str]:
    yield "## Model"
    views, networks = len(VIEWS[bundle.views]), len(bundle.weights)
    ensemble = "" if networks == 1 else f", an ensemble of {networks}, whose probabilities are averaged"
    lines = [f"Network: {_code(bundle.config.model.name)}{ensemble}."]
    averaging = report.get("averaging") or {}
    if averaging.get("val"):
        trainings = f"{report['members']} trainings" if report.get("members") else "several trainings"
        lines.append(
            f"Of {trainings}: {_text(averaging['chosen'])}, chosen on validation images "
            f"({_scores_of(averaging['val'])})."
        )
    candidates = report.get("tta", {}).get("val_candidates")
    why = f", chosen on validation images ({_scores_of(candidates)})" if candidates else ""
    lines.append(
        f"Test-time augmentation: {_code(bundle.views)}, {views} view{'' if views == 1 else 's'} of each image{why}."
    )
    if bundle.temperature != 1:
        lines.append(f"Temperature: {bundle.temperature:.4g}.")
    if bundle.versions:
        lines.append(f"Versions: {', '.join(f'{name} {number}' for name, number in bundle.versions.items())}.")
    yield "\n".join(f"- {line}" for line in lines)


def _scores_of(candidates: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in candidates.items() if value is not None)


def _search(report: Report) -> Iterator[str]:
    search, confirmation = report.get("search"), report.get("confirmation")
    if search or confirmation:
        yield "## How it was found"
    if search:
        yield " ".join(_searched(search))
    if confirmation:
        lines = Confirmation.from_json(confirmation).lines()
        yield "Confirmed on other seeds and splits:"
        yield "\n".join(["```text", *lines, "```"])


def _searched(search: Mapping[str, Any]) -> Iterator[str]:
    study = f"Study {_code(search['study'])}" if search.get("study") else "The study"
    space = f" of the search space {_code(search['space'])}" if search.get("space") else ""
    counts = [
        f"{search[key]:,} {name}"
        for key, name in (("complete", "complete"), ("pruned", "pruned"), ("failures", "failed to train"))
        if search.get(key)
    ]
    trials = f" ran {search['trials']:,} trials{space}" if search.get("trials") is not None else f"{space} was searched"
    yield f"{study}{trials}{f' ({_and(counts)})' if counts else ''}."
    cost = [f"{search['epochs']:,} epochs"] if search.get("epochs") else []
    cost += [duration(search["elapsed_s"])] if search.get("elapsed_s") else []
    if cost:
        device = f" on {_text(search['device'])}" if search.get("device") else ""
        yield f"It cost {_and(cost)}{device}."
    if search.get("best_value") is not None:
        yield f"Its best validation score was {search['best_value']:.4f}, which luck has a part in: it is a maximum."


def _configuration(bundle: Bundle, report: Report) -> Iterator[str]:
    yield "## Configuration"
    base = _base(report)
    than = "the base, which the search began with" if base else "`hpo`'s defaults"
    theirs = (base or TrainConfig()).flat()
    changed = {path: value for path, value in bundle.config.flat().items() if value != theirs[path]}
    changed.pop("seed", None)  # every trial has its own
    if changed:
        yield f"What differs from {than}; `{CONFIG}` has the whole:"
        yield _table(
            ["field", "here", "the base" if base else "default"],
            [[_code(path), _setting(value), _setting(theirs[path])] for path, value in changed.items()],
        )
    else:
        yield f"Nothing differs from {than}; `{CONFIG}` has the whole."
    folds = bundle.config.data.folds
    if folds is None:
        trains = "trains it on the training images alone, without the validation images, which this model was trained "
        trains += "on too."
    else:
        trains = f"trains it {folds} times, each time without another part of the images."
    yield f"`hpo train {CONFIG} --data …` {trains}"


def _base(report: Report) -> TrainConfig | None:
    """The configuration that the confirmation compared others with; None where it is unknown, or of other fields."""
    for contender in (report.get("confirmation") or {}).get("contenders", []):
        if contender.get("key") == "base":
            try:
                return TrainConfig.model_validate_json(json.dumps(contender["config"]))
            except ValidationError:
                return None
    return None


def _setting(value: Any) -> str:
    """As YAML has it: `null`, `true`, `[8, 16]`, `0.003`."""
    if isinstance(value, float):
        return _code(f"{value:.4g}")
    return _code(json.dumps(value, ensure_ascii=False).strip('"'))


def _folder(bundle: Bundle, files: Collection[str]) -> Iterator[str]:
    state = "the state dict" if len(bundle.weights) == 1 else "each the state dict"
    weights = " … ".join(f"`{name}`" for name in dict.fromkeys((bundle.weights[0], bundle.weights[-1])))
    rows = [
        [weights, f"the weights: {state} of `core.models.build_model`"],
        [f"`{CONFIG}`", "the whole configuration, which is a recipe"],
        [f"`{CLASSES}`", "the classes, in the order of the outputs"],
        [
            f"`{PREPROCESS}`",
            "channels, size (height, width), views, temperature; of each network, mean and deviation of pixels in "
            "[0, 1]",
        ],
        [f"`{ORIGIN}`", "study, trial, data, versions, checksums of the weights"],
        [f"`{METRICS}`", "everything that is said here, and more, as numbers"],
    ]
    beside = {
        ONNX: "the whole model for any ONNX runtime: `images` (N, C, H, W) uint8 to `probabilities` (N, classes)",
        CONFUSION: "which classes are taken for which, on test images",
        ERRORS: "the most confident mistakes on test images",
        CURVES: "the training of this model",
        SUBMISSION: "the labels of the test images",
    }
    rows += [[f"`{name}`", what] for name, what in beside.items() if name in files]
    yield "## What is in this folder"
    yield _table(["file", "what it is"], rows)
    yield "No file is a pickle: loading them runs no code."


# Markdown -----------------------------------------------------------------------------------------------------------


def _value(report: Report, *path: str) -> float | None:
    """The number at this path of keys; None where there is none."""
    found: Any = report
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, float | int) and math.isfinite(found) else None


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """A table whose cells are Markdown already; columns at these places are set flush right."""
    rule = ["---:" if place in right else "---" for place in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def _and(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _listed(names: Sequence[str], most: int = NAMED) -> str:
    """Names in a sentence, the first of them where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_text, names[:most])) + more


def _text(words: str) -> str:
    """Text as it stands, on one line, whatever it would mean in Markdown."""
    return re.sub(r"([\\`*\[\]<>|#&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(words.split()))


def _code(words: str) -> str:
    """A code span on one line; one with backticks in it is fenced by two."""
    words = " ".join(words.split()).replace("|", r"\|")
    return f"`` {words} ``" if "`" in words else f"`{words}`"
