"""`hpo refit`: turn the winner of a search, or any trial, into a submission model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.api.options import RefitOptions
from hpo.errors import StudyError
from hpo.reporter import Reporter, Silent
from hpo.search.interrupts import Interrupts
from hpo.study import find_study

if TYPE_CHECKING:
    from hpo.api.refitting import RefitResult

# Networks of an ensemble, as `data.folds` and a bundle allow.
FEWEST, MOST = 2, 20


def refit(options: RefitOptions, reporter: Reporter | None = None, interrupts: Interrupts | None = None) -> RefitResult:
    """Retrain a trial on training and validation images into a submission model, and open the test set.

    `best` is confirmed first, unless `options.confirm` is off.

    Args:
        options: The options of `hpo refit`.
        reporter: Shows the progress; silent by default.
        interrupts: Handles Ctrl-C; by default it stops at once.

    Raises:
        HpoError: There is no such study or trial, or it cannot be refitted.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped; the same call resumes from the last checkpoint.
    """
    interrupts = interrupts or Interrupts()
    with interrupts.let_through():
        _check_networks(options)
        study = find_study(options.study, storage_url=options.storage)
        if options.trial != "best" and not options.trial.isdecimal():
            raise StudyError(f"hpo refit {options.trial}: give `best`, or the number of a complete trial")
        from hpo.api.refitting import Refit  # with torch, which a wrong name does not wait for

    return Refit(study, options, reporter or Silent(), interrupts).run()


def _check_networks(options: RefitOptions) -> None:
    if options.folds is not None and options.members is not None:
        raise StudyError("--folds and --members both make several networks, by fold or by seed; give one of them")
    for flag, count in (("--folds", options.folds), ("--members", options.members)):
        if count is not None and not FEWEST <= count <= MOST:
            raise StudyError(
                f"{flag} {count}: an ensemble has {FEWEST} to {MOST} networks; leave it out for one, trained on all "
                "images"
            )
