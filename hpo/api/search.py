"""`hpo run`: the search. `hpo.api.run` carries it out once the search space is known to be valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.weights import weights_in
from hpo.api.options import RunOptions
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.space import load_space

if TYPE_CHECKING:
    from hpo.api.run import SearchResult
    from hpo.loggers import Callback


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
            from hpo.api.run import Search  # with torch and Optuna, which an invalid space does not wait for

            run = Search(options, space, reporter or Silent(), interrupts, part_of=part_of, callbacks=callbacks)
        return run.run()
