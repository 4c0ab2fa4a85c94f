"""Where things lie: the only place that knows names under `studies/`.

The layout of a study's folder is a public contract (docs/studies.md).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_CONFIRMATION = ".confirm"


def studies_root() -> Path:
    """The folder of all studies: $HPO_STUDIES, or `studies` here."""
    return Path(os.environ.get("HPO_STUDIES") or "studies")


def cache_root() -> Path:
    """The folder of decoded data sets: $HPO_CACHE, or `~/.cache/hpo`."""
    return Path(os.environ.get("HPO_CACHE") or Path.home() / ".cache" / "hpo")


def data_root() -> Path:
    """The folder that built-in data sets are looked for in and downloaded to: $HPO_DATA, or `data` here."""
    return Path(os.environ.get("HPO_DATA") or "data")


def search_space_dirs() -> list[Path]:
    """The folders that a bare space name is looked up in: the user's `search_spaces`, then the installed copy."""
    installed = Path(__file__).resolve().parent.parent / "search_spaces"
    here = Path("search_spaces")
    return [here, installed] if here.is_dir() and here.resolve() != installed else [installed]


def confirmation_of(study: str) -> str:
    """The name of the study that trains a study's best configurations again."""
    return f"{study}{_CONFIRMATION}"


def is_confirmation(study: str) -> bool:
    """Whether a study of this name trains another one's best configurations again."""
    return study.endswith(_CONFIRMATION)


def confirmed_by(confirmation: str) -> str:
    """The name of the study whose best configurations a study of this name trains again."""
    return confirmation.removesuffix(_CONFIRMATION)


@dataclass(frozen=True)
class TrainingPaths:
    """The names in the folder of one training outside a study's trials."""

    dir: Path

    @classmethod
    def of(cls, name: str, *identity: str) -> TrainingPaths:
        """What `hpo train` writes: a folder for each configuration and data set, so that an unfinished one goes on."""
        digest = hashlib.sha256("/".join(identity).encode()).hexdigest()
        return cls(studies_root() / "trainings" / f"{name}-{digest[:8]}")

    @property
    def config(self) -> Path:
        return self.dir / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line an epoch."""
        return self.dir / "metrics.jsonl"

    def model(self, fold: int = 1) -> Path:
        """The weights that a fold ended with; a training without folds is its first."""
        return self.dir / f"model{_of_fold(fold)}.safetensors"

    @property
    def curves(self) -> Path:
        return self.dir / "learning_curves.png"

    @property
    def profile(self) -> Path:
        """Where its time goes, with `--profile`: every number."""
        return self.dir / "profile.json"

    @property
    def profile_table(self) -> Path:
        """The same as it was said: a table, and a few lines."""
        return self.dir / "profile.md"

    @property
    def lock(self) -> Path:
        """Whoever trains a recipe beside a study holds the kernel's lock on it."""
        return self.dir / ".training"

    @property
    def result(self) -> Path:
        """What came of it; absent before the end."""
        return self.dir / "result.json"

    def checkpoint(self, fold: int = 1) -> Path:
        """What a running training needs to go on; that of a finished fold waits for the others."""
        return self.dir / f"checkpoint{_of_fold(fold)}.pt"

    def checkpoints(self, folds: int) -> list[Path]:
        """Those of so many folds, there or not."""
        return [self.checkpoint(fold) for fold in range(1, folds + 1)]


@dataclass(frozen=True)
class StudyPaths:
    """The names in one study's folder."""

    dir: Path

    @classmethod
    def of(cls, name: str) -> StudyPaths:
        return cls(studies_root() / name)

    @property
    def name(self) -> str:
        return self.dir.name

    def inside(self, file: Path) -> str:
        """A file's name in the study's folder: `trials/00003/model.safetensors`."""
        return file.relative_to(self.dir).as_posix()

    @property
    def journal(self) -> Path:
        """Optuna's journal file, the default storage; a confirmation shares that of its search, for one dashboard."""
        folder = self.dir.with_name(confirmed_by(self.name)) if is_confirmation(self.name) else self.dir
        return folder / "journal.log"

    @property
    def study_yaml(self) -> Path:
        """What the study searches: the resolved space, its hash, storage and data."""
        return self.dir / "study.yaml"

    @property
    def artifacts(self) -> Path:
        """Optuna's artifact store, which the dashboard shows pictures from."""
        return self.dir / "artifacts"

    @property
    def trials(self) -> Path:
        return self.dir / "trials"

    def trial(self, number: int) -> Path:
        return self.trials / f"{number:05d}"

    def trial_config(self, number: int) -> Path:
        return self.trial(number) / "config.yaml"

    def trial_metrics(self, number: int) -> Path:
        """One JSON object a line, one line an epoch."""
        return self.trial(number) / "metrics.jsonl"

    def trial_model(self, number: int, fold: int = 1) -> Path:
        """The weights that a fold of the trial ended with; only the best few trials keep theirs."""
        return self.trial(number) / f"model{_of_fold(fold)}.safetensors"

    def trial_validation(self, number: int, fold: int = 1) -> Path:
        """What those weights say of their validation images; it stays where `--keep-gb` alone lets go of them."""
        return self.trial(number) / f"validation{_of_fold(fold)}.safetensors"

    def trial_models(self, number: int) -> list[Path]:
        """The weights that the trial has kept, of each of its folds."""
        return sorted(self.trial(number).glob("model*.safetensors"))

    def needed_by_refit(self, number: int) -> list[Path]:
        """What a refit takes over from the trial: its weights, and what its epochs came to."""
        return [*self.trial_models(number), self.trial_metrics(number)]

    def numbers_with_weights(self) -> set[int]:
        """The trials that have kept weights."""
        return {int(file.parent.name) for file in self.trials.glob("*/model*.safetensors")}

    def weights_and_checkpoints(self) -> list[Path]:
        """All files of the trials that grow with the network."""
        return [*self.trials.glob("*/model*.safetensors"), *(self.dir / "checkpoints").glob("*.pt")]

    def checkpoint(self, trial_index: int, fold: int = 1) -> Path:
        """What a running trial needs to go on. It belongs to the slot: a retried trial has a new number."""
        return self.dir / "checkpoints" / f"{trial_index:05d}{_of_fold(fold)}.pt"

    def trial_indices_with_checkpoints(self) -> set[int]:
        """The slots that are begun and not over, and what was saved of them here."""
        return {int(file.name.partition(".")[0]) for file in (self.dir / "checkpoints").glob("*.pt")}

    def checkpoints_of(self, trial_index: int) -> list[Path]:
        """Those of a slot that are here, of each of its folds."""
        first = self.checkpoint(trial_index)
        return [*([first] if first.exists() else []), *sorted(first.parent.glob(f"{first.stem}.fold*.pt"))]

    @property
    def overview(self) -> Path:
        """Every trial's value and the best so far, as a picture."""
        return self.dir / "overview.png"

    def trial_curves(self, number: int) -> Path:
        return self.trial(number) / "learning_curves.png"

    def trial_confusion(self, number: int) -> Path:
        return self.trial(number) / "confusion.png"

    def trial_counts(self, number: int) -> Path:
        """Counts on the validation images that the confusion matrix is drawn from."""
        return self.trial(number) / "confusion.json"

    def reference(self, name: str) -> TrainingPaths:
        """A recipe that was trained beside the study, to be beaten."""
        return TrainingPaths(self.dir / "references" / name)

    def references(self) -> list[TrainingPaths]:
        """The recipes that were begun beside the study, by name."""
        return [TrainingPaths(folder) for folder in sorted((self.dir / "references").glob("*/"))]

    @property
    def confirmation(self) -> Path:
        """What the trainings on other seeds and splits came to, and who won; absent before `hpo confirm`."""
        return self.dir / "confirmation.json"

    @property
    def queueing(self) -> Path:
        """Whoever queues the trainings of a confirmation holds the kernel's lock on it."""
        return self.dir / ".queueing"

    @property
    def report(self) -> Path:
        """The study as one HTML file."""
        return self.dir / "report.html"

    @property
    def test_openings(self) -> Path:
        """When and for which trial the locked test set was opened, one JSON object a line."""
        return self.dir / "refit" / "test_openings.jsonl"

    def refit(self, label: str) -> Path:
        """The submission model of a trial: label is `best` or a trial's five digits, and for an ensemble more."""
        return self.dir / "refit" / label

    def refit_checkpoint(self, label: str, part: str) -> Path:
        """What one of a refit's trainings needs to go on."""
        return self.dir / "refit" / f".{label}.{part}.pt"

    def refit_checkpoints(self, label: str) -> list[Path]:
        """Those of all its trainings that are there."""
        return sorted((self.dir / "refit").glob(f".{label}.*.pt"))


def refit_label(trial: str, folds: int | None, members: int | None = None) -> str:
    """The folder of a submission model: that of the trial, or beside it that of so many networks by fold or by seed."""
    if folds is not None:
        return f"{trial}.folds{folds}"
    return trial if members is None else f"{trial}.members{members}"


def _of_fold(fold: int) -> str:
    """What tells a fold's file from the first one's, which is named as if there were no folds."""
    return "" if fold == 1 else f".fold{fold}"
