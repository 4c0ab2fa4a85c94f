"""`hpo study` and `hpo dashboard`: looking after studies, and at them."""

from __future__ import annotations

import shlex

from hpo import dashboard
from hpo.console import say, table
from hpo.paths import studies_root
from hpo.study import find_study, list_studies
from hpo.summary import say_standing, standing


def list_command() -> None:
    """A line a study."""
    studies = list_studies()
    if not studies:
        say(f"no studies in {studies_root()} yet; begin with: hpo run digits")
        return
    rows = []
    for study in studies:
        now = standing(study)
        best = "" if now.best_value is None else f"{now.best_value:.4f}"
        rows.append([study.name, study.space_name, now.states, study.metric, best, study.storage_shown])
    table(["study", "space", "trials", "objective", "best", "storage"], rows, right=(4,))


def show_command(name: str | None, *, storage: str | None) -> None:
    """All that is known of one study."""
    study = find_study(name, storage_url=storage)
    say_standing(study)


def dashboard_command(name: str | None, *, storage: str | None, port: int, host: str) -> None:
    """Serves optuna-dashboard on a study until Ctrl-C."""
    study = find_study(name, storage_url=storage)
    say(f"the same without hpo: {shlex.join(dashboard.command(study.storage_url, study.paths))}")
    dashboard.serve(study.storage_url, study.paths, study_name=study.name, host=host, port=port)
