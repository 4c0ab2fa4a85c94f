"""Markdown notes of trials and studies in optuna-dashboard, above or below text of the user, which stays.

optuna-dashboard is imported when the first note is written: it takes a second, nearly all of it scikit-learn.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optuna.artifacts import get_all_artifact_meta

from core.text import count
from hpo.space import SearchSpace
from hpo.space.pruner import places_of, spared
from hpo.storage import is_masked
from hpo.storage.optuna_access import trial_by_number
from hpo.study import Study
from hpo.study.front import front_table
from hpo.text import PARTLY_LUCK, changed_fields, duration, sentence, short
from hpo.trials import LET_THROUGH, PAUSED

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from hpo.trials import Outcome

_CLOSING = "\n---\n*hpo writes the text above; text below this line stays.*\n"
_OLD_CLOSING = "\n---\n*The above is written by hpo; what is written below stays.*\n"


def note_trial(study: Study, space: SearchSpace, trial: Trial, outcome: Outcome, *, device: str) -> None:
    """Write the note of a running trial that is about to end or pause, with links to the artifacts attached so far."""
    from optuna_dashboard import get_note, save_note  # type: ignore[attr-defined]
    from optuna_dashboard.artifact import get_artifact_path  # type: ignore[attr-defined]

    links = {meta.filename: get_artifact_path(trial, meta.artifact_id) for meta in get_all_artifact_meta(trial)}
    body = trial_note(space, outcome, trial_by_number(study.optuna, trial.number), device=device, links=links)
    written = get_note(trial)
    if outcome.state == "paused" or PAUSED in trial.user_attrs:
        body = _with_users_text(body, written)
    elif written:
        body = f"{body}\n---\n{written}"
    save_note(trial, body)


def trial_note(
    space: SearchSpace, outcome: Outcome, trial: FrozenTrial, *, device: str, links: Mapping[str, str]
) -> str:
    """Describe a trial as Markdown: its result, why it ended, its differences from the baseline, and links to files."""
    lines = [f"## Trial {outcome.number}: {_headline(space, outcome)}", "", _how_it_ended(space, outcome), ""]
    lines += [f"- {fact}" for fact in _facts(outcome, trial, device)]
    if links:
        lines.append(f"- files: {', '.join(f'[{name}]({link})' for name, link in links.items())}")
    differences = _differences(space, outcome)
    if not differences:
        return "\n".join([*lines, "", "It trained the baseline."]) + "\n"
    lines += ["", "| differs from the baseline in | baseline | here |", "|---|---|---|"]
    lines += [f"| `{path}` | {_plain(old)} | {_plain(new)} |" for path, old, new in differences]
    return "\n".join(lines) + "\n"


def _headline(space: SearchSpace, outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"failed, {outcome.failure}"
    if outcome.value is None:
        return outcome.state
    at_end = {"complete": "", "pruned": ", pruned", "paused": f" at epoch {len(outcome.history)}"}[outcome.state]
    return f"{space.metric} {outcome.value:.4f}{at_end}"


def _how_it_ended(space: SearchSpace, outcome: Outcome) -> str:
    epochs = space.baseline.epochs * (space.baseline.data.folds or 1)
    trained = f"{len(outcome.history)} of {epochs} epochs"
    if outcome.failure is not None:
        return f"Ended after {trained}: {_plain(outcome.why or outcome.failure)}."
    if outcome.state == "pruned":
        return f"Pruned after {trained}: {_plain(outcome.why.removesuffix(', pruned') or 'by the pruner')}."
    if outcome.state == "paused":
        return f"Paused after {trained}. It continues if it is promoted, and is pruned otherwise."
    kept = outcome.attributes.get("kept_epoch")
    each = " of each fold" if space.baseline.data.folds else ""
    return f"Trained {trained}" + (f"; value and weights are those of epoch {kept}{each}." if kept else ".")


def _facts(outcome: Outcome, trial: FrozenTrial, device: str) -> Iterator[str]:
    if role := spared(trial):
        yield f"{_plain(role)}, which is never pruned"
    if LET_THROUGH in trial.user_attrs:
        yield f"exempt from pruning at rung {trial.user_attrs[LET_THROUGH]}, to check the pruner"
    if outcome.replicate_of is not None:
        yield f"the same parameters as trial index {outcome.replicate_of}, with another seed"
    kept = {rung: place for rung, place in places_of(trial).items() if place.kept}
    if kept:
        yield "passed " + ", ".join(f"rung {rung} as {place.standing}" for rung, place in kept.items())
    if outcome.history:
        last = outcome.history[-1]
        yield f"{duration(last.elapsed_s)} on {_plain(device)}, {last.images_per_s:,.0f} images/s"


def _differences(space: SearchSpace, outcome: Outcome) -> list[tuple[str, Any, Any]]:
    """(field, value in the baseline, value in the trial) where they differ, without the seed."""
    baseline = space.baseline.flat()
    if outcome.config is not None:
        trained = outcome.config.flat()
    else:  # the parameters make no valid configuration
        searched = space.search
        decoded = {path: searched[path].decode(value) for path, value in outcome.params.items() if path in searched}
        trained = baseline | outcome.params | decoded
    return changed_fields(baseline, trained)


def _plain(value: Any) -> str:
    """A value as text without Markdown markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", short(value))


def note_study(study: Study, space: SearchSpace) -> None:
    """Write the note of a study, in place of the one before; text of the user below it stays."""
    from optuna_dashboard import get_note, save_note  # type: ignore[attr-defined]

    written = get_note(study.optuna).replace(_OLD_CLOSING, _CLOSING)
    body = _with_users_text(study_note(study, space), written)
    if body != written:
        save_note(study.optuna, body)


def _with_users_text(body: str, written: str) -> str:
    """Replace the text above the closing line of a note."""
    _, closing, users = written.rpartition(_CLOSING)
    return body + _CLOSING + (users if closing else written)


def study_note(study: Study, space: SearchSpace) -> str:
    """Describe a study as Markdown: its search space, data, confirmation and the next commands."""
    name = shlex.quote(study.name)
    storage = f" --storage {shlex.quote(study.storage_shown)}" if is_masked(study.storage_shown) else ""
    verdict = study.settings.verdict
    confirmed = (
        f"{sentence(PARTLY_LUCK)}; `hpo confirm` compares it with the baseline."
        if verdict is None
        else f"Confirmed on other seeds and splits: **{_plain(verdict)}**."
    )
    folds = "" if space.baseline.data.folds is None else f", in {space.baseline.data.folds} folds"
    lines = [
        f"## {_plain(study.name)}",
        "",
        *([_plain(space.description), ""] if space.description else []),
        f"- searched: {', '.join(f'`{path}`' for path in space.search)}",
        f"- data: {_plain(study.data_name)}, fingerprint `{study.metadata['data']['fingerprint'][:12]}`{folds}",
        f"- objective: {_plain(study.metric)} on the validation images, {study.direction}d; seed {study.seed}",
        f"- {count(space.baseline.epochs, 'epoch')} per trial; sampler {space.sampler.name}, "
        f"pruner {space.pruner.name}",
        "",
        confirmed,
        "",
        *_front(study),
        "```",
        *([study.settings.command] if study.settings.command is not None else []),
        *(f"hpo {command} {name}{storage}" for command in ("study top", "confirm", "report")),
        f"hpo refit best --study {name}{storage}",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front(study: Study) -> list[str]:
    found = front_table(study)
    if found is None:
        return []
    lines = [found.columns, ["---:"] * len(found.columns), *found.rows]
    return [f"{found.caption}.", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
