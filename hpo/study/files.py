"""The files of a study: in its folder, and in the artifact store of its machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.storage import is_journal, is_masked, mask
from hpo.storage.urls import check_path

if TYPE_CHECKING:
    import optuna

    from hpo.paths import StudyPaths
    from hpo.storage.artifacts import ArtifactStore
    from hpo.storage.optuna_access import OptunaArtifactStore
    from hpo.study.settings import StudySettings

STORE = "artifacts"
"""Study user attribute: URL of the artifact store, without its password."""


class StudyFiles:
    """Checkpoints, weights and artifacts of a study."""

    def __init__(self, study: optuna.Study, settings: StudySettings, paths: StudyPaths) -> None:
        self._study = study
        self._settings = settings
        self._paths = paths
        self.store: ArtifactStore | None = None
        """The shared artifact store, after `use_store`."""

    def use_store(self, url: str | None) -> None:
        """Use a store that other machines can reach; None for the study's own, if any.

        Raises:
            StudyError: The study has another store, or has begun without one; or the URL lacks its password or driver.
        """
        known: str | None = self._settings.get(STORE)
        if url is None and known is None:
            return
        url = self._checked(url, known)
        from hpo.storage.artifacts import ArtifactStore

        self.store = ArtifactStore(url, self._paths.dir)
        if known is None:
            self._settings.set(STORE, mask(url))

    def _checked(self, url: str | None, known: str | None) -> str:
        name = self._paths.name
        if url is None:
            assert known is not None
            if is_masked(known):
                raise StudyError(f"study {name}: give --artifacts {known} with the password, which is not stored")
            return known
        if url == "":
            raise StudyError("--artifacts is empty; give a folder or a URL, or leave it out")
        check_path(url, "--artifacts")
        if is_journal(url):
            url = str(Path(url).resolve())  # other processes may run in another folder
        if known is not None and mask(url) != known:
            raise StudyError(
                f"study {name} keeps its artifacts in {known}; leave --artifacts out, or choose another --study"
            )
        if known is None and any(t.state != TrialState.WAITING for t in self._study.get_trials(deepcopy=False)):
            raise StudyError(
                f"study {name} keeps its artifacts in {self._paths.dir}; leave --artifacts out, or choose another "
                "--study"
            )
        return url

    def exists(self, file: Path) -> bool:
        """Whether a file is in the artifact store or, without one, in the folder."""
        return file.exists() if self.store is None else self.store.exists(self._paths.inside(file))

    def share(self, file: Path) -> None:
        """Copy a file to the artifact store, if there is one."""
        if self.store is not None:
            self.store.put(file, self._paths.inside(file))

    def unshare(self, file: Path) -> None:
        """Delete a file from the artifact store, if there is one."""
        if self.store is not None:
            self.store.remove(self._paths.inside(file))

    def drop_checkpoint(self, checkpoint: Path) -> None:
        """Delete the checkpoint of a finished trial, also in the artifact store."""
        from core.checkpoint import unfinished  # imports torch

        if self.store is not None:
            self.store.drop(checkpoint)
        checkpoint.unlink(missing_ok=True)
        unfinished(checkpoint).unlink(missing_ok=True)

    def fetch_trial(self, number: int, *, folds: int) -> None:
        """Fetch the files that a refit needs of another machine's trial."""
        weights = [self._paths.trial_model(number, fold) for fold in range(1, folds + 1)]
        self._fetch(*weights, self._paths.trial_metrics(number))

    def fetch_outputs(self, number: int, *, folds: int) -> None:
        """Fetch the validation outputs and the metrics of another machine's trial."""
        outputs = [self._paths.trial_validation(number, fold) for fold in range(1, folds + 1)]
        self._fetch(*outputs, self._paths.trial_metrics(number))

    def _fetch(self, *files: Path) -> None:
        for file in files:
            if self.store is not None and not file.exists():
                self.store.fetch(self._paths.inside(file), file)

    @property
    def dashboard_folder(self) -> Path | None:
        """The folder for `optuna-dashboard --artifact-dir`; None for a URL."""
        known = self._settings.get(STORE)
        if known is None:
            return self._paths.artifacts
        if "://" in known:
            return None
        return Path(known) / self._paths.dir.name / self._paths.inside(self._paths.artifacts)

    def dashboard_store(self) -> OptunaArtifactStore:
        """Return the store of the dashboard's artifacts."""
        if self.store is not None:
            return self.store.for_optuna(self._paths.artifacts)
        from optuna.artifacts import FileSystemArtifactStore

        self._paths.artifacts.mkdir(parents=True, exist_ok=True)
        return FileSystemArtifactStore(self._paths.artifacts)
