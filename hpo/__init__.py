"""Search training configurations with Optuna, and refit the best into a model.

    from hpo import load_bundle, predict, refit, run

    study = run("digits", trials=20)             # start a search, or resume it
    model = refit(study)                         # confirm the winner, and train it on all images
    model.predict("photos").names                # labels

The functions do what the commands of the same names do. Names are imported on first use, so that `import hpo` alone
imports neither torch nor Optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.cli.library import fit, predict, refit, run
    from hpo.errors import HpoError
    from hpo.study import Study
    from hpo.study.dataframe import trials_frame
    from hpo.submission.bundle import LoadedBundle, load_bundle
    from hpo.submission.predictions import Predictions

_HOMES = {
    "HpoError": "hpo.errors",
    "LoadedBundle": "hpo.submission.bundle",
    "Predictions": "hpo.submission.predictions",
    "Study": "hpo.study",
    "fit": "hpo.cli.library",
    "load_bundle": "hpo.submission.bundle",
    "predict": "hpo.cli.library",
    "refit": "hpo.cli.library",
    "run": "hpo.cli.library",
    "trials_frame": "hpo.study.dataframe",
}

__all__ = [
    "HpoError",
    "LoadedBundle",
    "Predictions",
    "Study",
    "fit",
    "load_bundle",
    "predict",
    "refit",
    "run",
    "trials_frame",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
