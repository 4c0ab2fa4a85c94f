"""The section on images whose labels are probably wrong."""

from __future__ import annotations

from core.text import count
from hpo.analysis.labels import Suspect, audit_labels
from hpo.analysis.study_data import StudyData
from hpo.report.images import image_sheet
from hpo.report.page import Section, code, folded, paragraph, section, table
from hpo.report.words import audit_text, command
from hpo.text import percent

_SHOWN = 24
_COLUMNS = ("image", "label", "suggested", "p(label)", "p(suggested)")


def suspect_labels(data: StudyData) -> Section | None:
    """A sheet and a table of the images that networks trained without them predict as another class."""
    dataset = data.dataset
    if dataset is None:
        return None  # the section on confusion states what is missing
    audit = audit_labels(data.study, dataset.labels.numpy(), dataset.ids, dataset.classes)
    if not audit.networks:
        return None
    lead, *more = (f"{line[0].upper()}{line[1:]}." for line in audit_text(data.study, audit))
    notes = [paragraph(each) for each in more]
    if not audit.suspects:
        return section("labels", "Labels", lead, notes)
    shown = audit.suspects[:_SHOWN]
    errors = [
        {"index": one.index, "true": one.label, "predicted": one.suggested, "confidence": one.suggested_probability}
        for one in shown
    ]
    advice = "Look at each: some are wrong labels, others difficult images. All of them as CSV:"
    return section(
        "labels",
        "Labels",
        lead,
        notes,
        image_sheet(dataset, errors, alt=f"The {count(len(shown), 'image')} with the most suspicious labels"),
        folded("the names of these images", table(_COLUMNS, [_row(one) for one in shown], right=(3, 4))),
        paragraph(advice),
        code(command(data.study, "data audit") + " --csv"),
    )


def _row(suspect: Suspect) -> tuple[str, ...]:
    chances = (percent(chance, 1) for chance in (suspect.label_probability, suspect.suggested_probability))
    return (suspect.id, suspect.label, suspect.suggested, *chances)
