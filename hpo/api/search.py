"""`hpo run`: the search. `hpo.api.run` carries it out once the search space is known to be valid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import BUILTIN_DATA, DataConfig
from core.data.sources import check_source
from core.text import count
from core.weights import weights_in
from hpo.api.options import RunOptions
from hpo.api.search_result import SearchResult
from hpo.paths import StudyPaths
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.search.options import TrialOptions
from hpo.space import SearchSpace, load_space
from hpo.study import check_search_name, find_study

if TYPE_CHECKING:
    from hpo.loggers import Callback
    from hpo.study import Study


def search(
    options: RunOptions,
    reporter: Reporter | None = None,
    interrupts: Interrupts | None = None,
    *,
    part_of: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> SearchResult:
    """Run a study's trials up to its total; start the study or resume it.

    Args:
        part_of: The command that the search is a part of, as its resuming command; it has described the data.
        callbacks: Called after each trial, with Optuna's study and the finished trial.

    Raises:
        HpoError: The space has faults, or the study cannot be resumed as asked.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped by Ctrl-C or SIGTERM; finished trials and checkpoints are kept.
    """
    interrupts = interrupts or Interrupts()
    with weights_in(options.weights):
        with interrupts.let_through():
            space = load_space(options.space, options.set)
            if part_of is None and not callbacks and (study := _finished(options, space)) is not None:
                return _shown(study, options, reporter or Silent())
            _check_images(options, space)
            from hpo.api.run import Search  # with torch and Optuna, which an invalid space does not wait for

            run = Search(options, space, reporter or Silent(), interrupts, part_of=part_of, callbacks=callbacks)
        return run.run()


def _check_images(options: RunOptions, space: SearchSpace) -> None:
    """Raise UserError if the images are missing. A study that exists may know their place itself."""
    if options.data is not None or not StudyPaths.of(options.study or space.name).study_yaml.exists():
        check_source(space.baseline.data.name, options.data)


def _finished(options: RunOptions, space: SearchSpace) -> Study | None:
    """Return the study if nothing is left to train, without torch and the images, which take seconds.

    None if it has to be looked at more closely, as with recipes beside it, files of weights or own code.
    """
    from hpo.study.metadata import read_metadata
    from hpo.trials import RECIPE  # with Optuna

    name = options.study or space.name
    check_search_name(name)
    metadata = read_metadata(StudyPaths.of(name))
    if metadata is None or metadata["hash"] != space.hash or metadata.get("weights") or metadata.get("code"):
        return None
    data = None if options.data is None else str(options.data.resolve())
    changes = (
        *(options.take_over, options.artifacts, options.long_baseline, options.reclaim),
        options.workers == 0 or options.retries is not None or options.trial_options != TrialOptions(),
        data != metadata["data"]["path"],
        options.seed not in (None, metadata["seed"]),
    )
    if any(changes) or not _same_files(name, options.data, space.baseline.data):
        return None
    study = find_study(name, storage_url=options.storage)
    counts, recipes = study.counts(), {recipe.name for recipe in space.recipes if options.recipes}
    recipes -= {trial.user_attrs.get(RECIPE) for trial in study.optuna.get_trials(deepcopy=False)}
    total = max(options.trials or max(space.trials, study.total or 0), counts.finished)
    return study if counts.finished == total and not counts.running and not recipes else None


def _same_files(study: str, data: Path | None, config: DataConfig) -> bool:
    """Whether the files of the user's own images have the names, sizes and times of the study's last run."""
    if data is None and config.name in BUILTIN_DATA:
        return True
    from core.data.source import Reading
    from core.data.sources import open_source
    from hpo.study.images import stamp_of

    return open_source(data or Path(config.name), Reading(config)).stamp() == stamp_of(StudyPaths.of(study))


def _shown(study: Study, options: RunOptions, reporter: Reporter) -> SearchResult:
    total = study.counts().finished
    done = "its only trial is done" if total == 1 else f"all {count(total, 'trial')} are done"
    reporter.say(f"study {study.name} is finished: {done}; continue it with")
    reporter.say(f"  {options.model_copy(update={'trials': 2 * total}).command()}")
    study.settings.command = options.command()
    os.utime(study.paths.study_yaml)  # as of the study that ran last
    return SearchResult(study)
