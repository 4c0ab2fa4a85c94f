"""Names of files and folders: the only module that spells names under `studies/`.

The layout of a study's folder is a public contract (docs/studies.md).
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_CONFIRMATION = ".confirm"

LONG_BASELINE = "long baseline"
"""Name, in place of a recipe's, of a training of the baseline as long as a whole search."""


def studies_root() -> Path:
    """Return the folder of all studies: $HPO_STUDIES, by default `studies`."""
    return Path(os.environ.get("HPO_STUDIES") or "studies")


def no_studies() -> str:
    """The sentence about a folder without studies."""
    return f"no studies in {studies_root()} yet; begin with: hpo run digits"


def _trainings_root() -> Path:
    """The folder of trainings that belong to no study."""
    return studies_root() / "trainings"


def cache_root() -> Path:
    """Return the folder of decoded data sets: $HPO_CACHE, by default $XDG_CACHE_HOME/hpo or `~/.cache/hpo`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HPO_CACHE") or Path(caches, "hpo"))


def data_root() -> Path:
    """Return the folder of downloaded data sets: $HPO_DATA, by default `data`."""
    return Path(os.environ.get("HPO_DATA") or "data")


def search_space_dirs() -> list[Path]:
    """Return the folders with search spaces: the user's `search_spaces`, then the installed copy."""
    installed = Path(__file__).resolve().parent.parent / "search_spaces"
    here = Path("search_spaces")
    return [here, installed] if here.is_dir() and here.resolve() != installed else [installed]


def confirmation_of(study: str) -> str:
    """Return the name of a study's confirmation."""
    return f"{study}{_CONFIRMATION}"


def is_confirmation(study: str) -> bool:
    """Whether this is a confirmation's name."""
    return study.endswith(_CONFIRMATION)


def confirmed_by(confirmation: str) -> str:
    """Return the confirmed study's name."""
    return confirmation.removesuffix(_CONFIRMATION)


@dataclass(frozen=True)
class TrainingPaths:
    """Names in the folder of a training that is not a trial."""

    dir: Path

    @classmethod
    def of(cls, name: str, *identity: str) -> TrainingPaths:
        """The folder of `hpo train`, one per configuration and data set, to be resumed."""
        digest = hashlib.sha256("/".join(identity).encode()).hexdigest()
        return cls(_trainings_root() / f"{name}-{digest[:8]}")

    @property
    def config(self) -> Path:
        return self.dir / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line of JSON per epoch."""
        return self.dir / "metrics.jsonl"

    def model(self, fold: int = 1) -> Path:
        """Final weights of a fold; 1 for a training without folds."""
        return self.dir / f"model{_of_fold(fold)}.safetensors"

    def validation(self, fold: int = 1) -> Path:
        """Outputs of a fold's weights on its validation images."""
        return self.dir / f"validation{_of_fold(fold)}.safetensors"

    @property
    def curves(self) -> Path:
        return self.dir / "learning_curves.png"

    @property
    def profile(self) -> Path:
        """Times and memory of `--profile`."""
        return self.dir / "profile.json"

    @property
    def profile_table(self) -> Path:
        """The profile as shown in the terminal."""
        return self.dir / "profile.md"

    @property
    def lock(self) -> Path:
        """File lock held by the process that trains."""
        return self.dir / ".training"

    @property
    def result(self) -> Path:
        """The result; missing before the end."""
        return self.dir / "result.json"

    def checkpoint(self, fold: int = 1) -> Path:
        """Checkpoint of a running training; that of a finished fold stays until all folds are finished."""
        return self.dir / f"checkpoint{_of_fold(fold)}.pt"

    def checkpoints(self, folds: int) -> list[Path]:
        """Checkpoints of all folds, whether they exist or not."""
        return [self.checkpoint(fold) for fold in range(1, folds + 1)]


@dataclass(frozen=True)
class StudyPaths:
    """Names in a study's folder."""

    dir: Path

    @classmethod
    def of(cls, name: str) -> StudyPaths:
        return cls(studies_root() / name)

    @property
    def name(self) -> str:
        return self.dir.name

    def inside(self, file: Path) -> str:
        """Return a name such as `trials/00003/model.safetensors`."""
        return file.relative_to(self.dir).as_posix()

    @property
    def study(self) -> str | None:
        """The study's name; None if the folder is not a study's."""
        return self.name

    @property
    def journal(self) -> Path:
        """Optuna's journal file, the default storage; a confirmation shares that of its search, for one dashboard."""
        folder = self.dir.with_name(confirmed_by(self.name)) if is_confirmation(self.name) else self.dir
        return folder / "journal.log"

    @property
    def study_yaml(self) -> Path:
        """The study's metadata."""
        return self.dir / "study.yaml"

    @property
    def images(self) -> Path:
        """The list of the images that the study trains and validates on."""
        return self.dir / "images.json.gz"

    @property
    def artifacts(self) -> Path:
        """Artifacts that the dashboard shows."""
        return self.dir / "artifacts"

    @property
    def trials(self) -> Path:
        return self.dir / "trials"

    def trial(self, number: int) -> Path:
        return self.trials / f"{number:05d}"

    def trial_config(self, number: int) -> Path:
        return self.trial(number) / "config.yaml"

    def trial_metrics(self, number: int) -> Path:
        """One line of JSON per epoch."""
        return self.trial(number) / "metrics.jsonl"

    def trial_model(self, number: int, fold: int = 1) -> Path:
        """Final weights of a fold; only the best trials keep theirs."""
        return self.trial(number) / f"model{_of_fold(fold)}.safetensors"

    def trial_validation(self, number: int, fold: int = 1) -> Path:
        """Outputs of those weights on the validation images; kept when `--keep-gb` deletes the weights."""
        return self.trial(number) / f"validation{_of_fold(fold)}.safetensors"

    def validation_outputs(self) -> list[Path]:
        """Existing outputs of all trials and folds."""
        return sorted(self.trials.glob("*/validation*.safetensors"))

    def trial_models(self, number: int) -> list[Path]:
        """Existing weights of the trial's folds."""
        return sorted(self.trial(number).glob("model*.safetensors"))

    def kept_of(self, number: int) -> list[Path]:
        """Existing weights and validation outputs of the trial's folds."""
        return [*self.trial_models(number), *sorted(self.trial(number).glob("validation*.safetensors"))]

    def needed_by_refit(self, number: int) -> list[Path]:
        """Weights and metrics of the trial."""
        return [*self.trial_models(number), self.trial_metrics(number)]

    def numbers_with_weights(self) -> set[int]:
        """Numbers of the trials with weights."""
        return {int(file.parent.name) for file in self.trials.glob("*/model*.safetensors")}

    def weights_and_checkpoints(self) -> list[Path]:
        """All files whose size depends on the network."""
        return [*self.trials.glob("*/model*.safetensors"), *(self.dir / "checkpoints").glob("*.pt")]

    def checkpoint(self, trial_index: int, fold: int = 1) -> Path:
        """Checkpoint of a running trial, by its index: a retried trial has a new number."""
        return self.dir / "checkpoints" / f"{trial_index:05d}{_of_fold(fold)}.pt"

    def trial_indices_with_checkpoints(self) -> set[int]:
        """Trial indices of the local checkpoints."""
        return {int(file.name.partition(".")[0]) for file in (self.dir / "checkpoints").glob("*.pt")}

    def checkpoints_of(self, trial_index: int) -> list[Path]:
        """Existing checkpoints of a trial's folds."""
        first = self.checkpoint(trial_index)
        return [*([first] if first.exists() else []), *sorted(first.parent.glob(f"{first.stem}.fold*.pt"))]

    @property
    def overview(self) -> Path:
        """Picture of all values and the best so far."""
        return self.dir / "overview.png"

    def trial_curves(self, number: int) -> Path:
        return self.trial(number) / "learning_curves.png"

    def trial_confusion(self, number: int) -> Path:
        return self.trial(number) / "confusion.png"

    def trial_counts(self, number: int) -> Path:
        """Confusion matrix of the validation images."""
        return self.trial(number) / "confusion.json"

    def reference(self, name: str) -> TrainingPaths:
        """Training of a recipe that is no trial."""
        return TrainingPaths(self.dir / "references" / name)

    def references(self) -> list[TrainingPaths]:
        """Trainings of recipes that are no trials, by name."""
        return [TrainingPaths(folder) for folder in sorted((self.dir / "references").glob("*/"))]

    @property
    def length_probe(self) -> TrainingPaths:
        """Training of the length probe."""
        return TrainingPaths(self.dir / "length" / "probe")

    @property
    def ladder(self) -> Path:
        """Result of the last ladder of lengths."""
        return self.dir / "length.json"

    def longer(self, key: str, epochs: int, replicate: int) -> TrainingPaths:
        """Training of a ladder: a configuration's key, its epochs, and its seed and split, counted from 0."""
        return TrainingPaths(self.dir / "length" / f"{key.replace(' ', '-')}-{epochs}-{replicate}")

    @property
    def confirmation(self) -> Path:
        """Result of `hpo confirm`."""
        return self.dir / "confirmation.json"

    @property
    def fit(self) -> Path:
        """Choices, finished stages and used time of `hpo fit`."""
        return self.dir / "fit.json"

    @property
    def fit_lock(self) -> Path:
        """File lock held while `hpo fit` runs."""
        return self.dir / ".fit"

    @property
    def queueing(self) -> Path:
        """File lock held while queueing a confirmation."""
        return self.dir / ".queueing"

    @property
    def report(self) -> Path:
        """The report as one HTML file."""
        return self.dir / "report.html"

    @property
    def test_openings(self) -> Path:
        """When and for which trial the test set was opened, one line of JSON each."""
        return self.dir / "refit" / "test_openings.jsonl"

    def refit(self, label: str) -> Path:
        """The folder of a submission model, by its `refit_label`."""
        return self.dir / "refit" / label

    def refits(self) -> list[Path]:
        """Existing folders of submission models."""
        return sorted(folder for folder in (self.dir / "refit").glob("*/") if not folder.name.startswith("."))

    def refit_lock(self, label: str) -> Path:
        """File lock held by the process that makes a submission model."""
        return self.dir / "refit" / f".{label}.lock"

    def refit_checkpoint(self, label: str, part: str) -> Path:
        """Checkpoint of one of a refit's trainings."""
        return self.dir / "refit" / f".{label}.{part}.pt"

    def refit_checkpoints(self, label: str) -> list[Path]:
        """Existing checkpoints of a refit's trainings."""
        return sorted((self.dir / "refit").glob(f".{label}.*.pt"))


@dataclass(frozen=True)
class RecipePaths(StudyPaths):
    """Names in the folder of a recipe's training (`TrainingPaths`) that is refitted without a study."""

    fingerprint: str
    """Of the data set, whose openings are counted over all recipes."""

    @property
    def study(self) -> None:
        return None

    @property
    def test_openings(self) -> Path:
        return _trainings_root() / "test_openings" / f"{self.fingerprint[:12]}.jsonl"


def recipe_refits(name: str) -> list[Path]:
    """Existing folders of submission models of a recipe, over all data sets and settings."""
    own = re.compile(re.escape(name) + "-[0-9a-f]{8}")
    folders = sorted(folder for folder in _trainings_root().glob("*/") if own.fullmatch(folder.name))
    return [refit for folder in folders for refit in StudyPaths(folder).refits()]


def refit_label(trial: str, folds: int | None, members: int | None = None, ensemble: int | None = None) -> str:
    """Return the name of a submission model's folder: `best`, a trial or `recipe`, with the number of networks."""
    given = (("folds", folds), ("members", members), ("ensemble", ensemble))
    return trial + "".join(f".{name}{number}" for name, number in given if number is not None)


def _of_fold(fold: int) -> str:
    return "" if fold == 1 else f".fold{fold}"
