"""The command line. Every command imports what it needs when it runs, so that `hpo --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="hpo",
    help="Finds the best training configuration for a small image data set, and refits it into a model.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study_app = typer.Typer(no_args_is_help=True, help="Look after studies.")
space_app = typer.Typer(no_args_is_help=True, help="Look at search spaces and recipes, and check them.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data sets.")
app.add_typer(study_app, name="study")
app.add_typer(space_app, name="space")
app.add_typer(data_app, name="data")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Your images: a folder, .zip, .tar.*, .npz or .csv; or where a built-in data set lies.",
        show_default=False,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Set a field, as in epochs=3; on a searched field, pin it. Repeatable.", metavar="KEY=VALUE"
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU where there is one.", show_default=False)
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="D1,D2",
        help="Several devices, as in cuda:0,cuda:1; all is every GPU. Each trial has one of them.",
        show_default=False,
    ),
]
PerDevice = Annotated[
    str | None,
    typer.Option(
        "--per-device",
        metavar="K",
        help="How many trials run on a device at once, each in a process; auto measures in the first trials what "
        "trains the most images a second. 1.",
        show_default=False,
    ),
]
KeepGb = Annotated[
    float | None,
    typer.Option(
        "--keep-gb",
        min=0,
        metavar="GB",
        help="What kept weights and checkpoints may take on the disk; the worst trial's weights go first.",
        show_default=False,
    ),
]
Artifacts = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        metavar="URL",
        help="Where machines without a shared studies folder keep checkpoints, weights and pictures: a folder, or "
        "s3://…, gs://… and whatever else fsspec reaches.",
        show_default=False,
    ),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken image files out, and count them.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="The study; the one run last.", show_default=False)]
Storage = Annotated[
    str | None,
    typer.Option(help="Its storage's URL, where that holds a password; as it was begun.", show_default=False),
]
StudyArgument = Annotated[str | None, typer.Argument(help="The study; the one run last.", show_default=False)]


@app.callback()
def _begin() -> None:
    from hpo.cli.console import set_up_logging

    set_up_logging()


@app.command()
def run(
    space: Annotated[str, typer.Argument(help="A search space: a name from `hpo space list`, or a YAML file.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="The study's total; the space's own.", show_default=False)
    ] = None,
    study: Annotated[str | None, typer.Option(help="The study's name; the space's.", show_default=False)] = None,
    data: Data = None,
    storage: Annotated[
        str | None, typer.Option(help="Any Optuna URL; a journal file in the study's folder.", show_default=False)
    ] = None,
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The study's seed; 0.", show_default=False)] = None,
    device: Device = None,
    devices: Devices = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="How many trials run at once in all, each in a process; 0 only queues them, for `hpo worker`.",
            show_default=False,
        ),
    ] = None,
    per_device: PerDevice = None,
    retries: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="R",
            help="How often a trial is begun again, from its checkpoint, after its process died; then it counts as "
            "failed to train. 3.",
            show_default=False,
        ),
    ] = None,
    keep_gb: KeepGb = None,
    artifacts: Artifacts = None,
    engine: Annotated[str, typer.Option(help="Where workers run: local, or ray, a Ray cluster.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="The Ray cluster's head, host:port; auto, the one of this machine.", show_default=False),
    ] = None,
    take_over: Annotated[
        str | None,
        typer.Option(
            "--take-over",
            metavar="STUDY",
            help="Begin with the trials of this study that fit the space.",
            show_default=False,
        ),
    ] = None,
    skip_broken: SkipBroken = False,
    reclaim: Annotated[
        bool, typer.Option("--reclaim", help="Take back trials that a dead process on another host still holds.")
    ] = False,
) -> None:
    """Search: run a study's trials, up to its total. The same command again goes on to it."""
    from hpo.api.search import RunOptions, run_command

    run_command(
        RunOptions(
            space,
            trials=trials,
            study=study,
            data=data,
            storage=storage,
            assignments=assignments or (),
            seed=seed,
            device=device,
            devices=devices,
            workers=workers,
            per_device=per_device,
            retries=retries,
            keep_gb=keep_gb,
            artifacts=artifacts,
            engine=engine,
            address=address,
            take_over=take_over,
            skip_broken=skip_broken,
            reclaim=reclaim,
        )
    )


@app.command()
def worker(
    study: Annotated[str, typer.Argument(help="A study that was begun by `hpo run`, here or elsewhere.")],
    storage: Annotated[
        str | None,
        typer.Option(help="Its storage's URL; of a study that was begun here, its own.", show_default=False),
    ] = None,
    data: Data = None,
    device: Device = None,
    devices: Devices = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How many trials run at once here, each in a process. 1.", show_default=False
        ),
    ] = None,
    per_device: PerDevice = None,
    keep_gb: KeepGb = None,
    artifacts: Artifacts = None,
) -> None:
    """Join a study: run trials that wait, until none does. From any machine, as often as you like."""
    from hpo.api.worker import worker_command

    worker_command(
        study,
        storage=storage,
        data=data,
        device_name=device,
        devices=devices,
        workers=workers,
        per_device=per_device,
        keep_gb=keep_gb,
        artifacts=artifacts,
    )


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe: a name from `hpo space list`, or a YAML file.", show_default=False),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STUDY/TRIAL",
            help="In place of a recipe: train this trial again, alone, and say whether it comes out the same.",
            show_default=False,
        ),
    ] = None,
    storage: Storage = None,
    data: Data = None,
    assignments: Assignments = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What is reported, and what early stopping and a plateau schedule watch: accuracy, macro_f1, "
            "balanced_accuracy or nll. accuracy; with --from, the study's.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    skip_broken: SkipBroken = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Measure first where an epoch's time goes: a table of its parts, and the largest cost."
        ),
    ] = False,
) -> None:
    """Train one fixed configuration once, or with data.folds once a fold: the baseline to beat, or a trial again."""
    from hpo.api.train import train_command

    train_command(
        recipe,
        trial=trial,
        storage=storage,
        data=data,
        assignments=assignments or [],
        metric=metric,
        device_name=device,
        skip_broken=skip_broken,
        profiled=profile,
    )


@app.command()
def confirm(
    study: StudyArgument = None,
    storage: Storage = None,
    data: Data = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SHARE",
            help="What it may cost, as a share of the epochs that the search trained; the space's confirm.budget.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    devices: Devices = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many trainings run at once, each in a process.", show_default=False),
    ] = None,
    per_device: PerDevice = None,
) -> None:
    """Train the best configurations and the base again on other seeds and splits, and say whether tuning helped."""
    from hpo.api.confirm import confirm_command

    confirm_command(
        study,
        storage=storage,
        data=data,
        budget=budget,
        device_name=device,
        devices=devices,
        workers=workers,
        per_device=per_device,
    )


@app.command()
def refit(
    trial: Annotated[str, typer.Argument(help="`best`, or a trial's number.")],
    study: StudyOption = None,
    storage: Storage = None,
    data: Data = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Train K networks, each without another K-th of the images, as an ensemble; left out: one, on all.",
            show_default=False,
        ),
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Train K networks on all images, each from another seed, as an ensemble, or as one network of their "
            "averaged weights where validation says that it is as good.",
            show_default=False,
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the model as ONNX too, checked against torch's outputs.")
    ] = False,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm/--no-confirm",
            help="Before `best` is refitted, confirm it on other seeds and splits, unless that was done.",
        ),
    ] = True,
    device: Device = None,
) -> None:
    """Retrain a trial on train+val into a submission model, and open the test set. `best` is confirmed first."""
    from hpo.api.refit import refit_command

    refit_command(
        trial,
        study_name=study,
        storage=storage,
        data=data,
        folds=folds,
        members=members,
        onnx=onnx,
        confirm=confirm,
        device_name=device,
    )


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A folder that `hpo refit` wrote.")],
    images: Annotated[Path, typer.Argument(help="A folder, .zip, .tar.*, .npz, or a .csv of paths.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV to write.")] = Path("submission.csv"),
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Add one column a class.")] = False,
    device: Device = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Label images with a refitted model."""
    from hpo.cli.predict import predict_command

    predict_command(
        bundle, images, output=output, probabilities=probabilities, device_name=device, skip_broken=skip_broken
    )


@app.command()
def report(
    study: StudyArgument = None,
    storage: Storage = None,
    data: Data = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file; report.html in the study's folder.", show_default=False),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="STUDY", help="Set the study beside this one. Repeatable."),
    ] = None,
) -> None:
    """Write a study as one HTML file that needs no network: who won, how sure, at what cost, and why."""
    from hpo.cli.report import report_command

    report_command(study, storage=storage, data=data, output=output, compare=compare or [])


@app.command()
def dashboard(
    study: StudyArgument = None,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8080,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
) -> None:
    """Look at a study in the browser, with optuna-dashboard."""
    from hpo.cli.study import dashboard_command

    dashboard_command(study, storage=storage, port=port, host=host)


@study_app.command("list")
def study_list() -> None:
    """The studies here, and how they stand."""
    from hpo.cli.study import list_command

    list_command()


@study_app.command("show")
def study_show(study: StudyArgument = None, storage: Storage = None) -> None:
    """One study: its trials by state, its best, and how to go on."""
    from hpo.cli.study import show_command

    show_command(study, storage=storage)


@study_app.command("top")
def study_top(
    study: StudyArgument = None,
    storage: Storage = None,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often it looks.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, and leave; so does a run without a terminal.")
    ] = False,
) -> None:
    """A running study, live: its workers, their trials and rungs, the best, the rate and the time left."""
    from hpo.cli.top import top_command

    top_command(study, storage=storage, every_s=every, once=once)


@study_app.command("trials")
def study_trials(
    study: StudyArgument = None,
    storage: Storage = None,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV, every column; a table of the main ones.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A CSV file; the terminal.", show_default=False)
    ] = None,
) -> None:
    """Every trial: state, value, parameters, and how it went."""
    from hpo.cli.trials import trials_command

    trials_command(study, storage=storage, csv=csv, output=output)


@study_app.command("export")
def study_export(
    trial: Annotated[str, typer.Argument(help="`best`, or a trial's number.")],
    study: StudyOption = None,
    storage: Storage = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A YAML file; the terminal.", show_default=False)
    ] = None,
) -> None:
    """A trial's configuration as a recipe, which `hpo train` and a space's `base` accept."""
    from hpo.cli.trials import export_command

    export_command(trial, study_name=study, storage=storage, output=output)


@study_app.command("doctor")
def study_doctor(
    study: StudyArgument = None,
    storage: Storage = None,
    mend: Annotated[
        bool, typer.Option("--mend", help="Fix what can be fixed; a finished trial is never changed.")
    ] = False,
) -> None:
    """List the problems of a study. Exit code 0: none, or all of them were fixed; 1: there are some."""
    from hpo.cli.study import doctor_command

    if not doctor_command(study, storage=storage, mend=mend):
        raise typer.Exit(1)


@space_app.command("list")
def space_list() -> None:
    """The search spaces and recipes that can be named."""
    from hpo.cli.space import list_command

    list_command()


@space_app.command("check")
def space_check(
    file: Annotated[str, typer.Argument(help="A search space or recipe: its name, or a YAML file.")],
) -> None:
    """Check a search space or recipe: every fault at once, each with its line."""
    from hpo.cli.space import check_command

    check_command(file)


@space_app.command("suggest")
def space_suggest(
    study: StudyArgument = None,
    storage: Storage = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A YAML file; the terminal.", show_default=False)
    ] = None,
) -> None:
    """A narrowed or widened search space from a finished study, with its reasons as comments."""
    from hpo.cli.space import suggest_command

    suggest_command(study, storage=storage, output=output)


@space_app.command("schema")
def space_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file; the terminal.", show_default=False)
    ] = None,
) -> None:
    """The JSON Schema of search spaces and recipes, for editors."""
    from hpo.cli.space import schema_command

    schema_command(output)


@data_app.command("list")
def data_list() -> None:
    """The built-in data sets: size, classes, where they lie, whether they are on disk."""
    from hpo.cli.data import list_command

    list_command()


def main() -> None:
    """Runs the command line. A person's mistake is one line and exit code 2; a fault of ours keeps its traceback."""
    from core.errors import CoreError
    from hpo.errors import HpoError

    try:
        app()
    except (HpoError, CoreError) as error:
        print(f"hpo: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
