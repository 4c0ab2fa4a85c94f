"""The functions of `import hpo`: the same studies and models as by the commands, with exceptions and return values.

Their keyword arguments are the fields of the options models. A script with several workers needs
`if __name__ == "__main__":`, because each worker process imports it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hpo.api.options import FitKeywords, FitOptions, Options, RefitKeywords, RefitOptions, RunKeywords, RunOptions
from hpo.cli.terminal import Terminal, stoppable
from hpo.reporter import Reporter, Silent
from hpo.text import duration

if TYPE_CHECKING:
    from typing import Unpack

    import torch

    from hpo.api.fit import FitResult
    from hpo.api.refit import RefitResult
    from hpo.api.search_result import SearchResult
    from hpo.loggers import Callback
    from hpo.study import Study
    from hpo.submission.bundle import LoadedBundle
    from hpo.submission.predictions import Images, Predictions

Function = TypeVar("Function", bound=Callable[..., Any])


def process_began() -> float:
    """Return when this process began, as `time.time()`: imports are within a time limit."""
    import psutil

    return float(psutil.Process().create_time())


def fit_and_show(options: FitOptions, reporter: Reporter, *, began: float | None = None) -> FitResult:
    """Fit, and show the result. Ctrl-C waits for the end of the epoch."""
    from hpo.api.fit import fit

    with stoppable(reporter) as interrupts:
        result = fit(options, reporter, interrupts, began=began)
        _show_fit(result, options, reporter)
    return result


def _show_fit(result: FitResult, options: FitOptions, reporter: Reporter) -> None:
    """Show the test scores, and where model, predictions and report are."""
    say = reporter.say
    if result.refit is not None:
        from hpo.cli.show import show_refit  # with Optuna, which a finished study does not wait for

        say()
        show_refit(result.refit, reporter, ending=False)
    limit = f" of {duration(options.limit_s)}" if options.limit_s else ""
    state = "was finished before" if result.before else f"is finished after {duration(result.used_s)}{limit}"
    say(f"study {result.study} {state}")
    say(f"  model        {result.model}")
    if result.predictions is not None:
        say(f"  predictions  {result.predictions}")
    if result.report is not None:
        say(f"  report       {result.report}, for a browser")
    if result.before:
        more = options.model_copy(update={"hours": None, "minutes": 2 * options.time_s / 60})
        say(f"more time continues it: {more.command()}")


def run_and_show(options: RunOptions, reporter: Reporter, callbacks: Sequence[Callback] = ()) -> SearchResult:
    """Search, and show the result. Ctrl-C waits for the end of the epoch."""
    from hpo.api.search import search

    with stoppable(reporter) as interrupts:
        result = search(options, reporter, interrupts, callbacks=callbacks)
        from hpo.cli.show import show_search  # with Optuna, which a wrong name does not wait for

        show_search(result, reporter)
    return result


def refit_and_show(options: RefitOptions, reporter: Reporter) -> RefitResult:
    """Refit, and show the result. Ctrl-C waits for the end of the epoch."""
    from hpo.api.refit import refit

    with stoppable(reporter) as interrupts:
        result = refit(options, reporter, interrupts)
        from hpo.cli.show import show_refit  # with Optuna, which a wrong name does not wait for

        show_refit(result, reporter)
    return result


def _takes(model: type[Options]) -> Callable[[Function], Function]:
    """Give a function the fields of a model as keyword arguments, in its signature and its docstring."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function).parameters
        added = {name: field for name, field in model.fields().items() if name not in own}
        parameters = [parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD]
        for name, field in added.items():
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation
                )
            )
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        arguments = [f"    {name}: {field.description}" for name, field in added.items()]
        before, marker, after = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
        function.__doc__ = "\n".join([before + marker.rstrip(), *arguments, after])
        return function

    return decorate


@_takes(FitOptions)
def fit(data: str | Path, *, quiet: bool = False, **options: Unpack[FitKeywords]) -> LoadedBundle:
    """From labelled images to a model by a deadline, as `hpo fit` does; the same call continues an interrupted one.

    This opens the test set.

    Args:
        data: Your images, or the name of a built-in set.
        quiet: Show nothing.

    Returns:
        The model, loaded from the written folder, which is its `folder`.

    Raises:
        HpoError: An option is wrong, the time is too short for one training, or another fit has the study's name.
        CoreError: The images or the device cannot be used.
        KeyboardInterrupt: Stopped; the same call continues.
    """
    inspect.signature(fit).bind(data, **options)
    result = fit_and_show(FitOptions.of(data=data, **options), Silent() if quiet else Terminal())
    from hpo.submission.bundle import load_bundle

    return load_bundle(result.model, options.get("device"))


@_takes(RunOptions)
def run(
    space: str | Path,
    *,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Unpack[RunKeywords],
) -> Study:
    """Run a study's trials up to its total; start the study or resume it, as `hpo run` does.

    Args:
        space: Search space: a name from `hpo space list`, or a YAML file.
        quiet: Show nothing.
        callbacks: Functions with the signature of Optuna's callbacks, `(study, frozen_trial)`, called in this process
            after each trial, when that is in the storage. Their exceptions end the run. Not with several workers.

    Returns:
        The study. Its best trial is `best_trial()`, Optuna's own study is `optuna`, and `hpo.trials_frame(study)`
        returns all trials as a pandas dataframe.

    Raises:
        HpoError: The space has faults, or the study cannot be resumed as asked.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped; finished trials and checkpoints are kept.
    """
    inspect.signature(run).bind(space, **options)  # a TypeError names an unknown keyword
    options_of_run = RunOptions.of(space=space, **options)
    return run_and_show(options_of_run, Silent() if quiet else Terminal(), callbacks).study


@_takes(RefitOptions)
def refit(
    study: Study | str | None = None,
    trial: int | str | Path = "best",
    *,
    quiet: bool = False,
    **options: Unpack[RefitKeywords],
) -> LoadedBundle:
    """Retrain a trial or a recipe on training and validation images into a submission model, as `hpo refit` does.

    This opens the test set.

    Args:
        study: The return value of `run`, or a name; by default the study that ran last.
        trial: `best`, the number of a trial, or a recipe: a name from `hpo space list`, or a YAML file.
        quiet: Show nothing.

    Returns:
        The model, loaded from the written folder, which is its `folder`.

    Raises:
        HpoError: There is no such study or trial, or it cannot be refitted.
        CoreError: The data, the network or the device cannot be used.
        KeyboardInterrupt: Stopped; the same call resumes from the last checkpoint.
    """
    inspect.signature(refit).bind(study, trial, **options)
    values: dict[str, Any] = {"trial": trial, **options}
    if study is None or isinstance(study, str):
        values["study"] = study
    else:
        values["study"] = study.name
        if study.storage_url != str(study.paths.journal):  # the URL has a password, which is never stored
            values["storage"] = options.get("storage") or study.storage_url
    result = refit_and_show(RefitOptions.of(**values), Silent() if quiet else Terminal())
    from hpo.submission.bundle import load_bundle

    return load_bundle(result.refitted.dir, options.get("device"))


def predict(
    bundle: LoadedBundle | str | Path,
    images: Images,
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    skip_broken: bool = False,
) -> Predictions:
    """Label images, as `hpo predict` does; `Predictions.write` writes its CSV file.

    Args:
        bundle: `best`, a study, or a folder, as `hpo predict` accepts them, or a model loaded by `load_bundle`.
        images: Paths, Pillow images, arrays or tensors, as `LoadedBundle.predict` accepts them.
        device: For a folder: `cpu`, `cuda` or `cuda:N`; by default the first GPU, or the CPU.
        batch_size: Images at once on the device.
        skip_broken: Leave unreadable images out instead of raising an error.

    Raises:
        HpoError: The bundle cannot be loaded, or the images cannot be labelled.
        CoreError: An image is missing or broken, or there is no such device.
    """
    from core.tta import EVALUATION_BATCH
    from hpo.submission.bundle import LoadedBundle, load_bundle
    from hpo.submission.locate import locate_bundle

    if not isinstance(bundle, LoadedBundle):
        model = load_bundle(locate_bundle(bundle), device)
    elif device is None:
        model = bundle
    else:
        raise ValueError("a loaded model is on its device already; give its folder to load it on another")
    return model.predict(images, batch_size=batch_size or EVALUATION_BATCH, skip_broken=skip_broken)
