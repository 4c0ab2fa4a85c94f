"""What the dashboard says of a trial and of a study in words: Markdown notes, with links to the pictures.

Optuna-dashboard keeps a note in the study's system attributes, a trial's too. What it stores is written here as it
writes it, because importing it takes a second of every worker's start; a test holds the two against each other. What a
person has written stays: below a trial's note, and below the line that ends a study's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optuna.artifacts import get_all_artifact_meta
from optuna.storages import BaseStorage

from hpo.space import Parameter, SearchSpace
from hpo.space.pruner import places_of
from hpo.storage import is_masked
from hpo.storage.optuna_access import id_of, storage_of, trial_by_number, trial_id
from hpo.study import CONFIRMATION, Study
from hpo.text import duration, short
from hpo.trials import LET_THROUGH, RECIPE, is_baseline

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.trials import Outcome

_ATTRIBUTE = 2045  # characters: what a database takes as one attribute, and optuna-dashboard splits a note by
_YOURS = "\n---\n*The above is written by hpo; what is written below stays.*\n"


# Where notes are kept


def save_note(study: Study, body: str, trial: FrozenTrial | None = None) -> None:
    """Writes the study's note, or a trial's, in place of the one before."""
    storage, study_id = storage_of(study.optuna), id_of(study.optuna)
    attributes = storage.get_study_system_attrs(study_id)
    version, text = _keys(trial)
    parts = [body[begin : begin + _ATTRIBUTE] for begin in range(0, len(body), _ATTRIBUTE)]
    stale = sum(key.startswith(text) for key in attributes) - len(parts)
    for number, part in enumerate([*parts, *[""] * stale]):
        storage.set_study_system_attr(study_id, f"{text}{number}", part)
    # Last: a browser takes the text for new only where the version is.
    storage.set_study_system_attr(study_id, version, int(attributes.get(version, 0)) + 1)


def read_note(study: Study, trial: FrozenTrial | None = None) -> str:
    """The study's note, or a trial's; empty where there is none."""
    attributes = storage_of(study.optuna).get_study_system_attrs(id_of(study.optuna))
    _, text = _keys(trial)
    count = sum(key.startswith(text) for key in attributes)
    return "".join(str(attributes[f"{text}{number}"]) for number in range(count))


def _keys(trial: FrozenTrial | None) -> tuple[str, str]:
    """The attribute of a note's version, and how those of its text begin."""
    prefix = "dashboard:" if trial is None else f"dashboard:{trial_id(trial)}:"
    return f"{prefix}note_ver", f"{prefix}note_str:"


# A trial


def note_trial(study: Study, space: SearchSpace, outcome: Outcome, *, device: str) -> None:
    """Writes a trial's note, with links to the artifacts that it has by now.

    Args:
        device: what it trained on, in words.
    """
    storage, study_id = storage_of(study.optuna), id_of(study.optuna)
    trial = trial_by_number(study.optuna, outcome.number)
    body = trial_note(space, outcome, trial, device=device, links=_links(storage, study_id, trial))
    written = read_note(study, trial)
    save_note(study, f"{body}\n---\n{written}" if written else body, trial)


def _links(storage: BaseStorage, study_id: int, trial: FrozenTrial) -> dict[str, str]:
    """A file's name -> where the dashboard serves it."""
    root = f"/artifacts/{study_id}/{trial_id(trial)}"
    return {meta.filename: f"{root}/{meta.artifact_id}" for meta in get_all_artifact_meta(trial, storage=storage)}


def trial_note(
    space: SearchSpace, outcome: Outcome, trial: FrozenTrial, *, device: str, links: Mapping[str, str]
) -> str:
    """What a trial trained, what came of it and why it ended, as Markdown."""
    lines = [f"## Trial {outcome.number}: {_headline(space, outcome)}", "", _how_it_ended(space, outcome), ""]
    lines += [f"- {fact}" for fact in _facts(outcome, trial, device)]
    if links:
        lines.append(f"- files: {', '.join(f'[{name}]({link})' for name, link in links.items())}")
    differences = _differences(space, outcome)
    if not differences:
        return "\n".join([*lines, "", "It trained the base."]) + "\n"
    lines += ["", "| differs from the base in | base | here |", "|---|---|---|"]
    lines += [f"| `{path}` | {_plain(old)} | {_plain(new)} |" for path, old, new in differences]
    return "\n".join(lines) + "\n"


def _headline(space: SearchSpace, outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"could not be trained, {outcome.failure}"
    if outcome.value is None:
        return outcome.state
    at_end = "" if outcome.state == "complete" else ", pruned"
    return f"{space.metric} {outcome.value:.4f}{at_end}"


def _how_it_ended(space: SearchSpace, outcome: Outcome) -> str:
    """The end in a sentence."""
    epochs = space.baseline.epochs * (space.baseline.data.folds or 1)
    trained = f"{len(outcome.history)} of {epochs} epochs"
    if outcome.failure is not None:
        return f"Ended after {trained}: {_plain(outcome.why or outcome.failure)}."
    if outcome.state == "pruned":
        return f"Pruned after {trained}: {_plain(outcome.why.removesuffix(', pruned') or 'by the pruner')}."
    kept = outcome.attributes.get("kept_epoch")
    each = " of each fold" if space.baseline.data.folds else ""
    return f"Trained {trained}" + (f"; its value is that of epoch {kept}{each}, whose weights count." if kept else ".")


def _facts(outcome: Outcome, trial: FrozenTrial, device: str) -> Iterator[str]:
    if is_baseline(trial):
        yield "it is the base, and never pruned"
    if RECIPE in trial.user_attrs:
        yield f"it is the recipe {_plain(trial.user_attrs[RECIPE])}, and never pruned"
    if LET_THROUGH in trial.user_attrs:
        yield f"let through on purpose at rung {trial.user_attrs[LET_THROUGH]}, which would have cut it"
    if outcome.replicate_of is not None:
        yield f"the same parameters as slot {outcome.replicate_of}, with another seed"
    kept = {rung: place for rung, place in places_of(trial).items() if place.kept}
    if kept:
        yield "went past " + ", ".join(f"rung {rung} as {place.standing}" for rung, place in kept.items())
    if outcome.history:
        last = outcome.history[-1]
        yield f"{duration(last.elapsed_s)} on {_plain(device)}, {last.images_per_s:,.0f} images/s"


def _differences(space: SearchSpace, outcome: Outcome) -> list[tuple[str, Any, Any]]:
    """(field, the base's value, the trial's) where they differ, but for the seed, which every trial has its own of."""
    base = space.baseline.flat()
    if outcome.config is not None:
        trained = outcome.config.flat()
    else:  # its parameters make no configuration
        trained = base | {path: _decoded(space.search.get(path), value) for path, value in outcome.params.items()}
    return [(path, base[path], value) for path, value in trained.items() if path != "seed" and value != base[path]]


def _decoded(parameter: Parameter | None, value: Any) -> Any:
    return value if parameter is None else parameter.decode(value)


def _plain(value: Any) -> str:
    """A value as text that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", short(value))


# A study


def note_study(study: Study, space: SearchSpace) -> None:
    """Writes the study's note as things stand now; what a person wrote below it stays."""
    written = read_note(study)
    _, line, yours = written.rpartition(_YOURS)
    body = study_note(study, space) + _YOURS + (yours if line else written)
    if body != written:
        save_note(study, body)


def study_note(study: Study, space: SearchSpace) -> str:
    """What a study searches, how it stands with its winner, and how to go on, as Markdown."""
    metadata = study.metadata
    name = shlex.quote(study.name)
    storage = f" --storage {shlex.quote(study.storage_shown)}" if is_masked(study.storage_shown) else ""
    verdict = study.optuna.user_attrs.get(CONFIRMATION)
    confirmed = (
        "The best value is the best of many, and so partly luck; `hpo confirm` says whether it is better than the base."
        if verdict is None
        else f"Confirmed on other seeds and splits: **{_plain(verdict)}**."
    )
    folds = "" if space.baseline.data.folds is None else f", in {space.baseline.data.folds} folds"
    lines = [
        f"## {_plain(study.name)}",
        "",
        *([_plain(space.description), ""] if space.description else []),
        f"- searched: {', '.join(f'`{path}`' for path in space.search)}",
        f"- data: {_plain(study.data_name)}, fingerprint `{metadata['data']['fingerprint'][:12]}`{folds}",
        f"- objective: {_plain(study.metric)} on the validation images, {study.direction}d; seed {study.seed}",
        f"- {space.baseline.epochs} epochs a trial; sampler {space.sampler.name}, pruner {space.pruner.name}",
        "",
        confirmed,
        "",
        "```",
        *([study.command] if study.command is not None else []),
        *(f"hpo {command} {name}{storage}" for command in ("study top", "confirm", "report")),
        f"hpo refit best --study {name}{storage}",
        "```",
    ]
    return "\n".join(lines) + "\n"
