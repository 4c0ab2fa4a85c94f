"""`hpo study trials` and `hpo study export`: a study's trials as a table or CSV, and one of them as a recipe."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from hpo.cli.console import say, table
from hpo.cli.output import write_output
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.errors import StudyError
from hpo.report.words import run_again
from hpo.space import dump_yaml, to_yaml
from hpo.study import Study, find_study
from hpo.study.dataframe import trials_frame
from hpo.text import assignments, count, duration, short_names
from hpo.trials import FAILURE, RECIPE, is_baseline

if TYPE_CHECKING:
    import pandas

_WIDTH = 116  # characters of a comment's line


def trials_command(name: str | None, *, storage: str | None, csv: bool, output: Path | None) -> None:
    """Shows a study's trials, or writes them as CSV.

    Raises:
        HpoError: there is no such study, or the file cannot be written.
    """
    study = find_study(name, storage_url=storage)
    frame = trials_frame(study)
    if output is not None:
        write_output(output, frame.to_csv(index=False))
        say(f"{count(len(frame), 'trial')} of study {study.name}, {len(frame.columns)} columns, written to {output}")
    elif csv:
        sys.stdout.write(frame.to_csv(index=False))
    else:
        _say_table(study, frame)


def _say_table(study: Study, frame: pandas.DataFrame) -> None:
    if frame.empty:
        say(f"study {study.name} has no trials yet; run it with: {run_again(study)}")
        return
    names = short_names(column.removeprefix("params.") for column in frame.columns if column.startswith("params."))
    rows = [_row(row, names) for row in frame.astype(object).where(frame.notna(), None).to_dict("records")]
    table(["trial", "state", study.metric, "epochs", "time", "parameters"], rows, right=(0, 2, 3, 4), cut=True)


def _row(row: Mapping[str, Any], names: Mapping[str, str]) -> list[Any]:
    """A trial's main columns, as the table shows them."""
    value, elapsed_s = row["value"], row["elapsed_s"]
    params = {short: row[f"params.{path}"] for path, short in names.items()}
    drawn = assignments({name: value for name, value in params.items() if value is not None})
    what = ["the base"] if row["baseline"] else []
    what += [f"recipe {row['recipe']}"] if row["recipe"] else []
    return [
        row["number"],
        row["failure"] or row["state"],
        "" if value is None else f"{value:.4f}",
        "" if row["epochs"] is None else row["epochs"],
        "" if elapsed_s is None else duration(elapsed_s),
        f"({', '.join(what)}) {drawn}" if what else drawn,
    ]


# A trial as a recipe


def export_command(trial: str, *, study_name: str | None, storage: str | None, output: Path | None) -> None:
    """Writes a trial's configuration as a recipe, with what is known of it.

    Raises:
        HpoError: there is no such trial, it has no configuration yet, or the file cannot be written.
    """
    study = find_study(study_name, storage_url=storage)
    text = _best_recipe(study) if trial == "best" else _trial_recipe(study, _numbered(study, trial))
    if output is None:
        sys.stdout.write(text)
        return
    write_output(output, text)
    data = "" if study.data_path is None else f" --data {shlex.quote(str(study.data_path))}"
    say(f"written to {output}; a space begins with it by base: {output}, and it is trained alone by")
    say(f"  hpo train {shlex.quote(str(output))}{data}")


def _numbered(study: Study, trial: str) -> FrozenTrial:
    trials = study.optuna.get_trials(deepcopy=False)
    if not trial.isdecimal():
        raise StudyError(f"{trial!r} is no trial: give best, or a number from 0 to {len(trials) - 1}")
    if int(trial) >= len(trials):
        raise StudyError(f"study {study.name} has no trial {trial}; its trials are 0 to {len(trials) - 1}")
    return trials[int(trial)]


def _best_recipe(study: Study) -> str:
    """The confirmed winner, or the best trial as the search saw it, and which of them it is."""
    confirmation = read_confirmation(study.paths.confirmation)
    if confirmation is not None and is_current(confirmation, study.counts().finished):
        return _confirmed_recipe(study, confirmation)
    best = study.best_trial()
    if best is None:
        raise StudyError(f"study {study.name} has no complete trial yet; look at it by: hpo study show {study.name}")
    older = "" if confirmation is None else " since these trials were run"
    comment = (
        f"The best of the search, not confirmed{older}: its score is the best of many, and so partly luck. "
        f"hpo confirm {shlex.quote(study.name)} says whether it is better than the base."
    )
    return _trial_recipe(study, best, comment)


def _confirmed_recipe(study: Study, confirmation: Confirmation) -> str:
    winner = confirmation.contender(confirmation.winner)
    config = TrainConfig.model_validate_json(json.dumps(winner.config))
    comment = f"Confirmed on other seeds and splits: {confirmation.verdict}."
    what = f"the winner of study {study.name}: {winner.name}"
    metric = f"{confirmation.metric} " if confirmation.evidence else ""
    return _recipe(
        study, config, what, result=f"{metric}{confirmation.verdict}", when=confirmation.created, comment=comment
    )


def _trial_recipe(study: Study, trial: FrozenTrial, comment: str = "") -> str:
    if trial.state == TrialState.WAITING and not trial.params:
        raise StudyError(f"study {study.name}: trial {trial.number} waits, and has no configuration yet")
    what = f"trial {trial.number} of study {study.name}"
    what += ", the base" if is_baseline(trial) else ""
    what += f", recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else ""
    when = "" if trial.datetime_complete is None else f"{trial.datetime_complete:%Y-%m-%d}"
    return _recipe(study, study.config_of(trial), what, result=_result_of(study, trial), when=when, comment=comment)


def _result_of(study: Study, trial: FrozenTrial) -> str:
    """What came of a trial, beginning with the figure."""
    if FAILURE in trial.user_attrs:
        return f"none: {trial.user_attrs[FAILURE]}"
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return f"{trial.value:.4f} {study.metric} on the validation images"
    reported = trial.intermediate_values
    if not reported:
        return f"none: {trial.state.name.lower()}"
    last = max(reported)
    return f"{reported[last]:.4f} {study.metric} on the validation images at epoch {last}, {trial.state.name.lower()}"


def _recipe(study: Study, config: TrainConfig, what: str, *, result: str, when: str, comment: str) -> str:
    """A whole configuration as a recipe's file."""
    metadata = study.metadata
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    notes = {
        "description": what,
        "source": f"hpo, search space {study.space_name}; {', '.join(filter(None, (when, versions)))}",
        "result": f"{result}; data {study.data_name}, fingerprint {metadata['data']['fingerprint'][:12]}",
    }
    lines = [f"# {line}\n" for line in textwrap.wrap(comment, _WIDTH, break_on_hyphens=False, break_long_words=False)]
    return "".join(lines) + dump_yaml(notes) + to_yaml(config)
