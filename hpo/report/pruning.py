"""The sections on the pruner's safety and on best values at an edge of the space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from core.text import count
from hpo.analysis.pruning import Agreement, LetThrough, agreement, fraction_interval, let_through
from hpo.analysis.study_data import StudyData, value_of
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.charts import Look, around, trial_marks
from hpo.report.page import Section, code, figure, heading, listing, note, section, side_by_side, table
from hpo.report.words import metric_label, run_again, trial_name
from hpo.space import RungsPruner
from hpo.space.pruner import lets_through, places_of
from hpo.text import percent, score, sentence, together
from hpo.trials import FAILURE, LET_THROUGH, RUNG_LOSS


def pruner_safety(data: StudyData) -> Section | None:
    """The agreement at each rung, and what pruning lost; None without rungs."""
    if not data.rungs or not data.complete:
        return None
    agreements = [agreement(data, rung) for rung in data.rungs]
    passed = let_through(data)
    explanation = (
        "ρ is Spearman's rank correlation among the trials that ran to the end, with its 95 % interval: 1 is the same "
        "order, 0 none. These trials are a selected sample, since the pruner removed the worst; among all trials a "
        "rung mostly predicts more than ρ shows. Trials let through on purpose correct for that, and are included."
    )
    if any(key.startswith(RUNG_LOSS) for trial in data.trials for key in trial.system_attrs):
        explanation += " Rungs rank by the validation loss at the best temperature, which is less noisy than accuracy."
    return section(
        "pruner",
        "Pruner safety",
        f"{_order_text(data, agreements)} {_loss_text(data, passed)}",
        _rungs_table(data, agreements),
        note(explanation),
        side_by_side(_scatter(data, found) for found in agreements),
        heading("What pruning lost"),
        _let_through_table(data, passed) if passed else _none_let_through(data),
    )


def rung_text(data: StudyData, rung: int) -> str:
    """The place of a rung: `epoch 6`; with folds, `epoch 6 of fold 1` or `the end of fold 2`."""
    fold, epoch = divmod(rung - 1, data.run_epochs)
    if data.folds > 1 and epoch + 1 == data.run_epochs:
        return f"the end of fold {fold + 1}"
    return f"epoch {epoch + 1}" + (f" of fold {fold + 1}" if data.folds > 1 else "")


def _rungs_table(data: StudyData, agreements: Sequence[Agreement]) -> Markup:
    places = [places_of(trial) for trial in data.trials]
    rows = []
    for found in agreements:
        judged = [at[found.rung] for at in places if found.rung in at]
        cut = sum(not place.kept for place in judged)
        through = sum(trial.user_attrs.get(LET_THROUGH) == found.rung for trial in data.trials)
        rows.append(
            (
                together(rung_text(data, found.rung)),
                percent(data.rungs[found.rung]),
                len(judged),
                cut - through,
                through,
                len(found.points),
                "–" if found.rho is None else f"{found.rho:.2f}",
                "–" if found.interval is None else "{:.2f} to {:.2f}".format(*found.interval),
            )
        )
    columns = ("rung", "keeps", "judged", "pruned", "let through", "ran to the end", "ρ", "95 % interval")
    return table(columns, rows, right=range(1, 8))


def _order_text(data: StudyData, agreements: Sequence[Agreement]) -> str:
    ended = count(len(data.complete), "trial")
    known = [f"{found.rho:.2f} at {rung_text(data, found.rung)}" for found in agreements if found.rho is not None]
    if not known:
        return f"{ended} ran to the end: too few to compare a rung's order with the final one."
    return (
        f"Among the {ended} that ran to the end, the order at a rung agrees with the final order by a rank correlation "
        f"of {', '.join(known)}."
    )


def _loss_text(data: StudyData, passed: Sequence[LetThrough]) -> str:
    gains = [each.gain for each in passed if each.gain is not None]
    if not gains:
        return "What the pruned trials would have scored is unknown: none was let through to its end."
    better, best = sum(gain > 0 for gain in gains), max(gains)
    of = f"Of the {count(len(gains), 'trial')} that a rung would have pruned and that continued on purpose"
    label = metric_label(data.metric)
    if better:
        return f"{of}, {better} ended better than all others, by {score(best)} {label}."
    apart = f"{score(-best)} {label} {'below' if data.maximize else 'above'} the best"
    return f"{of}, none ended better than the best of the others; the nearest is {apart if best else 'as good'}."


def _let_through_table(data: StudyData, passed: Sequence[LetThrough]) -> list[Markup]:
    rows = []
    for each in sorted(passed, key=lambda each: math.inf if each.gain is None else -each.gain):
        place = places_of(each.trial).get(each.rung)
        rows.append(
            (
                together(trial_name(each.trial)),
                rung_text(data, each.rung),
                "–" if place is None else place.standing,
                score(each.trial.intermediate_values.get(each.rung)),
                score(each.trial.value) if each.gain is not None else _state(each.trial),
                "–" if each.gain is None else f"{each.gain:+.4f}",
            )
        )
    label = f"{metric_label(data.metric)} there"
    columns = ("trial", "would have been pruned at", "rank there", label, "at the end", "better than the best other by")
    gains = [each.gain for each in passed if each.gain is not None]
    body = table(columns, rows, right=(3, 4, 5))
    if not gains:
        return [body]
    better = sum(gain > 0 for gain in gains)
    low, high = fraction_interval(better, len(gains))
    words = (
        "They were chosen by their index alone, so they are a fair sample of the pruned trials. "
        f"{better} of {len(gains)} ended better than the best: of all pruned trials, {percent(low)} to "
        f"{percent(high)} might have (95 % interval). A larger `pruner.let_through` narrows the interval, and "
        "costs more full trials."
    )
    return [body, note(words)]


def _state(trial: FrozenTrial) -> str:
    """The state of a trial without a final value."""
    if FAILURE in trial.user_attrs:
        return str(trial.user_attrs[FAILURE])
    return {TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}.get(trial.state, "pruned later")


def _none_let_through(data: StudyData) -> list[str]:
    share = data.space.pruner.let_through if data.space and isinstance(data.space.pruner, RungsPruner) else 0.0
    chosen = [trial_index for trial_index in range(len(data.trials)) if lets_through(trial_index, share)]
    why = f"With `pruner.let_through` at {share:g}, "
    if not share:
        why = "This study lets no trial through (`pruner.let_through` is 0)."
    elif chosen:
        indices = ", ".join(map(str, chosen))
        why += f"trials of index {indices} would continue past a rung that prunes them, and none was pruned."
    else:
        first = next(trial_index for trial_index in range(math.ceil(1 / share) + 1) if lets_through(trial_index, share))
        why += f"the trial of index {first} is the first to continue past a rung that prunes it: this study is shorter."
    return [
        f"{why} To measure what pruning loses, let more trials through; add `--trials` to continue:",
        code(f"{run_again(data.study)} --set pruner.let_through=0.1"),
    ]


def _scatter(data: StudyData, found: Agreement) -> Markup:
    """The complete trials at a rung and at the end; those pruned there are strokes at the bottom."""
    rung, label, where = found.rung, metric_label(data.metric), rung_text(data, found.rung)
    cut = [t for t in data.pruned if t.last_step == rung and math.isfinite(t.intermediate_values.get(rung, math.nan))]
    values = [value_of(trial) for trial in data.complete]
    floor = around(values, 0.08)[0]
    through = [trial for trial in data.complete if LET_THROUGH in trial.user_attrs]
    fig = go.Figure()
    for trials, name, look in (
        (cut, "pruned here, end unknown", Look(GREY, "line-ns-open", 9, 1.2)),
        ([t for t in data.complete if t not in through], "ran to the end", Look(BLUE, "circle", 7, 1.2, "white")),
        (through, "let through", Look(ORANGE, "diamond", 10, 1.2, "white")),
    ):
        early = [trial.intermediate_values.get(rung) for trial in trials]
        final = [floor if trials is cut else value_of(trial) for trial in trials]
        fig.add_trace(trial_marks(data, trials, early, final, look, "<br>at the rung %{x}", name=name))
    fig.add_hline(y=(max if data.maximize else min)(values), line={"color": INK, "dash": "dot", "width": 1})
    fig.update_xaxes(title_text=f"{label} at {where}")
    fig.update_yaxes(title_text=f"final {label}", range=around(values, 0.16))
    fig.update_layout(legend={"font": {"size": 11}})
    alt = (
        f"Final against early {label} at {where}, {count(len(found.points), 'finished trial')} and {len(cut)} that "
        "were pruned there; the dotted line is the best"
    )
    return figure(fig, alt=alt, height=360)


# Edges --------------------------------------------------------------------------------------------------------------


def edges(data: StudyData) -> Section | None:
    """The parameters whose best values are at a bound of the space, each with the line that widens it."""
    from hpo.analysis.evidence import read_evidence
    from hpo.analysis.suggest import edges as edges_of

    if data.space is None or not data.complete:
        return None
    found = edges_of(data.study, data.space)
    if not found:
        few = read_evidence(data.study).too_few
        lead = (
            f"Whether the best values are at a bound is unknown: {few}."
            if few
            else "No best value is at a bound of its range, so the space need not be wider."
        )
        return section("edges", "Edges", lead)
    bounds = {"low": "lower", "high": "upper"}
    places = [f"the best values of `{each.path}` are at its {bounds[each.bound]} bound" for each in found]
    it, bound = ("it", "its bound") if len(found) == 1 else ("them", "bounds")
    return section(
        "edges",
        "Edges",
        f"{sentence('; '.join(places))}: values beyond have not been tried, so widen {it}.",
        listing([each.words for each in found]),
        f"In the space, under `search:`, with {bound} moved:",
        code("\n".join(each.yaml_line for each in found)),
        note(
            f"`hpo space suggest {data.study.name}` writes the whole space so; a new study on it starts from the "
            "trials that still fit, by `--take-over`."
        ),
    )
