"""The section on the Pareto front of a study with costs beside the score."""

from __future__ import annotations

from itertools import accumulate

import plotly.graph_objects as go

from core.text import count
from hpo.analysis.study_data import StudyData
from hpo.dashboard.pictures import INK, ORANGE
from hpo.report.charts import LOOKS, Look, around, best_so_far, log_axis, trial_marks
from hpo.report.page import Section, columns, figure, section, table
from hpo.report.words import metric_label
from hpo.study.front import front, front_table, points
from hpo.study.front import shown as cost_text
from hpo.text import joined
from hpo.trials import is_baseline

_LABELS = {"params": "parameters", "latency": "latency (ms an image)", "size": "weights (MB)"}
_LOG_FROM = 5.0  # costs that differ by more than this factor are drawn on a logarithmic axis


def pareto_front(data: StudyData) -> Section | None:
    """The score over each cost; None without measured costs."""
    shown = front_table(data.study)
    if shown is None:
        return None
    names = shown.columns[2:]
    lead = (
        f"The diamonds are the Pareto front, {len(shown.rows)} of {count(len(points(data.study)), 'complete trial')}: "
        f"no trial beats these in {joined(shown.columns[1:])}. The line is the best score up to a cost."
    )
    charts = [figure(front_figure(data, name), alt=f"Validation score over {_LABELS[name]}. {lead}") for name in names]
    first, *others = charts
    return section(
        "front",
        "Pareto front",
        lead,
        columns(first, table(shown.columns, shown.rows, right=range(len(shown.columns))), *others),
    )


def front_figure(data: StudyData, name: str) -> go.Figure:
    """The scores of the complete trials over a cost, the front marked."""
    found = sorted(points(data.study), key=lambda point: point.costs[name])
    best, trials = front(found, data.study.sign), {trial.number: trial for trial in data.complete}
    x = [point.costs[name] for point in found]
    reached = list(accumulate((point.value for point in found), max if data.maximize else min))
    line = best_so_far(x, reached, name="best up to this cost", line={"color": INK}, hoverinfo="skip")
    baseline = [point for point in found if is_baseline(trials[point.trial])]
    fig = go.Figure(line)
    for label, shown, look in (
        ("complete", [point for point in found if point not in best], LOOKS["complete"]),
        ("Pareto front", best, Look(INK, "diamond", 11)),
        ("baseline", baseline, Look(ORANGE, "square-open", 16, 2)),
    ):
        places = [point.costs[name] for point in shown], [point.value for point in shown]
        of, costs = [trials[point.trial] for point in shown], [cost_text(name, point.costs[name]) for point in shown]
        trace = trial_marks(data, of, *places, look, "<br>%{customdata}", name=label)
        if shown:
            fig.add_trace(trace.update(customdata=costs))
    if x[0] > 0 and x[-1] > _LOG_FROM * x[0]:
        axis = log_axis(x[0], x[-1])
        axis["ticktext"] = [cost_text(name, tick) for tick in axis["tickvals"]]
    else:
        axis = {"range": around(x)}
    fig.update_xaxes(title_text=_LABELS[name], **axis)
    fig.update_yaxes(title_text=f"validation {metric_label(data.metric)}", range=around([p.value for p in found]))
    return fig
