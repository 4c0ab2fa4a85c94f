"""The options of every command, each declared once with its type, default, bounds and description.

The command line builds its parameters from these models (`hpo.cli.parameters`), the functions of `import hpo` their
keyword arguments (`hpo.cli.library`). Only pydantic is imported here, so that `hpo --help` stays quick.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from hpo.errors import StudyError
from hpo.search.options import TrialOptions, Weights


def option(
    description: str,
    default: Any = None,
    *,
    flags: str | None = None,
    metavar: str | None = None,
    argument: bool = False,
    secret: bool = False,
    resumes: bool = True,
    ge: float | None = None,
    le: float | None = None,
) -> Any:
    """Describe one field.

    Args:
        default: `...` for an argument that must be given.
        flags: Names on the command line, separated by spaces; `--field-name` by default.
        secret: Whether it is a URL whose password is masked wherever it is shown.
        resumes: Whether the command that resumes the work repeats it.
    """
    words: dict[str, Any] = {
        "flags": flags,
        "metavar": metavar,
        "argument": argument,
        "secret": secret,
        "resumes": resumes,
    }
    return Field(default, description=description, ge=ge, le=le, repr=not secret, json_schema_extra=words)


class Options(BaseModel):
    """Base class of the options of one command."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, defer_build=True)
    command_name: ClassVar[str] = ""

    @field_validator("*")
    @classmethod
    def _in_home(cls, value: Any) -> Any:
        """Replace `~` at the start of a path, which a shell leaves in `--data=~/photos`."""
        return value.expanduser() if isinstance(value, Path) else value

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build the options from keyword arguments.

        Raises:
            StudyError: A value has the wrong type or is out of bounds.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise StudyError(_first_fault(error)) from error

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Fields by name, the command's own before those that it shares with others."""
        names = [name for each in cls.__mro__ for name in inspect.get_annotations(each)]
        return {name: cls.model_fields[name] for name in dict.fromkeys(names) if name in cls.model_fields}

    def command(self) -> str:
        """Return the command line that resumes the work. Passwords are masked; `--set` comes last."""
        arguments: list[str] = []
        options: list[str] = []
        settings: list[str] = []
        for name, field in self.fields().items():
            value = getattr(self, name)
            if value is None or value == field.default or not words(field, "resumes", True):
                continue
            flag = flags(name, field)[0]
            if words(field, "argument"):
                arguments.append(str(value))
            elif isinstance(value, bool):
                on, _, off = flag.partition("/")
                options.append(on if value else off)
            elif isinstance(value, str | Path | int | float):
                options += [flag, _shown(value, masked=bool(words(field, "secret")))]
            else:
                settings += [word for text in setting_texts(value) for word in (flag, text)]
        return shlex.join([*self.command_name.split(), *arguments, *options, *settings])


def words(field: FieldInfo, key: str, default: Any = None) -> Any:
    """Return what `option` was given for one of its words, such as `metavar`."""
    extra = field.json_schema_extra
    return extra.get(key, default) if isinstance(extra, dict) else default


def flags(name: str, field: FieldInfo) -> list[str]:
    """Return the names of an option on the command line, the long one first."""
    given = words(field, "flags")
    return given.split() if given else [f"--{name.replace('_', '-')}"]


def bounds(field: FieldInfo) -> dict[str, float]:
    """Return the smallest (`ge`) and largest (`le`) value of a field, where it has them."""
    found = {key: getattr(rule, key, None) for rule in field.metadata for key in ("ge", "le") if hasattr(rule, key)}
    return {key: value for key, value in found.items() if value is not None}


def setting_texts(settings: Settings) -> list[str]:
    """Return settings as `--set` takes them: `KEY=VALUE`, the value as YAML."""
    if not isinstance(settings, Mapping):
        return list(settings)
    from hpo.space.document import flow

    return [f"{path}={flow(value)}" for path, value in settings.items()]


def _shown(value: str | float | Path, *, masked: bool) -> str:
    if masked:
        from hpo.storage.urls import mask

        return mask(str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    what = f"{'.'.join(map(str, fault['loc'][:1]))}={fault['input']}"
    least, most = (fault.get("ctx", {}).get(key) for key in ("ge", "le"))
    if least is not None:
        return f"{what}: give {least:g} or more"
    return f"{what}: give {most:g} or less" if most is not None else f"{what}: {fault['msg']}"


Settings = Mapping[str, Any] | tuple[str, ...]
"""Values by dotted path, as in `{"epochs": 3}`, or `KEY=VALUE` texts as the command line takes them."""

Text = Annotated[str, BeforeValidator(str)]
"""A name or path; numbers and `Path` are accepted."""


# Parts that several commands share ----------------------------------------------------------------------------------

Study = Annotated[str | None, option("Name of the study; by default the one that ran last.")]
StudyArgument = Annotated[str | None, option("Name of the study; by default the one that ran last.", argument=True)]
Output = Annotated[Path | None, option("Output file; by default the terminal.", flags="--output -o")]
SetOption = Annotated[
    Settings,
    option(
        "Set a field, for example epochs=3; a searched field is pinned to the value. Repeatable.", metavar="KEY=VALUE"
    ),
]
Metric = Annotated[
    str | None,
    option(
        "Metric to report, and for early stopping and plateau schedules to watch: accuracy, macro_f1, "
        "balanced_accuracy or nll. By default accuracy, or of a trial its study's.",
    ),
]
SkipBroken = Annotated[bool, option("Skip unreadable image files and report their number.")]
Storage = Annotated[str | None, option("URL of the study's storage, if it has a password.", metavar="URL", secret=True)]


class JsonOption(Options):
    """The form of a command's result."""

    as_json: bool = option(
        "Print the result as one JSON document, and everything else on standard error.", False, flags="--json"
    )


class DetailOptions(JsonOption):
    """How much a command shows."""

    quiet: bool = option("Show only warnings and errors.", False, flags="--quiet -q")
    verbose: bool = option("Show every epoch, all parameters of a trial, and details for debugging.", False)


class DataOptions(Options):
    """Where the images are."""

    data: Path | None = option(
        "Your images: a folder, .zip, .tar.*, .npz, .csv or .parquet; for a built-in set, the folder that holds it."
    )


class DeviceOptions(Options):
    """One device."""

    device: str | None = option("cpu, cuda or cuda:N; by default the first GPU, or the CPU.")


class PlacementOptions(DeviceOptions):
    """Devices, and how many trials each trains at once."""

    devices: str | None = option(
        "Several devices, for example cuda:0,cuda:1, or all GPUs with `all`. A trial runs on one.",
        metavar="D1,D2",
    )
    workers: int | None = option("Number of trials trained at once, each in its own process.", ge=1)
    per_device: str | None = option(
        "Number of trials trained at once on each device, 1 by default; `auto` measures the fastest number.",
        metavar="K",
    )


class LimitOptions(Options):
    """A time limit."""

    hours: float | None = option(
        "Time limit of all runs of this command on the study together. Nothing begins that cannot end in time.",
        metavar="H",
        ge=0.001,
    )
    minutes: float | None = option("The same in minutes; added to --hours.", metavar="M", ge=0.05)

    @property
    def limit_s(self) -> float | None:
        """The time limit in seconds; None without one."""
        limit_s = 3600 * (self.hours or 0) + 60 * (self.minutes or 0)
        return limit_s or None


class ArtifactOptions(Options):
    """Where files are shared between machines."""

    artifacts: str | None = option(
        "Artifact store for machines without a shared studies folder, for checkpoints, weights and pictures: a "
        "folder, s3://…, gs://… or any other URL that fsspec supports.",
        metavar="URL",
        secret=True,
    )


class ChosenStudy(Options):
    """A study that exists, named as an argument."""

    study: StudyArgument = None
    storage: Storage = None


# Search -------------------------------------------------------------------------------------------------------------


class RunOptions(LimitOptions, DataOptions, PlacementOptions, ArtifactOptions, TrialOptions):
    """Options of `hpo run`."""

    command_name: ClassVar[str] = "hpo run"

    space: Text = option("Search space: a name from `hpo space list`, or a YAML file.", ..., argument=True)
    trials: int | None = option("Total number of trials; by default the space's.", ge=1)
    patience: bool = option(
        "Stop when the chance that one of 20 more trials beats the best by over its standard error is below 10 %.",
        False,
    )
    study: str | None = option("Name of the study; by default the space's.")
    storage: str | None = option(
        "Any Optuna storage URL; by default a journal file in the study's folder.", metavar="URL", secret=True
    )
    set: SetOption = ()
    seed: int | None = option("Seed of the study, 0 by default.", ge=0)
    workers: int | None = option(
        "Number of trials trained at once, each in its own process; 0 only queues them for `hpo worker`.",
        ge=0,
    )
    retries: int | None = option(
        "How often a trial is restarted from its checkpoint after its process died, before it counts as failed; "
        "3 by default.",
        metavar="R",
        ge=0,
    )
    engine: str = option("Where workers run: `local`, or `ray` for a Ray cluster.", "local")
    address: str | None = option(
        "Head of the Ray cluster; by default `auto`, the cluster of this machine.", metavar="HOST:PORT"
    )
    take_over: str | None = option(
        "Start with those trials of another study that fit the space.", metavar="STUDY", resumes=False
    )
    warm_start: str | None = option(
        "Try the best configurations of a study on other images first.", metavar="STUDY", resumes=False
    )
    recipes: bool = option("Also train the space's recipes, for comparison.", True, flags="--recipes/--no-recipes")
    long_baseline: bool = option(
        "After the search, train the baseline once for as many epochs as all trials together: the search must beat "
        "that too. It doubles the cost; a time limit is divided between both.",
        False,
    )
    skip_broken: SkipBroken = False
    reclaim: bool = option(
        "Take back trials held by a process on another host that is known to be dead.", False, resumes=False
    )
    yes: bool = option("Allow a total of over 100,000 trials.", False)


class FitOptions(LimitOptions, DeviceOptions):
    """Options of `hpo fit`."""

    command_name: ClassVar[str] = "hpo fit"

    data: Text = option(
        "Your images: a folder, .zip, .tar.*, .npz, .csv or .parquet; or the name of a built-in set.",
        ...,
        argument=True,
    )
    hours: float | None = option(
        "Time limit of all runs of this command together, 1 hour by default. It ends with a model in time.",
        metavar="H",
        ge=0.001,
    )
    predict: Path | None = option(
        "Images to label with the model: a folder, .zip, .tar.*, .npz, or a .csv of paths.", metavar="IMAGES"
    )
    like: Path | None = option(
        "Sample submission: write its ids, order, header and columns, with our labels or probabilities.",
        metavar="CSV",
    )
    output: Path = option("CSV file to write with --predict.", Path("submission.csv"), flags="--output -o")
    weights: Weights = None
    space: str | None = option("Search space, instead of the one that fits images and time.")
    study: str | None = option("Name of the study; by default fit- and the name of the data.")
    set: SetOption = ()
    skip_broken: SkipBroken = False

    @property
    def path(self) -> Path | None:
        """The path of the images; None for a built-in set, unless a file has its name."""
        from core.config import BUILTIN_DATA

        path = Path(self.data).expanduser()
        return None if self.data in BUILTIN_DATA and not path.exists() else path

    @property
    def time_s(self) -> float:
        """The time limit in seconds."""
        return self.limit_s or 3600.0


class FitKeywords(TypedDict, total=False):
    """Keyword arguments of `hpo.fit`: the fields of `FitOptions`."""

    hours: float | None
    minutes: float | None
    predict: str | Path | None
    like: str | Path | None
    output: str | Path
    weights: str | Path | None
    space: str | None
    study: str | None
    set: Mapping[str, Any]
    skip_broken: bool
    device: str | None


class RunKeywords(TypedDict, total=False):
    """Keyword arguments of `hpo.run`: the fields of `RunOptions` as editors and type checkers see them."""

    trials: int | None
    hours: float | None
    minutes: float | None
    patience: bool
    study: str | None
    data: str | Path | None
    storage: str | None
    set: Mapping[str, Any]
    seed: int | None
    device: str | None
    devices: str | None
    workers: int | None
    per_device: int | str | None
    retries: int | None
    keep: int
    keep_gb: float | None
    weights: str | Path | None
    artifacts: str | None
    engine: str
    address: str | None
    take_over: str | None
    warm_start: str | None
    recipes: bool
    long_baseline: bool
    skip_broken: bool
    reclaim: bool
    yes: bool
    tensorboard: bool


class WorkerOptions(LimitOptions, DataOptions, PlacementOptions, ArtifactOptions, TrialOptions):
    """Options of `hpo worker`."""

    command_name: ClassVar[str] = "hpo worker"

    study: str = option("A study started by `hpo run`, on this machine or another.", ..., argument=True)
    storage: str | None = option(
        "URL of the study's storage; not needed for a study started on this machine.", metavar="URL", secret=True
    )
    hours: float | None = option(
        "Time limit of this worker. Two minutes before it, and at most a tenth of it, the worker finishes the epoch, "
        "saves and leaves its trials to others.",
        metavar="H",
        ge=0.001,
    )


class TrainOptions(DataOptions, DeviceOptions):
    """Options of `hpo train`."""

    weights: Weights = None
    recipe: str | None = option("Recipe: a name from `hpo space list`, or a YAML file.", argument=True)
    trial: str | None = option(
        "Train this trial again instead of a recipe, and compare the result with the trial's.",
        flags="--from",
        metavar="STUDY/TRIAL",
    )
    storage: Storage = None
    set: SetOption = ()
    metric: Metric = None
    skip_broken: SkipBroken = False
    profile: bool = option("First measure how the time of an epoch is spent, as a table.", False)


class ConfirmOptions(ChosenStudy, LimitOptions, DataOptions, PlacementOptions):
    """Options of `hpo confirm`."""

    command_name: ClassVar[str] = "hpo confirm"

    weights: Weights = None
    budget: float | None = option(
        "Cost limit as a fraction of the epochs that the search trained; by default the space's confirm.budget, else "
        "a third, and at least twelve trainings within the search's epochs and time.",
        metavar="SHARE",
        ge=0,
    )


# Models -------------------------------------------------------------------------------------------------------------


class RefitOptions(DataOptions, DeviceOptions):
    """Options of `hpo refit`."""

    command_name: ClassVar[str] = "hpo refit"

    trial: Text = option(
        "`best`, the number of a trial, `params<1e6` (also latency, size), `smallest`, or a recipe: a name from `hpo "
        "space list`, or a YAML file.",
        ...,
        argument=True,
    )
    within: float | None = option(
        "With `smallest`: the cheapest of the trials whose score is at most this much worse than the best.", ge=0
    )
    study: Study = None
    storage: Storage = None
    set: SetOption = ()
    metric: Metric = None
    skip_broken: SkipBroken = False
    weights: Weights = None
    folds: int | None = option("Train an ensemble of K networks, each without another K-th of the images.", metavar="K")
    members: int | None = option(
        "Choose among one network, averaged weights and the ensemble of up to K networks from different seeds.",
        metavar="K",
    )
    ensemble: int | None = option(
        "Choose between the winner and its ensemble with other configurations of the study: at most K networks, with "
        "weights selected on held-out images.",
        metavar="K",
    )
    single: bool = option("Train one configuration, which is the default.", False)
    epochs: str | None = option(
        "Epochs of the training: a number, or `auto`, which compares longer trainings out of fold; by default `auto` "
        "for the confirmed `best`, otherwise the trial's.",
        metavar="N|auto",
    )
    average: str | None = option(
        "Average of the weights: own, none or ema_H with its half-life as a fraction of the run, such as ema_0.03; by "
        "default the one that held-out images favour.",
        metavar="NAME",
    )
    views: str | None = option(
        "Test-time augmentation: none, flip, shift or flip_shift; by default the one that held-out images favour.",
        metavar="NAME",
    )
    form: str | None = option(
        "With --members: one, uniform_soup, greedy_soup or ensemble; with --ensemble: one or ensemble; by default the "
        "one that held-out images favour.",
        metavar="NAME",
    )
    onnx: bool = option("Also write the model as ONNX, and check its outputs against torch's.", False)
    confirm: bool = option(
        "Confirm `best` on other seeds and splits before it is refitted, unless that is done.",
        True,
        flags="--confirm/--no-confirm",
    )


class RefitKeywords(TypedDict, total=False):
    """Keyword arguments of `hpo.refit`: the fields of `RefitOptions`."""

    data: str | Path | None
    storage: str | None
    set: Mapping[str, Any]
    metric: str | None
    skip_broken: bool
    folds: int | None
    members: int | None
    ensemble: int | None
    single: bool
    epochs: int | str | None
    average: str | None
    views: str | None
    form: str | None
    onnx: bool
    confirm: bool
    within: float | None
    weights: str | Path | None
    device: str | None


class PredictOptions(DeviceOptions):
    """Options of `hpo predict`."""

    command_name: ClassVar[str] = "hpo predict"

    bundle: Text = option(
        "`best` of the study that ran last, a study or recipe with one refitted model, or a folder written by "
        "`hpo refit`.",
        ...,
        argument=True,
    )
    images: Path = option("A folder, .zip, .tar.*, .npz, or a .csv of paths.", ..., argument=True)
    output: Path = option("CSV file to write.", Path("submission.csv"), flags="--output -o")
    like: Path | None = option(
        "Sample submission: write its ids, order, header and columns, with our labels or probabilities.",
        metavar="CSV",
    )
    probabilities: bool = option("Add a column for each class.", False)
    skip_broken: SkipBroken = False


# Views of a study ---------------------------------------------------------------------------------------------------


class ReportOptions(ChosenStudy, DataOptions):
    """Options of `hpo report`."""

    output: Path | None = option("HTML file; by default report.html in the study's folder.", flags="--output -o")
    compare: tuple[str, ...] = option("Compare with this study. Repeatable.", (), metavar="STUDY")


class DashboardOptions(ChosenStudy):
    """Options of `hpo dashboard`."""

    port: int = option("Port to listen on.", 8080, ge=1, le=65535)
    host: str = option("Address to listen on.", "127.0.0.1")


class TopOptions(ChosenStudy):
    """Options of `hpo study top`."""

    every: float = option("Seconds between two updates.", 2.0, metavar="SECONDS", ge=0.1)
    once: bool = option("Show the study once and exit, as without a terminal.", False)


class TrialsOptions(ChosenStudy):
    """Options of `hpo study trials`."""

    csv: bool = option("Print CSV with all columns instead of a table of the main ones.", False)
    output: Output = None


class AuditOptions(ChosenStudy, DataOptions):
    """Options of `hpo data audit`."""

    csv: bool = option("Print all suspects as CSV instead of a table of the first.", False)
    output: Output = None


class ExportOptions(Options):
    """Options of `hpo study export`."""

    trial: str = option("`best`, or the number of a trial.", ..., argument=True)
    python: bool = option("Export a Python script that trains it by core.loop.train, not a recipe.", False)
    study: Study = None
    storage: Storage = None
    output: Output = None


class NamedStudy(Options):
    """A study that has to be named."""

    study: str = option("Name of the study.", ..., argument=True)
    storage: Storage = None


class AddOptions(NamedStudy):
    """Options of `hpo study add`."""

    params: Settings = option(
        "A searched field and its value, for example optim.lr_scale=3; the others have the baseline's. Repeatable.",
        (),
        metavar="KEY=VALUE",
    )


class DeleteOptions(NamedStudy):
    """Options of `hpo study delete`."""

    yes: bool = option("Delete without asking.", False)


class RenameOptions(NamedStudy):
    """Options of `hpo study rename`."""

    study: str = option("Name of the study.", ..., argument=True)
    new: str = option("Its new name.", ..., argument=True)


class CopyOptions(NamedStudy):
    """Options of `hpo study copy`."""

    study: str = option("Name of the study.", ..., argument=True)
    new: str = option("Name of the copy.", ..., argument=True)


class DoctorOptions(ChosenStudy):
    """Options of `hpo study doctor`."""

    mend: bool = option("Fix what can be fixed; finished trials are never changed.", False)


# Search spaces ------------------------------------------------------------------------------------------------------


class CheckOptions(Options):
    """Options of `hpo space check`."""

    file: str = option("Search space or recipe: its name, or a YAML file.", ..., argument=True)


class SuggestOptions(ChosenStudy):
    """Options of `hpo space suggest`."""

    output: Output = None


class SchemaOptions(Options):
    """Options of `hpo space schema`."""

    output: Output = None
