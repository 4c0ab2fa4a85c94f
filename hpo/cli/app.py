"""The command line. Each command calls one function of `hpo.api` and shows its result.

Commands import what they need when they run, so that `hpo --help` and a mistyped name answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, cast

import typer

from hpo.api import options as of
from hpo.cli.console import complain, put, say, set_up_logging, table
from hpo.cli.parameters import Answer, command
from hpo.cli.terminal import Terminal, stoppable
from hpo.errors import StudyError
from hpo.paths import cache_root

EXIT_AGAIN = 75
"""Exit code of a worker whose time is over while trials wait: EX_TEMPFAIL of sysexits.h."""

app = typer.Typer(
    name="hpo",
    help="Find the best training configuration for a small image data set, and refit it into a model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study_app = typer.Typer(no_args_is_help=True, help="Show, check and export studies.")
space_app = typer.Typer(no_args_is_help=True, help="List, check and suggest search spaces and recipes.")
data_app = typer.Typer(no_args_is_help=True, help="List data sets, and find wrong labels.")
app.add_typer(study_app, name="study")
app.add_typer(space_app, name="space")
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        from hpo.study.versions import versions

        found = versions()
        say(f"hpo {found.pop('hpo-vision', 'unknown')} ({', '.join(map(' '.join, found.items()))})")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
]


@app.callback()
def _start(*, _: _Version = False) -> None:
    set_up_logging()
    _move_caches()


def _move_caches() -> None:
    """Keep matplotlib's cache beside the images where the home folder is read-only; it would warn in each process."""
    home = os.path.expanduser("~")  # noqa: PTH111 - where there is none, Path.home() raises
    if Path(home).is_absolute() and not os.access(home, os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(cache_root() / "matplotlib"))


def _documents() -> ModuleType:
    """Return the module that makes the documents of `--json`, which imports Optuna."""
    from hpo.cli import documents

    return documents


# Search -------------------------------------------------------------------------------------------------------------


@command(app, of.FitOptions, shows="course")
def fit(options: of.FitOptions) -> Answer:
    """From labelled images to a model by a deadline: choose a space, search, confirm, refit, report and predict."""
    from hpo.cli.library import fit_and_show, process_began

    result = fit_and_show(options, Terminal(), began=process_began())
    return Answer(lambda: _documents().of_fit(result))


@command(app, of.RunOptions, shows="course")
def run(options: of.RunOptions) -> Answer:
    """Search: run a study's trials up to its total. The same command resumes it."""
    from hpo.cli.library import run_and_show

    result = run_and_show(options, Terminal())
    return Answer(lambda: _documents().of_search(result))


@command(app, of.WorkerOptions, shows="course")
def worker(options: of.WorkerOptions) -> Answer:
    """Join a study: run waiting trials until none is left, with any number of workers on any machine.

    Exit code 0: none is waiting; 75: the time limit left some, so start it again; 130, 143: stopped by a signal.
    """
    from hpo.study import study_files

    if options.storage is None:
        study_files(options.study)
    from hpo.api.worker import worker  # with torch, which a wrong name does not wait for
    from hpo.report.words import patience_text, progress_text

    terminal = Terminal()
    stops = stoppable(terminal)
    try:
        with stops as interrupts:
            result = worker(options, terminal, interrupts)
    except KeyboardInterrupt:
        raise typer.Exit(stops.exit_code) from None
    study = result.study
    counts = study.counts()
    elsewhere = counts.running - counts.dead
    others = f"; {elsewhere} running in other workers" if elsewhere else ""
    waiting = study.queue.waiting()
    stopped = patience_text(study) if study.patience.is_over else "no further trial fits the time limit"
    paused = f", {counts.paused} of them paused" if counts.paused else ""
    left = f"{stopped}, {waiting} waiting{paused}" if waiting else "no trial is waiting"
    terminal.say(f"{left}: {progress_text(study, counts.finished)}{others}")
    return Answer(lambda: _documents().of_worker(result), EXIT_AGAIN if result.out_of_time and waiting else 0)


@command(app, of.TrainOptions, shows="course")
def train(options: of.TrainOptions) -> Answer:
    """Train one fixed configuration, with data.folds once per fold: the baseline to beat, or a trial again."""
    from hpo.space import catalogue
    from hpo.study import study_files

    if options.recipe is not None and options.trial is None:
        catalogue.find(options.recipe, "recipe")
    elif options.storage is None and (study := (options.trial or "").rpartition("/")[0]):
        study_files(study)
    from hpo.api.train import train  # with torch, which a wrong name does not wait for
    from hpo.cli.show import show_training

    terminal = Terminal()
    with stoppable(terminal) as interrupts:
        result = train(options, terminal, interrupts)
        show_training(result, terminal)
    return Answer(lambda: _documents().of_train(result))


@command(app, of.ConfirmOptions, shows="course")
def confirm(options: of.ConfirmOptions) -> Answer:
    """Train the best configurations and the baseline on other seeds and splits, and test whether tuning helped."""
    from hpo.study import study_files

    study_files(options.study)
    from hpo.api.confirm import confirm  # with torch, which a wrong name does not wait for
    from hpo.cli.show import show_confirmation

    terminal = Terminal()
    with stoppable(terminal) as interrupts:
        result = confirm(options, terminal, interrupts)
        show_confirmation(result, terminal)
    return Answer(lambda: _documents().of_confirm(result))


# Models -------------------------------------------------------------------------------------------------------------


@command(app, of.RefitOptions, shows="course")
def refit(options: of.RefitOptions) -> Answer:
    """Retrain a trial or a recipe on train+val into a submission model, and open the test set.

    `best` is confirmed first.
    """
    from hpo.cli.library import refit_and_show

    result = refit_and_show(options, Terminal())
    return Answer(lambda: _documents().of_refit(result))


@command(app, of.PredictOptions)
def predict(options: of.PredictOptions) -> Answer:
    """Label images with a refitted model."""
    from core.text import count
    from hpo.api.predict import predict

    predictions = predict(options)
    say(f"{count(len(predictions), 'image')} labelled: {options.output}")
    if predictions.broken:
        from hpo.api.common import broken_files

        say(broken_files(predictions.broken))
    return Answer(lambda: _documents().of_predictions(predictions, options.output))


# Views of a study ---------------------------------------------------------------------------------------------------


@command(app, of.ReportOptions)
def report(options: of.ReportOptions) -> Answer:
    """Write a study as one HTML file that needs no network: the winner, its lead, its cost, and the reasons."""
    import time

    from hpo.api.study import report
    from hpo.text import duration

    started = time.perf_counter()
    done = report(options)
    size, took = done.path.stat().st_size / 1e6, duration(time.perf_counter() - started)
    say(f"written to {done.path} ({size:.1f} MB) in {took}; open it in a browser")
    for line in done.missing:
        say(f"  not shown: {line}")
    return Answer(lambda: _documents().of_report(done))


@command(app, of.DashboardOptions, shows="nothing")
def dashboard(options: of.DashboardOptions) -> None:
    """Show a study in the browser, with optuna-dashboard."""
    from hpo.api.study import dashboard

    dashboard(options, Terminal())


@command(study_app, of.Options, "list")
def study_list(_: of.Options) -> Answer:
    """List the studies here, with their progress."""
    from hpo.api.study import list_studies
    from hpo.paths import no_studies
    from hpo.report.words import states_text

    rows, found = [], list_studies()
    for study, now in found:
        best = "" if now.best_value is None else f"{now.best_value:.4f}"
        rows.append([study.name, study.space_name, states_text(now.counts), study.metric, best, study.storage_shown])
    if rows:
        table(["study", "space", "trials", "objective", "best", "storage"], rows, right=(4,))
    else:
        say(no_studies())
    return Answer(lambda: _documents().of_studies(found))


@command(study_app, of.ChosenStudy, "show")
def study_show(options: of.ChosenStudy) -> Answer:
    """Show one study: its trials by state, its best trials, and the next commands."""
    from hpo.study import find_study

    study = find_study(options.study, storage_url=options.storage)
    from hpo.cli.show import show_study  # with Optuna, which a wrong name does not wait for

    show_study(study, Terminal())
    return Answer(lambda: _documents().of_study(study))


@command(study_app, of.TopOptions, "top")
def study_top(options: of.TopOptions) -> Answer:
    """Monitor a running study: its workers, their trials and rungs, the best trial, the rate and the time left."""
    from hpo.cli.monitor import top_command

    view = top_command(options.study, storage=options.storage, every_s=options.every, once=options.once)
    return Answer(lambda: _documents().of_view(view))


@command(study_app, of.TrialsOptions, "trials")
def study_trials(options: of.TrialsOptions) -> Answer:
    """List all trials: state, value, parameters and cost."""
    from core.text import count
    from hpo.api.study import trials
    from hpo.cli.show import trial_rows
    from hpo.report.words import no_trials

    study, frame = trials(options)
    if options.output is not None:
        size = f"{count(len(frame), 'trial')} of study {study.name}, {len(frame.columns)} columns"
        say(f"{size}, written to {options.output}")
    elif options.csv:
        put(frame.to_csv(index=False))
    elif frame.empty:
        say(no_trials(study))
    else:
        columns = ["trial", "state", study.metric, "epochs", "time", "parameters"]
        table(columns, trial_rows(frame), right=(0, 2, 3, 4), cut=True)
    return Answer(lambda: _documents().of_trials(study))


@command(study_app, of.ExportOptions, "export")
def study_export(options: of.ExportOptions) -> Answer:
    """Export a trial's configuration as a recipe, for `hpo train` and the `base` of a space, or as a Python script."""
    import shlex

    from hpo.api.study import export

    trial, text = export(options)
    study, answer = trial.study, Answer(lambda: _documents().of_export(trial, text, options.output))
    if options.output is None:
        put(text)
        return answer
    if options.python:
        say(f"written to {options.output}; run it with")
        say(f"  python {shlex.quote(str(options.output))}")
        return answer
    data = "" if study.data_path is None else f" --data {shlex.quote(str(study.data_path))}"
    say(f"written to {options.output}; start a space from it with base: {options.output}, or train it alone with")
    say(f"  hpo train {shlex.quote(str(options.output))}{data}")
    return answer


@command(study_app, of.AddOptions, "add")
def study_add(options: of.AddOptions) -> Answer:
    """Queue one more trial with chosen parameters."""
    from hpo.api.study import add
    from hpo.report.words import joining
    from hpo.text import assignments

    study, params = add(options)
    say(f"queued as the last trial of {study.total}: {assignments(params)}; run it with")
    say(f"  {joining(study)}")
    return Answer(lambda: {"study": study.name, "total": study.total, "params": params})


@command(study_app, of.DeleteOptions, "delete")
def study_delete(options: of.DeleteOptions) -> Answer:
    """Delete a study with its confirmation, its models and all files; ask first."""
    from hpo.api.manage import delete, deletion

    for line in deletion(options):
        say(f"  {line}")
    if not options.yes:
        if not sys.stdin.isatty():
            raise StudyError(f"study {options.study}: give --yes to delete all of that")
        typer.confirm(f"Delete study {options.study}?", abort=True, err=True)
    delete(options)
    say(f"study {options.study} is deleted")
    return Answer(lambda: {"study": options.study})


@command(study_app, of.RenameOptions, "rename")
def study_rename(options: of.RenameOptions) -> Answer:
    """Rename a study, its folder and its confirmation."""
    from hpo.api.manage import rename

    rename(options)
    say(f"study {options.study} is renamed to {options.new}")
    return Answer(lambda: {"study": options.new, "before": options.study})


@command(study_app, of.CopyOptions, "copy")
def study_copy(options: of.CopyOptions) -> Answer:
    """Copy a study with its confirmation, its models and all files."""
    from hpo.api.manage import copy

    copy(options)
    say(f"study {options.study} is copied to {options.new}")
    return Answer(lambda: {"study": options.new, "copied": options.study})


@command(study_app, of.DoctorOptions, "doctor")
def study_doctor(options: of.DoctorOptions) -> Answer:
    """Check a study, a line per problem. Exit code 0: no problem, or all were fixed; 1: problems remain."""
    from hpo.api.study import doctor
    from hpo.cli.show import show_diagnosis

    diagnosis = doctor(options)
    show_diagnosis(diagnosis, Terminal())
    return Answer(lambda: _documents().of_diagnosis(diagnosis), 1 if diagnosis.findings else 0)


# Search spaces and data ---------------------------------------------------------------------------------------------


@command(space_app, of.Options, "list")
def space_list(_: of.Options) -> Answer:
    """List the search spaces and recipes that can be named."""
    from hpo.space import list_spaces, shown

    entries = list_spaces()
    table(["space", "description"], [[one.name, one.description] for one in entries if one.kind == "space"])
    say()
    recipes = [[one.name, one.result, one.description] for one in entries if one.kind == "recipe"]
    table(["recipe", "author's result", "description"], recipes)
    say()
    folders = dict.fromkeys(shown(entry.path.parent) for entry in entries)
    say(f"hpo run SPACE searches, hpo train RECIPE trains one; the files are in {', '.join(folders)}")
    return Answer(lambda: _documents().of_spaces(entries))


@command(space_app, of.CheckOptions, "check")
def space_check(options: of.CheckOptions) -> Answer:
    """Check a search space or recipe, and list all its faults with their lines."""
    from hpo.api.space import check

    check(options)
    say(f"{options.file}: no fault found")
    return Answer(lambda: {"file": str(options.file), "faults": []})


@command(space_app, of.SuggestOptions, "suggest")
def space_suggest(options: of.SuggestOptions) -> Answer:
    """Suggest a narrowed or widened search space from a finished study, with the reasons as comments."""
    from hpo.api.space import suggest

    suggestion = suggest(options)
    answer = Answer(lambda: _documents().of_suggestion(suggestion, options.output))
    if options.output is None:
        put(suggestion.text)
        return answer
    if suggestion.changed:
        say(f"written to {options.output}, with the reasons as comments:")
    else:
        say(f"written to {options.output}: the ranges of study {suggestion.study.name}, unchanged; see its comments")
    for line in (*(f"  {change}" for change in suggestion.changed), "next:", f"  {suggestion.command}"):
        say(line)
    return answer


@command(space_app, of.SchemaOptions, "schema", shows="nothing")
def space_schema(options: of.SchemaOptions) -> None:
    """Write the JSON Schema of search spaces and recipes, for editors."""
    from hpo.api.space import schema

    text, output = schema(options), options.output
    if output is None:
        put(text)
        return
    say(f"written to {output}; refer to it in the first line of a space: # yaml-language-server: $schema={output.name}")


@command(data_app, of.Options, "list")
def data_list(_: of.Options) -> Answer:
    """List the built-in data sets: size, classes, folder, and whether they are on disk."""
    from core.data import catalogue
    from hpo.paths import data_root

    rows, found = [], catalogue(data_root())
    for info in found:
        where = "built in" if info.path is None else f"{info.path}" if info.on_disk else f"not in {info.path}"
        download = f"{info.download_bytes / 1e6:,.0f} MB" if info.download_bytes else ""
        rows.append([info.name, f"{info.images:,}", info.size, info.classes, where, download])
    table(["name", "images", "size", "classes", "where", "download"], rows, right=(1, 3, 5))
    say("your own: --data with a folder, .zip, .tar.*, .npz or .csv")
    return Answer(lambda: {"data": list(map(vars, found))})


@command(data_app, of.AuditOptions, "audit")
def data_audit(options: of.AuditOptions) -> Answer:
    """List images whose labels are probably wrong: networks trained without them predict another class."""
    from hpo.api.audit import audit
    from hpo.report.words import audit_text

    result = audit(options)
    suspects = result.audit.suspects
    answer = Answer(lambda: _documents().of_audit(result, options.output))
    if options.csv:
        put(result.frame().to_csv(index=False))
        return answer
    if suspects and options.output is None:
        rows = [
            [one.id, one.label, one.suggested, f"{one.label_probability:.3f}", f"{one.suggested_probability:.3f}"]
            for one in suspects[:20]
        ]
        table(["image", "label", "suggested", "p(label)", "p(suggested)"], rows, right=(3, 4))
    for line in audit_text(result.study, result.audit):
        say(line)
    if options.output is not None:
        say(f"written to {options.output}")
    return answer


# Base class of errors about the command line: of typer's own copy of click, or of click, by typer's version.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main() -> None:
    """Run the command line. An error caused by user input is one line and exit code 2."""
    from core.errors import CoreError
    from core.text import printable_lines
    from hpo.errors import SYSTEM_ERRORS, HpoError

    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _UsageError as error:  # typer would show the words as they were given
        error.message = printable_lines(error.message)
        error.show()
        sys.exit(error.exit_code)
    except (HpoError, CoreError) as error:
        complain(f"hpo: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        words = f"{place}{error.strerror}; check the folder and the disk, and run the same command again"
        complain(f"hpo: {words}")
        sys.exit(2)
