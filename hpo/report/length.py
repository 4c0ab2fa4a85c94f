"""The section on the length of trainings: the length probe before the search, and the ladder of the refit."""

from __future__ import annotations

from hpo.analysis.study_data import StudyData
from hpo.report.page import Section, listing, note, paragraph, section, table
from hpo.report.words import metric_label
from hpo.search.length import probe_of
from hpo.submission.ladder import read_ladder
from hpo.text import duration, score, sentence


def length(data: StudyData) -> Section | None:
    """The section; None if no length was compared."""
    probe, ladder = probe_of(data.study.settings.length_probe), read_ladder(data.study.paths.ladder)
    if probe is None and ladder is None:
        return None
    taken = probe is not None and data.space is not None and data.space.baseline.epochs == probe.advised
    predicted = [] if probe is None else probe.lines(taken=taken)
    body = []
    if ladder is not None and ladder.rungs:
        rows = [
            [
                rung.name,
                str(rung.epochs),
                "–" if rung.failure else score(rung.score),
                "–" if rung.gain is None else f"{rung.gain.value:+.4f} ± {rung.gain.error:.4f}",
                str(rung.replicates),
                duration(rung.elapsed_s),
            ]
            for rung in ladder.rungs
        ]
        columns = ["", "epochs", metric_label(data.metric), "better than half the epochs by", "n", "time"]
        body += [
            table(columns, rows, right=range(1, len(columns))),
            listing([sentence(line) for line in ladder.lines()[len(ladder.rungs) :]]),
            note("± is one standard error, n the number of seeds and splits, new to the search."),
        ]
    body += [paragraph(sentence(f"before the search: {line}")) for line in predicted]
    lead = sentence(predicted[-1] if ladder is None else ladder.verdict)
    return section("length", "Length of the training", f"{lead}.", body)
