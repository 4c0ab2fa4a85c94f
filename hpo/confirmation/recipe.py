"""A study's trial as a recipe, which `hpo train` and a space's `base` accept, or as a Python script."""

from __future__ import annotations

import pprint
import shlex
import textwrap
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.text import printable
from hpo.confirmation.candidates import best_trial
from hpo.confirmation.result import Confirmation, is_current, read_confirmation
from hpo.errors import StudyError
from hpo.space import dump_yaml, to_yaml
from hpo.study import Study
from hpo.text import PARTLY_LUCK
from hpo.trials import FAILURE, RECIPE, is_baseline

_WIDTH = 116  # characters in a line of a comment


_SCRIPT = """\
# {description}: {result}
# {source}; it needs the package `core` of hpo-vision
from pathlib import Path

import torch

from core.config import TrainConfig
from core.data import {imported}
from core.loop import EpochMetrics, train

config = TrainConfig.model_validate(
{fields}
)


def show(epoch: EpochMetrics) -> None:
    print(f"epoch {{epoch.epoch}} of {{config.epochs}}: loss {{epoch.train_loss:.4f}}")


if __name__ == "__main__":
    dataset = load_dataset(config.data, data_path={path}, skip_broken={skip_broken})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for splits in {splits}:
        result = train(config, splits.to(device), device=device, metric="{metric}", on_epoch_end=show)
        print(f"validation {metric} {{result.kept.score('{metric}'):.4f}}")
"""


@dataclass(frozen=True)
class ExportedTrial:
    """A trial's configuration and result."""

    config: TrainConfig
    study: Study
    notes: dict[str, str]
    """Description, source and result."""
    comment: str

    def recipe(self) -> str:
        """Format it as a recipe in YAML."""
        lines = textwrap.wrap(self.comment, _WIDTH, break_on_hyphens=False, break_long_words=False)
        return "".join(f"# {line}\n" for line in lines) + dump_yaml(self.notes) + to_yaml(self.config)

    def script(self) -> str:
        """Format it as a Python script that trains it by `core.loop.train`."""
        study, in_folds = self.study, self.config.data.folds is not None
        fields = self.config.model_dump(mode="json", exclude_defaults=True)
        return _SCRIPT.format(
            **{name: printable(text) for name, text in self.notes.items()},  # on lines of comments
            imported="folds, load_dataset" if in_folds else "load_dataset, split",
            fields=textwrap.indent(pprint.pformat(fields, width=_WIDTH - 4, sort_dicts=False), "    "),
            path="None" if study.data_path is None else f"Path({str(study.data_path)!r})",
            skip_broken=study.skip_broken,
            splits="folds(dataset, config.data)" if in_folds else "[split(dataset, config.data)]",
            metric=study.metric,
        )


def exported(study: Study, trial: str) -> ExportedTrial:
    """Return a trial's configuration with its result.

    Args:
        trial: A number, or `best`: the confirmed winner if there is one.

    Raises:
        StudyError: There is no such trial, or it has no configuration yet.
    """
    return _best_recipe(study) if trial == "best" else _trial_recipe(study, _numbered(study, trial))


def _numbered(study: Study, trial: str) -> FrozenTrial:
    trials = study.optuna.get_trials(deepcopy=False)
    if not trial.isdecimal():
        raise StudyError(f"{trial!r} is no trial: give best, or a number from 0 to {len(trials) - 1}")
    if int(trial) >= len(trials):
        raise StudyError(f"study {study.name} has no trial {trial}; its trials are 0 to {len(trials) - 1}")
    return trials[int(trial)]


def _best_recipe(study: Study) -> ExportedTrial:
    confirmation = read_confirmation(study.paths.confirmation)
    if confirmation is not None and is_current(confirmation, study.counts().finished):
        return _confirmed_recipe(study, confirmation)
    best = best_trial(study)
    older = "" if confirmation is None else " since these trials ran"
    comment = (
        f"The best of the search, not confirmed{older}: {PARTLY_LUCK}. "
        f"hpo confirm {shlex.quote(study.name)} tests whether it is better than the baseline."
    )
    return _trial_recipe(study, best, comment)


def _confirmed_recipe(study: Study, confirmation: Confirmation) -> ExportedTrial:
    winner = confirmation.contender(confirmation.winner)
    comment = f"Confirmed on other seeds and splits: {confirmation.verdict}."
    description = f"the winner of study {study.name}: {winner.name}"
    metric = f"{confirmation.metric} " if confirmation.leader == confirmation.winner else ""
    result = f"{metric}{confirmation.verdict}"
    return _recipe(study, winner.train_config, description, result=result, when=confirmation.created, comment=comment)


def _trial_recipe(study: Study, trial: FrozenTrial, comment: str = "") -> ExportedTrial:
    if trial.state == TrialState.WAITING and not trial.params:
        raise StudyError(f"study {study.name}: trial {trial.number} is waiting, and has no configuration yet")
    description = f"trial {trial.number} of study {study.name}"
    description += ", the baseline" if is_baseline(trial) else ""
    description += f", recipe {trial.user_attrs[RECIPE]}" if RECIPE in trial.user_attrs else ""
    when = "" if trial.datetime_complete is None else f"{trial.datetime_complete:%Y-%m-%d}"
    return _recipe(
        study, study.config_of(trial), description, result=_result_of(study, trial), when=when, comment=comment
    )


def _result_of(study: Study, trial: FrozenTrial) -> str:
    if FAILURE in trial.user_attrs:
        return f"none: {trial.user_attrs[FAILURE]}"
    where = f"{study.metric} on the validation images"
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return f"{trial.value:.4f} {where}"
    reported, state = trial.intermediate_values, trial.state.name.lower()
    if not reported:
        return f"none: {state}"
    return f"{reported[max(reported)]:.4f} {where} at epoch {max(reported)}, {state}"


def _recipe(
    study: Study, config: TrainConfig, description: str, *, result: str, when: str, comment: str
) -> ExportedTrial:
    metadata = study.metadata
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    notes = {
        "description": description,
        "source": f"hpo, search space {study.space_name}; {', '.join(filter(None, (when, versions)))}",
        "result": f"{result}; data {study.data_name}, fingerprint {metadata['data']['fingerprint'][:12]}",
    }
    return ExportedTrial(config, study, notes, comment)
