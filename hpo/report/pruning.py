"""Whether the pruner can be trusted: does a rung's order foretell the final one, and what did cutting lose?

Two questions, and neither has its answer in the trials that were cut, whose final value nobody knows. So the first is
answered by the trials that ran to their end, with the rank correlation of Spearman between the value at a rung and the
final value. They are a selected sample: whoever was cut is not in it, and the correlation among survivors is mostly
lower than among all. The second is answered by the few trials that `pruner.let_through` let go on from the rung that
would have cut them: a fair sample of what is cut.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from hpo.analysis.facts import Facts, name_of, value_of
from hpo.dashboard.pictures import BLUE, GREY, INK, ORANGE
from hpo.report.page import Section, code, figure, heading, listing, paragraph, side_by_side, table
from hpo.space import RungsPruner
from hpo.space.pruner import Place, lets_through, places_of
from hpo.text import count, percent, score, together
from hpo.trials import FAILURE, LET_THROUGH, trial_index_of

FEWEST = 4
"""Trials below which a rank correlation has no interval: its variance divides by n - 3."""
Z95 = statistics.NormalDist().inv_cdf(0.975)


# What is computed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far the order of the finished trials at a rung is their final order."""

    rung: int
    points: tuple[tuple[float, float], ...]
    """(value at the rung, final value) of each trial that has both."""
    rho: float | None
    """Spearman's rank correlation; None of fewer than three trials, or where all are equal."""
    interval: tuple[float, float] | None
    """95 %; None of fewer than `FEWEST` trials, or of a perfect agreement, which has no spread to go by."""


@dataclass(frozen=True)
class Passed:
    """A trial that was let through, and what became of it."""

    trial: FrozenTrial
    rung: int
    """Where it would have been cut."""
    gain: float | None
    """By how much its final value is better than the best of all others; None where it has none."""


def agreement(facts: Facts, rung: int) -> Agreement:
    """The rank correlation between the value at the rung and the final value, among the complete trials."""
    found = [(trial.intermediate_values.get(rung, math.nan), value_of(trial)) for trial in facts.complete]
    points = tuple((early, final) for early, final in found if math.isfinite(early))
    rho = spearman([early for early, _ in points], [final for _, final in points])
    return Agreement(rung, points, rho, None if rho is None else fisher_interval(rho, len(points)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation of paired values; None of fewer than three pairs, or where all of one are equal."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(spearmanr(a, b).statistic)


def fisher_interval(rho: float, n: int) -> tuple[float, float] | None:
    """The 95 % interval of a rank correlation, by Fisher's z with the variance of Bonett and Wright (2000,
    Psychometrika 65): (1 + rho² / 2) / (n - 3)."""
    if n < FEWEST or abs(rho) > 1 - 1e-12:
        return None
    half = Z95 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def share_interval(k: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a share that was seen in k of n (Clopper and Pearson 1934, Biometrika 26)."""
    from scipy.special import betaincinv

    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 0.025))
    return low, 1.0 if k == n else float(betaincinv(k + 1, n - k, 0.975))


def let_through(facts: Facts) -> list[Passed]:
    """The trials that were let through on purpose, each held against the best of those that were not."""
    others = [value_of(trial) for trial in facts.complete if LET_THROUGH not in trial.user_attrs]
    best = (max if facts.maximize else min)(others, default=None)
    return [
        Passed(
            trial,
            int(trial.user_attrs[LET_THROUGH]),
            facts.gain(value_of(trial), best) if trial.state == TrialState.COMPLETE and best is not None else None,
        )
        for trial in facts.trials
        if LET_THROUGH in trial.user_attrs
    ]


# What is shown -----------------------------------------------------------------------------------------------------


def pruner_safety(facts: Facts) -> Section | None:
    """The agreement at each rung, and the regret; None with another pruner than the rungs'."""
    if not facts.rungs or not facts.complete:
        return None
    agreements = [agreement(facts, rung) for rung in facts.rungs]
    passed = let_through(facts)
    body = [
        _rungs_table(facts, agreements),
        paragraph(
            "ρ is Spearman's rank correlation among the trials that ran to their end, with its 95 % interval: 1 is the "
            "same order, 0 none. These trials are a selected sample, for the pruner has taken out whoever looked bad; "
            "among all trials a rung mostly foretells more than ρ says. Trials let through on purpose correct for "
            "that, and are among the points.",
            kind="note",
        ),
        side_by_side([_scatter(facts, found) for found in agreements]),
        heading("What cutting has lost"),
        *(_regret(facts, passed) if passed else _none_let_through(facts)),
    ]
    lead = f"{_order_words(facts, agreements)} {_regret_words(facts, passed)}"
    return Section("pruner", "The pruner's safety", lead, "\n".join(body))


def rung_words(facts: Facts, rung: int) -> str:
    """A rung's place in the run: `epoch 6`; with folds, `epoch 6 of fold 1`, or `the end of fold 2`."""
    if facts.folds == 1:
        return f"epoch {rung}"
    fold, epoch = divmod(rung - 1, facts.run_epochs)
    return f"the end of fold {fold + 1}" if epoch + 1 == facts.run_epochs else f"epoch {epoch + 1} of fold {fold + 1}"


def _rungs_table(facts: Facts, agreements: Sequence[Agreement]) -> str:
    places = [places_of(trial) for trial in facts.trials]
    rows = []
    for found in agreements:
        judged = [at[found.rung] for at in places if found.rung in at]
        cut = sum(not place.kept for place in judged)
        through = sum(trial.user_attrs.get(LET_THROUGH) == found.rung for trial in facts.trials)
        rows.append(
            (
                together(rung_words(facts, found.rung)),
                percent(facts.rungs[found.rung]),
                len(judged),
                cut - through,
                through,
                len(found.points),
                "–" if found.rho is None else f"{found.rho:.2f}",
                "–" if found.interval is None else "{:.2f} to {:.2f}".format(*found.interval),
            )
        )
    columns = ("rung", "keeps", "judged", "cut", "let through", "ran to the end", "ρ", "95 % interval")
    return table(columns, rows, right=range(1, 8))


def _order_words(facts: Facts, agreements: Sequence[Agreement]) -> str:
    known = [(found, found.rho) for found in agreements if found.rho is not None]
    if not known:
        return (
            f"{count(len(facts.complete), 'trial')} ran to the end: too few to say whether a rung's order is the "
            "final one."
        )
    words = ", ".join(f"{rho:.2f} at {rung_words(facts, found.rung)}" for found, rho in known)
    return (
        f"Among the {count(len(facts.complete), 'trial')} that ran to the end, the order at a rung agrees with the "
        f"final order by a rank correlation of {words}."
    )


def _regret_words(facts: Facts, passed: Sequence[Passed]) -> str:
    gains = [each.gain for each in passed if each.gain is not None]
    if not gains:
        return "What the cut trials would have come to is not known: none was let through to its end."
    better, best = sum(gain > 0 for gain in gains), max(gains)
    of = f"Of the {count(len(gains), 'trial')} that a rung would have cut and that went on on purpose"
    if better:
        return f"{of}, {better} came out better than all others, by {score(best)} {facts.metric_words}."
    near = "as good as the best" if best == 0 else f"{score(-best)} {facts.metric_words} below the best"
    near = near if facts.maximize else near.replace("below", "above")
    return f"{of}, none came out better than the best of the others; the nearest ended {near}."


def _regret(facts: Facts, passed: Sequence[Passed]) -> list[str]:
    rows = [
        (
            together(name_of(each.trial)),
            rung_words(facts, each.rung),
            _standing(each.trial, each.rung),
            score(each.trial.intermediate_values.get(each.rung)),
            score(each.trial.value) if each.gain is not None else _state(each.trial),
            "–" if each.gain is None else f"{each.gain:+.4f}",
        )
        for each in sorted(passed, key=lambda each: -math.inf if each.gain is None else each.gain, reverse=True)
    ]
    columns = (
        "trial",
        "would have been cut at",
        "its place there",
        f"{facts.metric_words} there",
        "at the end",
        "better than the best other by",
    )
    return [table(columns, rows, right=(3, 4, 5)), *_certainty(passed)]


def _certainty(passed: Sequence[Passed]) -> list[str]:
    """How much so few can say of all that was cut."""
    gains = [each.gain for each in passed if each.gain is not None]
    if not gains:
        return []
    better = sum(gain > 0 for gain in gains)
    low, high = share_interval(better, len(gains))
    return [
        paragraph(
            f"They were chosen by their slot alone, so they are a fair sample of what is cut. {better} of {len(gains)} "
            f"better than the best: of all that was cut, {percent(low)} to {percent(high)} may have been (95 % "
            "interval). A larger `pruner.let_through` says it more closely, and costs more trials in full.",
            kind="note",
        )
    ]


def _none_let_through(facts: Facts) -> list[str]:
    """Why none was let through, and how to have some."""
    share = facts.space.pruner.let_through if facts.space and isinstance(facts.space.pruner, RungsPruner) else 0.0
    chosen = [trial_index for trial_index in range(len(facts.trials)) if lets_through(trial_index, share)]
    if not share:
        why = "This study lets none through (`pruner.let_through` is 0)."
    elif not chosen:
        first = next(trial_index for trial_index in range(math.ceil(1 / share) + 1) if lets_through(trial_index, share))
        why = (
            f"With `pruner.let_through` at {share:g}, slot {first} is the first whose trial would go on where a rung "
            "cuts it: this study is shorter."
        )
    else:
        trial_indices = ", ".join(map(str, chosen))
        rule = f"With `pruner.let_through` at {share:g}, slot {trial_indices} would go on where a rung cuts it"
        why = f"{rule}, and none was cut."
    command = facts.study.command or f"hpo run {facts.study.space_name} --study {facts.study.name}"
    return [
        paragraph(f"{why} To learn what cutting loses, let more of them go on; this study can, with more `--trials`:"),
        code(f"{command} --set pruner.let_through=0.1"),
    ]


def _standing(trial: FrozenTrial, rung: int) -> str:
    place: Place | None = places_of(trial).get(rung)
    return "–" if place is None else place.standing


def _state(trial: FrozenTrial) -> str:
    """What became of a trial that has no final value."""
    if FAILURE in trial.user_attrs:
        return str(trial.user_attrs[FAILURE])
    return {TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}.get(trial.state, "cut after all")


def _scatter(facts: Facts, found: Agreement) -> str:
    """The finished trials at a rung and at the end; whoever was cut there is a stroke at the bottom."""
    rung = found.rung
    kept: list[FrozenTrial] = [t for t in facts.complete if LET_THROUGH not in t.user_attrs]
    through: list[FrozenTrial] = [t for t in facts.complete if LET_THROUGH in t.user_attrs]
    cut = [
        trial
        for trial in facts.pruned
        if trial.last_step == rung and math.isfinite(trial.intermediate_values.get(rung, math.nan))
    ]
    values = [value_of(trial) for trial in facts.complete]
    floor = min(values) - 0.08 * ((max(values) - min(values)) or 0.01)
    fig = go.Figure()
    fig.add_trace(_points(cut, rung, [floor] * len(cut), "cut here, end unknown", GREY, "line-ns-open", 9))
    fig.add_trace(_points(kept, rung, [value_of(t) for t in kept], "ran to the end", BLUE, "circle", 7))
    fig.add_trace(_points(through, rung, [value_of(t) for t in through], "let through", ORANGE, "diamond", 10))
    best = facts.best
    assert best is not None, "there are complete trials"
    fig.add_hline(y=value_of(best), line={"color": INK, "dash": "dot", "width": 1})
    where = rung_words(facts, rung)
    fig.update_layout(
        xaxis_title=f"{facts.metric_words} at {where}",
        yaxis_title=f"final {facts.metric_words}",
        legend={"font": {"size": 11}},
    )
    what = f"Final against early {facts.metric_words} at {where}, {count(len(found.points), 'finished trial')}"
    return figure(fig, alt=f"{what} and {len(cut)} that were cut there; the dotted line is the best", height=360)


def _points(
    trials: Sequence[FrozenTrial], rung: int, y: Sequence[float], name: str, color: str, symbol: str, size: int
) -> go.Scatter:
    return go.Scatter(
        x=[trial.intermediate_values.get(rung) for trial in trials],
        y=list(y),
        mode="markers",
        name=name,
        marker={
            "color": color,
            "symbol": symbol,
            "size": size,
            "line": {"width": 1.2, "color": color if symbol.endswith("open") else "white"},
        },
        text=[f"{name_of(trial)}, slot {trial_index_of(trial)}" for trial in trials],
        hovertemplate="%{text}<br>at the rung %{x}<br>at the end %{y}<extra></extra>"
        if not symbol.endswith("open")
        else "%{text}<br>at the rung %{x}<extra></extra>",
    )


# Edges -------------------------------------------------------------------------------------------------------------


def edges(facts: Facts) -> Section | None:
    """The parameters whose best values lie at a bound of the space, each with the line that widens it."""
    from hpo.analysis.evidence import gather
    from hpo.analysis.suggest import edges as edges_of

    if facts.space is None or not facts.complete:
        return None
    found = edges_of(facts.study, facts.space)
    title = "Edges"
    if not found:
        few = gather(facts.study).too_few
        lead = (
            f"Whether the best values lie at a bound cannot be told: {few}."
            if few
            else "No best value lies at a bound of its range, so nothing asks for a wider space."
        )
        return Section("edges", title, lead, "")
    bounds = {"low": "lower", "high": "upper"}
    places = [f"the best values of `{each.path}` lie at its {bounds[each.bound]} bound" for each in found]
    words = "; ".join(places)
    it = "it" if len(found) == 1 else "them"
    lead = f"{words[0].upper()}{words[1:]}: what lies beyond has not been tried, so widen {it}."
    body = [
        listing([each.words for each in found]),
        paragraph(
            f"As it stands in the space, under `search:`, with {'its bound' if len(found) == 1 else 'bounds'} moved:"
        ),
        code("\n".join(each.yaml_line for each in found)),
        paragraph(
            f"`hpo space suggest {facts.study.name}` writes the whole space so; a new study on it starts from the "
            "trials that still fit, by `--take-over`.",
            kind="note",
        ),
    ]
    return Section("edges", title, lead, "\n".join(body))
