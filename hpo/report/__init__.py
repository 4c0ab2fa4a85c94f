"""A study as one HTML file that needs no network: the answer first, then what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.analysis.facts import Facts
    from hpo.report.page import Section
    from hpo.study import Study

__all__ = ["write_report"]


def write_report(study: Study, path: Path, *, data: Path | None = None, compare: Sequence[Study] = ()) -> list[str]:
    """Writes the report, whole or not at all; returns what could not be shown and why, a line each.

    Args:
        data: where the images are, in place of where the study had them.
        compare: studies to be set beside it; the page is then a comparison, without the sections of one study.

    Raises:
        StudyError: the file cannot be written, or what the study's folder holds cannot be read.
    """
    from hpo.analysis.facts import gather
    from hpo.report.page import page

    facts = gather(study, data=data)
    if compare:
        from hpo.report.compare import comparison, title_of

        others = [gather(each) for each in compare]
        title, under = title_of([facts, *others]), f"{1 + len(others)} studies side by side"
        sections = comparison([facts, *others])
    else:
        title, under, sections = f"Study {study.name}", _under(facts), sections_of(facts)
    text = page(title, sections, under=under, foot=_foot(facts))
    _write(path, text)
    return facts.notes


def _write(path: Path, text: str) -> None:
    """Writes the file, whole or not at all."""
    from hpo.errors import StudyError
    from hpo.storage.atomic import replacing

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path} cannot be written ({error.strerror}); give another place by --output") from error


def order() -> Sequence[tuple[str, Callable[[Facts], Section | None]]]:
    """The sections of a study's report, as they follow one another, each with its name in the navigation."""
    from hpo.report import about, answer, costs, failures, figures, images, pruning, rivals

    return (
        ("Answer", answer.answer),
        ("Rivals", rivals.rivals),
        ("History", figures.history),
        ("Curves", figures.learning_curves),
        ("Importances", figures.importances),
        ("Slices", figures.slices),
        ("Edges", pruning.edges),
        ("Parallel", figures.parallel_coordinates),
        ("Pruner", pruning.pruner_safety),
        ("Failures", failures.failures),
        ("Cost", costs.costs),
        ("Confusion", images.confusion),
        ("Classes", images.per_class),
        ("Mistakes", images.confident_errors),
        ("Augmentation", images.augmented_samples),
        ("Study", about.about),
    )


def sections_of(facts: Facts) -> list[Section]:
    """The sections that have something to say of the study."""
    made = ((name, make(facts)) for name, make in order())
    return [replace(section, short=name) for name, section in made if section is not None]


def _under(facts: Facts) -> str:
    from hpo.analysis.summary import how_far

    study = facts.study
    return (
        f"{facts.metric_words} on the validation images of {study.data_name}; space {study.space_name}; "
        f"{how_far(study, facts.finished)}"
    )


def _foot(facts: Facts) -> str:
    from hpo.report.page import paragraph
    from hpo.study.versions import versions

    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with_what = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"Not shown: {note}" for note in facts.notes]
    return "".join(map(paragraph, [*lines, f"Written {now} by hpo report: {with_what}."]))
