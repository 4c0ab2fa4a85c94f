"""Results of the commands as JSON data, for `--json`. The keys are part of the interface: docs/json.md has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.analysis.summary import StudySummary, summarize
from hpo.confirmation.result import Confirmation, read_confirmation
from hpo.report.words import next_commands
from hpo.study.results import finite
from hpo.trials import (
    COSTS,
    FAILURE,
    RECIPE,
    WARM_START,
    Counts,
    effective_trials,
    is_baseline,
    state_of,
    trial_index_of,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.analysis.baselines import Entry
    from hpo.analysis.live import View
    from hpo.api.audit import AuditResult
    from hpo.api.confirm import ConfirmResult
    from hpo.api.fit import FitResult
    from hpo.api.refit import RefitResult
    from hpo.api.search_result import SearchResult
    from hpo.api.space import Suggestion
    from hpo.api.study import Diagnosis, ReportResult
    from hpo.api.train import TrainResult
    from hpo.api.worker import WorkerResult
    from hpo.confirmation.recipe import ExportedTrial
    from hpo.space.catalogue import Listed
    from hpo.study import Study
    from hpo.submission.predictions import Predictions

Document = dict[str, Any]


def of_search(result: SearchResult) -> Document:
    """The study after a search."""
    return of_study(result.study)


def of_worker(result: WorkerResult) -> Document:
    """The study after a worker, and whether its time was over."""
    return {**of_study(result.study), "out_of_time": result.out_of_time}


def of_study(study: Study) -> Document:
    """A study: its trials by state, the best, the baselines, the confirmation and the next commands."""
    now = summarize(study)
    return {
        **_short(study, now),
        "confirms": study.confirms,
        "seed": study.seed,
        "folder": str(study.paths.dir),
        "baselines": [_entry(entry) for entry in now.baselines],
        "confirmation": _confirmation(read_confirmation(study.paths.confirmation)),
        "next": next_commands(study, now),
    }


def of_studies(found: Sequence[tuple[Study, StudySummary]]) -> Document:
    """All studies, shortly."""
    return {"studies": [_short(*each) for each in found]}


def of_view(view: View) -> Document:
    """A study while it runs."""
    return {
        **of_study(view.study),
        "running": [of_trial(trial) for trial in view.running],
        "abandoned": [of_trial(trial) for trial in view.abandoned],
        "left_s": view.left_s,
    }


def of_trials(study: Study) -> Document:
    """All trials of a study."""
    trials = effective_trials(study.optuna.get_trials(deepcopy=False)).values()
    return {"study": study.name, "trials": [of_trial(one) for one in sorted(trials, key=lambda one: one.number)]}


def of_trial(trial: FrozenTrial) -> Document:
    """A trial; `values` has the reported value of each step."""
    known = trial.user_attrs
    ended, began = trial.datetime_complete, trial.datetime_start
    return {
        "number": trial.number,
        "trial_index": trial_index_of(trial),
        "state": state_of(trial),
        "failure": known.get(FAILURE),
        "value": trial.value,
        "values": {str(step): value for step, value in trial.intermediate_values.items()},
        "params": trial.params,
        "costs": known.get(COSTS, {}),
        "baseline": is_baseline(trial),
        "recipe": known.get(RECIPE),
        "warm_start": known.get(WARM_START),
        "epochs": known.get("epochs"),
        "seconds": known.get("elapsed_s"),
        "started": None if began is None else began.isoformat(),
        "ended": None if ended is None else ended.isoformat(),
    }


def of_confirm(result: ConfirmResult) -> Document:
    """A confirmation."""
    return {"study": result.study.name, "confirmation": _confirmation(result.confirmation)}


def of_train(result: TrainResult) -> Document:
    """A training; `result` is the content of its `result.json`."""
    return {
        "name": result.plan.name,
        "folder": str(result.folder),
        "metric": result.plan.metric,
        "value": result.recorded.value,
        "comparison": result.comparison,
        "result": json.loads((result.folder / "result.json").read_text(encoding="utf-8")),
    }


def of_refit(result: RefitResult) -> Document:
    """A model; `metrics` is the content of its `metrics.json`."""
    done = result.refitted
    return {
        "study": None if result.study is None else result.study.name,
        "trial": done.number,
        "model": str(done.dir),
        "metric": result.metric,
        "metrics": json.loads((done.dir / "metrics.json").read_text(encoding="utf-8")),
        "test_openings": done.openings,
        "confirmation": _confirmation(result.confirmation),
    }


def of_fit(result: FitResult) -> Document:
    """A model and what was made with it."""
    return {
        "study": result.study,
        "model": str(result.model),
        "metrics": json.loads((result.model / "metrics.json").read_text(encoding="utf-8")),
        "predictions": _path(result.predictions),
        "report": _path(result.report),
        "seconds": result.used_s,
        "finished_before": result.before,
    }


def of_predictions(found: Predictions, output: Path) -> Document:
    """The written labels."""
    return {"output": str(output), "images": len(found), "classes": found.classes, "broken": found.broken}


def of_report(result: ReportResult) -> Document:
    """The written report."""
    return {"report": str(result.path), "missing": list(result.missing)}


def of_diagnosis(diagnosis: Diagnosis) -> Document:
    """The problems of a study."""
    from hpo.analysis.doctor.check import Note

    return {
        "study": diagnosis.check.name,
        "problems": [
            {"problem": one.problem, "advice": one.advice, "fixable": one.fix is not None} for one in diagnosis.findings
        ],
        "fixed": [one.problem for one in diagnosis.fixed],
        "not_fixed": [{"problem": one.problem, "error": error} for one, error in diagnosis.failed],
        "notes": [one.text for one in diagnosis.results if isinstance(one, Note)],
        "bytes": diagnosis.disk,
    }


def of_audit(result: AuditResult, output: Path | None) -> Document:
    """Images whose labels are probably wrong."""
    return {
        "study": result.study.name,
        "suspects": result.frame().to_dict("records"),
        "output": _path(output),
    }


def of_export(trial: ExportedTrial, text: str, output: Path | None) -> Document:
    """A trial as a recipe or a script."""
    return {
        "study": trial.study.name,
        **trial.notes,
        "config": trial.config.model_dump(mode="json"),
        "text": text,
        "output": _path(output),
    }


def of_spaces(entries: Sequence[Listed]) -> Document:
    """Search spaces and recipes."""
    keys = ("name", "kind", "path", "description", "result")
    return {"spaces": [{key: getattr(one, key) for key in keys} for one in entries]}


def of_suggestion(found: Suggestion, output: Path | None) -> Document:
    """A suggested search space."""
    return {
        "study": found.study.name,
        "space": found.text,
        "output": _path(output),
        "changed": list(found.changed),
        "command": found.command,
    }


def _short(study: Study, now: StudySummary) -> Document:
    return {
        "study": study.name,
        "space": study.space_name,
        "data": study.data_name,
        "metric": study.metric,
        "direction": study.direction,
        "storage": study.storage_shown,
        "total": study.total,
        "trials": _counts(now.counts),
        "best": None if now.best is None else of_trial(now.best),
    }


def _counts(counts: Counts) -> Document:
    return {**vars(counts), "finished": counts.finished}


def _entry(entry: Entry) -> Document:
    return {
        "key": entry.key,
        "trial": entry.trial,
        "value": entry.value,
        "failure": entry.failure,
        "state": entry.state,
    }


def _confirmation(confirmation: Confirmation | None) -> Document | None:
    """The content of `confirmation.json`."""
    return None if confirmation is None else confirmation.to_json()


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def as_text(document: Mapping[str, Any]) -> str:
    """Format a document; NaN and infinity become null."""
    return json.dumps(finite({"schema": 1, **document}), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
