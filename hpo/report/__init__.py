"""The report of a study: one HTML file that needs no network, the answer first, then its evidence.

A section is a function from `StudyData` to a `Section`, listed in `SECTIONS` as (name in the navigation, module,
function). Numbers come from `hpo.analysis`, HTML from the templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.analysis.study_data import StudyData
    from hpo.report.page import Section
    from hpo.study import Study

__all__ = ["write_report"]

SECTIONS = (
    ("Answer", "answer", "answer"),
    ("Baselines", "baselines", "baselines"),
    ("Length", "length", "length"),
    ("History", "figures", "history"),
    ("Front", "front", "pareto_front"),
    ("Curves", "figures", "learning_curves"),
    ("Importances", "figures", "importances"),
    ("Slices", "figures", "slices"),
    ("Edges", "pruning", "edges"),
    ("Parallel", "figures", "parallel_coordinates"),
    ("Pruner", "pruning", "pruner_safety"),
    ("Failures", "failures", "failures"),
    ("Cost", "costs", "costs"),
    ("Confusion", "images", "confusion"),
    ("Classes", "images", "per_class"),
    ("Mistakes", "images", "confident_errors"),
    ("Labels", "labels", "suspect_labels"),
    ("Augmentation", "samples", "augmented_samples"),
    ("Study", "about", "about"),
)


def write_report(study: Study, path: Path, *, data: Path | None = None, compare: Sequence[Study] = ()) -> list[str]:
    """Write the report atomically.

    Args:
        study: a search with finished or running trials.
        path: of the HTML file.
        data: where the images are; None for the path that the study used.
        compare: studies to compare it with; the page is then a comparison, without the sections of one study.

    Returns:
        What could not be shown and why, a line each.

    Raises:
        HpoError: the file cannot be written, or a file of the study cannot be read.
    """
    from hpo.analysis.study_data import read_study_data
    from hpo.report.compare import comparison
    from hpo.report.page import page
    from hpo.report.words import metric_label, progress_text
    from hpo.storage.atomic import write_output
    from hpo.text import joined

    found = read_study_data(study, images_path=data)
    if compare:
        studies = [found, *map(read_study_data, compare)]
        title, sections = joined([each.study.name for each in studies]), comparison(studies)
        subtitle = f"{len(studies)} studies side by side"
    else:
        title, sections = f"Study {study.name}", sections_of(found)
        subtitle = (
            f"{metric_label(found.metric)} on the validation images of {study.data_name}; space {study.space_name}; "
            f"{progress_text(study, found.finished)}"
        )
    write_output(path, page(title, sections, subtitle=subtitle, footer=_footer(found)), folders=True)
    return found.notes


def sections_of(data: StudyData) -> list[Section]:
    """The sections of a study's report, without those that have nothing to show."""
    made = [
        (name, getattr(import_module(f"hpo.report.{module}"), function)(data)) for name, module, function in SECTIONS
    ]
    return [replace(section, short=name) for name, section in made if section is not None]


def _footer(data: StudyData) -> list[str]:
    from hpo.study.versions import versions

    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*(f"Not shown: {note}" for note in data.notes), f"Written {now} by hpo report: {packages}."]
