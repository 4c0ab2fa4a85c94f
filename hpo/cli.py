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
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave broken image files out, and count them.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="The study; the one run last.", show_default=False)]
Storage = Annotated[
    str | None,
    typer.Option(help="Its storage's URL, where that holds a password; as it was begun.", show_default=False),
]
StudyArgument = Annotated[str | None, typer.Argument(help="The study; the one run last.", show_default=False)]


@app.callback()
def _begin() -> None:
    from hpo.console import set_up_logging

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
    per_device: Annotated[
        str | None,
        typer.Option(
            "--per-device",
            metavar="K",
            help="How many trials run on the device at once, each in a process; auto measures in the first trials "
            "what trains the most images a second. 1.",
            show_default=False,
        ),
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
    from hpo.commands.run import run_command

    run_command(
        space,
        trials=trials,
        study_name=study,
        data=data,
        storage=storage,
        assignments=assignments or [],
        seed=seed,
        device_name=device,
        per_device=per_device,
        take_over=take_over,
        skip_broken=skip_broken,
        reclaim=reclaim,
    )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe: a name from `hpo space list`, or a YAML file.")],
    data: Data = None,
    assignments: Assignments = None,
    metric: Annotated[
        str,
        typer.Option(
            help="What is reported, and what early stopping and a plateau schedule watch: accuracy, macro_f1, "
            "balanced_accuracy or nll."
        ),
    ] = "accuracy",
    device: Device = None,
    skip_broken: SkipBroken = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Measure first where an epoch's time goes: a table of its parts, and the largest cost."
        ),
    ] = False,
) -> None:
    """Train one fixed configuration once, or with data.folds once a fold: the baseline to beat."""
    from hpo.commands.train import train_command

    train_command(
        recipe,
        data=data,
        assignments=assignments or [],
        metric=metric,
        device_name=device,
        skip_broken=skip_broken,
        profiled=profile,
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
    device: Device = None,
) -> None:
    """Retrain a trial on train+val into a submission model, and open the test set."""
    from hpo.commands.refit import refit_command

    refit_command(trial, study_name=study, storage=storage, data=data, folds=folds, device_name=device)


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
    from hpo.commands.predict import predict_command

    predict_command(
        bundle, images, output=output, probabilities=probabilities, device_name=device, skip_broken=skip_broken
    )


@app.command()
def dashboard(
    study: StudyArgument = None,
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8080,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
) -> None:
    """Look at a study in the browser, with optuna-dashboard."""
    from hpo.commands.study import dashboard_command

    dashboard_command(study, storage=storage, port=port, host=host)


@study_app.command("list")
def study_list() -> None:
    """The studies here, and how they stand."""
    from hpo.commands.study import list_command

    list_command()


@study_app.command("show")
def study_show(study: StudyArgument = None, storage: Storage = None) -> None:
    """One study: its trials by state, its best, and how to go on."""
    from hpo.commands.study import show_command

    show_command(study, storage=storage)


@space_app.command("list")
def space_list() -> None:
    """The search spaces and recipes that can be named."""
    from hpo.commands.space import list_command

    list_command()


@space_app.command("check")
def space_check(
    file: Annotated[str, typer.Argument(help="A search space or recipe: its name, or a YAML file.")],
) -> None:
    """Check a search space or recipe: every fault at once, each with its line."""
    from hpo.commands.space import check_command

    check_command(file)


@space_app.command("schema")
def space_schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file; the terminal.", show_default=False)
    ] = None,
) -> None:
    """The JSON Schema of search spaces and recipes, for editors."""
    from hpo.commands.space import schema_command

    schema_command(output)


@data_app.command("list")
def data_list() -> None:
    """The built-in data sets: size, classes, where they lie, whether they are on disk."""
    from hpo.commands.data import list_command

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
