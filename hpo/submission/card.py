"""The model card: the README of a bundle.

The text is in `templates/card.md.j2`; every sentence in it follows from a number in the bundle or its report.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from pydantic import ValidationError

from core.config import TrainConfig
from core.text import printable_lines
from core.tta import VIEWS
from hpo.confirmation.result import BASELINE, Confirmation
from hpo.submission.bundle import CLASSES, CONFIG, METRICS, ONNX, ORIGIN, PREPROCESS, README, Bundle, config_files
from hpo.submission.ladder import Ladder
from hpo.text import changed_fields, data_facts, duration, joined

Report = Mapping[str, Any]

# Tables of classes are complete up to so many; of more, only the worst and the best are shown.
WHOLE_TABLE, WORST, BEST = 30, 10, 5
_NAMED = 8  # classes listed in a sentence
FEW = 30  # test images of a class; with 30, a recall of 0.9 is known to within 0.11 (1.96 binomial deviations)
IMBALANCED = 3.0  # largest class to smallest; of two classes, the large one has three quarters of the images

SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "loss": "NLL",
    "ece": "ECE",
}
_FILES = {
    CONFIG: "the whole configuration, which is a recipe",
    CLASSES: "the classes, in the order of the outputs",
    PREPROCESS: "channels, size (height, width), views, temperature; for each network, mean and deviation of pixels in "
    "[0, 1], of several configurations also weight and views",
    ORIGIN: "study, trial, data, versions, checksums of the weights",
    METRICS: "all scores of this card, and more",
}
_OPTIONAL_FILES = {
    ONNX: "the whole model for any ONNX runtime: `images` (N, C, H, W) uint8 to `probabilities` (N, classes)",
    "confusion.png": "the confusion matrix of the test images",
    "confident_errors.png": "the most confident mistakes on test images",
    "learning_curves.png": "the learning curves of this model",
    "submission.csv": "the labels of the test images",
}


def write_card(folder: Path, bundle: Bundle, report: Report) -> None:
    """Write the card into a bundle's folder, after all other files: it shows those that exist."""
    files = {path.name for path in folder.iterdir()}
    (folder / README).write_text(model_card(bundle, report, files=files), encoding="utf-8")


def model_card(bundle: Bundle, report: Report, *, files: Collection[str] = ()) -> str:
    """Render the card as Markdown with YAML metadata.

    Args:
        report: The content of `metrics.json`; text that needs a missing key is left out.
        files: Names of the files beside the card.
    """
    classes = _per_class(report)
    parts, kinds = ("val", "test"), ("without_tta", "with_tta")
    confirmation = Confirmation.from_json(report["confirmation"]) if report.get("confirmation") else None
    ladder = Ladder.from_json(report["length"]) if report.get("length") else None
    base = _baseline(confirmation)
    winner = None if confirmation is None else confirmation.winner
    text = _environment().get_template("card.md.j2").render(
        bundle=bundle,
        report=report,
        files=files,
        views=len(VIEWS[bundle.views]),
        score_names=list(SCORES.values()),
        score_rows=_score_rows(bundle, report),
        has_intervals=any("intervals" in report.get(part, {}).get(kind, {}) for part in parts for kind in kinds),
        classes=classes,
        class_rows=_class_rows(classes),
        worst=WORST,
        best=BEST,
        few=FEW,
        limits=_class_limits(classes),
        confirmation="\n".join(confirmation.lines()) if confirmation else "",
        ladder="\n".join(ladder.lines()) if ladder else "",
        is_baseline=(winner if ladder is None else ladder.chosen) == BASELINE,
        compared="the baseline, with which the search began" if base else "`hpo`'s defaults",
        has_baseline=base is not None,
        setting_rows=_setting_rows(bundle.config, base or TrainConfig()),
        candidate_rows=[_candidate_row(each) for each in report.get("decision", {}).get("candidates", [])],
        part_rows=_part_rows(bundle, report),
        file_rows=_file_rows(bundle, files),
        facts=data_facts(report.get("data", {}).get("content", {})),
    )  # fmt: skip
    body = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"---\n{_metadata(bundle, report)}\n---\n\n{body}\n"


def _metadata(bundle: Bundle, report: Report) -> str:
    """The YAML head, which Hugging Face reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=bundle.data_name,
            dataset_name=bundle.data_name,
            dataset_split=split,
            metric_type=metric,
            metric_name=SCORES[metric],
            metric_value=round(value, 6),
        )
        for part, split in (("val", "validation"), ("test", "test"))
        for metric in ("accuracy", "balanced_accuracy", "macro_f1")
        if _is_number(value := (report.get(part, {}).get("with_tta") or {}).get(metric))
    ]
    data = ModelCardData(
        library_name="hpo-vision",
        pipeline_tag="image-classification",
        tags=["image-classification", "hyperparameter-optimization", bundle.config.model.name],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=f"{bundle.config.model.name} on {bundle.data_name}" if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


# Rows of tables -----------------------------------------------------------------------------------------------------


def _score_rows(bundle: Bundle, report: Report) -> list[list[str]]:
    kinds = {"without_tta": "one view", "with_tta": "the model's"}
    if bundle.views == "none" and bundle.temperature == 1:
        del kinds["without_tta"]  # both are the same
    return [
        [f"{name} ({report[part]['images']:,})", answers, *(_scored(scores, column) for column in SCORES)]
        for part, name in (("val", "validation"), ("test", "test"))
        for kind, answers in kinds.items()
        if (scores := report.get(part, {}).get(kind)) is not None
    ]


def _scored(scores: Mapping[str, Any], column: str) -> str:
    """`0.9778 (0.961–0.989)`; a dash if there is no such score."""
    value, interval = scores.get(column), _interval(scores, column)
    if not _is_number(value):
        return "–"
    return f"{value:.4f} ({interval})" if interval else f"{value:.4f}"


def _interval(scores: Mapping[str, Any], column: str, *, percent: bool = False) -> str:
    """`0.961–0.989` or `96.1–98.9 %`; empty if there is none."""
    low, high = (scores.get("intervals") or {}).get(column) or (None, None)
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f}–{100 * high:.1f} %" if percent else f"{low:.3f}–{high:.3f}"


def _per_class(report: Report) -> list[dict[str, Any]]:
    test = report.get("test", {})
    rows: list[dict[str, Any]] = (test.get("with_tta") or test.get("without_tta") or {}).get("per_class", [])
    return rows


def _class_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """All classes, or of many the worst and the best by F1."""
    if len(rows) > WHOLE_TABLE:
        ranked = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])
        rows = [*ranked[:WORST], *ranked[-BEST:]]
    return [
        [_text(row["class"]), *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for row in rows
    ]


def _class_limits(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The classes that limit the model's use; empty without scores per class."""
    present = sorted((row for row in rows if row["support"]), key=lambda row: row["support"])
    if not present:
        return {}
    missed = sorted((row for row in present if row["recall"] < 0.5), key=lambda row: row["recall"])
    few = sorted((row for row in rows if row["support"] < FEW), key=lambda row: row["support"])
    small, large = present[0], max(present, key=lambda row: row["support"])
    return {
        "missed": [f"{row['class']} ({row['recall']:.2f})" for row in missed],
        "few": [f"{row['class']} ({row['support']})" for row in few],
        "all_few": large["support"] if len(few) == len(rows) else None,
        "imbalanced": (large, small) if large["support"] >= IMBALANCED * small["support"] else None,
    }


def _baseline(confirmation: Confirmation | None) -> TrainConfig | None:
    """The confirmed baseline; None if it is unknown, or has fields of another version."""
    known = [] if confirmation is None else [one for one in confirmation.contenders if one.key == BASELINE]
    try:
        return known[0].train_config if known else None
    except ValidationError:
        return None


def _setting_rows(config: TrainConfig, base: TrainConfig) -> list[list[str]]:
    changed = changed_fields(base.flat(), config.flat())
    return [[_code(path), _setting(ours), _setting(theirs)] for path, theirs, ours in changed]


def _setting(value: Any) -> str:
    """A value in YAML: `null`, `true`, `[8, 16]`, `0.003`."""
    return _code(f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False).strip('"'))


def _part_rows(bundle: Bundle, report: Report) -> list[list[str]]:
    """The networks of an ensemble of several configurations."""
    chosen = report.get("decision", {}).get("selection") or [{}] * len(bundle.parts)
    return [
        [
            _code(part.config.model.name),
            _text(each.get("name", "–")),
            f"{part.weight:.2f}",
            _code(part.views),
            str(each.get("epochs", "–")),
        ]
        for part, each in zip(bundle.parts, chosen, strict=True)
    ]


def _file_rows(bundle: Bundle, files: Collection[str]) -> list[list[str]]:
    each = "" if len(bundle.weights) == 1 else "each "
    weights = " … ".join(map(_code, dict.fromkeys((bundle.weights[0], bundle.weights[-1]))))
    optional = {name: content for name, content in _OPTIONAL_FILES.items() if name in files}
    others = dict.fromkeys(config_files(len(bundle.parts))[1:], "the configuration of another network of the ensemble")
    return [
        [weights, f"the weights: {each}the state dict of `core.models.build_model`"],
        *([_code(name), content] for name, content in (_FILES | others | optional).items()),
    ]


# Markdown -----------------------------------------------------------------------------------------------------------


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpo.submission"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: printable_lines(value) if isinstance(value, str) else value,
    )
    environment.globals["table"] = _table
    environment.filters |= {
        "text": _text,
        "code": _code,
        "listed": _listed,
        "thousands": lambda number: f"{number:,}",
        "duration": duration,
        "known": _is_number,
        "interval": _interval,
        "states": _states,
    }
    return environment


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _candidate_row(each: Mapping[str, Any]) -> list[str]:
    gain, score = each["gain"], each["score"]
    return [
        each["step"],
        _code(each["name"]),
        "–" if score is None else f"{score:.4f}",
        "" if gain is None else f"{gain['value']:+.4f} ± {gain['error']:.4f}",
        str(each["passes"]),
        _text(each["verdict"]),
    ]


def _states(search: Mapping[str, Any]) -> str:
    names = {"complete": "complete", "pruned": "pruned", "failures": "failed to train"}
    counts = [f"{search[key]:,} {name}" for key, name in names.items() if search.get(key)]
    return f" ({joined(counts)})" if counts else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table; its cells are Markdown."""
    rule = ["---:" if place in right else "---" for place in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def _listed(names: Sequence[str], most: int = _NAMED) -> str:
    """Names in a sentence, the first of them if there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_text, names[:most])) + more


def _text(words: str) -> str:
    """Text on one line, escaped for Markdown."""
    return re.sub(r"([\\`*\[\]<>|#&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(words.split()))


def _code(words: str) -> str:
    """A code span on one line; with backticks in it, fenced by two."""
    words = " ".join(words.split()).replace("|", r"\|")
    return f"`` {words} ``" if "`" in words else f"`{words}`"
