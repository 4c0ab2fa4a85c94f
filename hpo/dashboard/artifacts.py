"""The artifacts of a trial in the dashboard: its pictures, drawn when they are first opened, and its configuration.

Optuna accepts no artifact of a finished trial, and drawing takes longer than some trainings. So the worker attaches a
placeholder under each picture's name before the trial ends, and the picture replaces it in the artifact store later.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from optuna.artifacts import get_all_artifact_meta, upload_artifact

from hpo.dashboard.notes import note_trial
from hpo.dashboard.pictures import confusion_matrix, learning_curves
from hpo.storage.atomic import replacing
from hpo.storage.optuna_access import storage_of
from hpo.study.results import read_rows
from hpo.text import count
from hpo.trials import ARTIFACT

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial
    from torch import Tensor

    from hpo.space import SearchSpace
    from hpo.storage.optuna_access import OptunaArtifactStore
    from hpo.study import Study
    from hpo.trials import Outcome

logger = logging.getLogger(__name__)

_MIME_TYPES = {".png": "image/png"}  # all other artifacts are text


def record(
    study: Study,
    space: SearchSpace,
    trial: Trial,
    outcome: Outcome,
    *,
    confusion: Tensor | None,
    classes: Sequence[str],
    device: str,
) -> None:
    """Attach the artifacts and the note of a trial that is about to finish.

    A failure is logged as a warning and ends nothing: neither a picture nor a note is worth a trial.

    Args:
        study: The trial's study.
        space: The study's search space.
        trial: The running trial.
        outcome: Its result.
        confusion: Counts (K, K) on the validation images, rows are true classes; None of a trial without a result.
        classes: The K class names.
        device: Description of the device that trained it.
    """
    if confusion is not None:
        table = {"classes": classes, "folds": space.baseline.data.folds or 1, "counts": confusion.tolist()}
        study.paths.trial_counts(outcome.number).write_text(json.dumps(table), encoding="utf-8")
    try:
        _attach_all(study, trial, outcome)
        if (
            study.files.store is not None
        ):  # other machines read the store, and cannot draw: they lack the trial's folder
            draw(study, [outcome.number])
    except Exception as error:
        logger.warning("trial %d: its pictures are missing (%s: %s)", outcome.number, type(error).__name__, error)
    try:
        study.settings.add_device(device)
        note_trial(study, space, trial, outcome, device=device)
    except Exception as error:
        logger.warning("trial %d: its note is missing (%s: %s)", outcome.number, type(error).__name__, error)


def _attach_all(study: Study, trial: Trial, outcome: Outcome) -> None:
    """Attach a placeholder for each picture that can be drawn later, and the configuration."""
    number, paths, store = outcome.number, study.paths, study.files.dashboard_store()
    pictures = [paths.trial_curves(number)] if outcome.rows else []
    pictures += [paths.trial_confusion(number)] if outcome.results else []
    with tempfile.TemporaryDirectory(prefix="hpo-") as folder:
        for picture in pictures:
            placeholder = Path(folder) / picture.name
            placeholder.write_bytes(_placeholder(study.name))
            attach(trial, placeholder, store)
    if outcome.config is not None:
        attach(trial, paths.trial_config(number), store)


def attach(trial: Trial, file: Path, store: OptunaArtifactStore) -> None:
    """Attach a file to a running trial. The dashboard shows PNG files, and offers all others as text.

    Args:
        trial: The running trial; Optuna changes nothing in a finished one.
        file: The file to copy into the store.
        store: The store that the dashboard reads, `Study.artifact_store`.
    """
    upload_artifact(
        artifact_store=store,
        file_path=str(file),
        study_or_trial=trial,
        mimetype=_MIME_TYPES.get(file.suffix, "text/plain"),
    )


def _placeholder(study: str) -> bytes:
    """A PNG that explains how to get the picture. Pillow draws it within a millisecond."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (840, 460), 255)
    words = f"not drawn yet\n\nhpo dashboard {study}\ndraws it when it is opened"
    ImageDraw.Draw(image).text((420, 230), words, fill=110, font_size=48, anchor="mm", align="center")
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def draw(study: Study, numbers: Iterable[int]) -> None:
    """Draw the missing pictures of trials, into their folders and the artifact store.

    Trials without a folder on this machine are skipped.

    Args:
        study: The study.
        numbers: Trial numbers.
    """
    trials = study.optuna.get_trials(deepcopy=False)
    for number in numbers:
        _draw_trial(study, trials[number], study.files.dashboard_store())


def _draw_trial(study: Study, trial: FrozenTrial, store: OptunaArtifactStore) -> None:
    for file, draw_into in _missing(study, trial.number):
        with replacing(file) as temporary:
            draw_into(temporary)
            for attached in get_all_artifact_meta(trial, storage=storage_of(study.optuna)):
                if attached.filename == file.name:
                    with temporary.open("rb") as content:
                        store.write(attached.artifact_id, content)


def _missing(study: Study, number: int) -> Iterable[tuple[Path, Callable[[Path], None]]]:
    """Each picture that is not drawn yet, and the function that draws it into a file."""
    paths, title = study.paths, f"trial {number}"
    curves, matrix, counts = paths.trial_curves(number), paths.trial_confusion(number), paths.trial_counts(number)
    rows = [] if curves.exists() else read_rows(paths.trial_metrics(number))
    if rows:
        yield curves, lambda file: learning_curves(rows, file, title=title, metric=study.metric)
    if counts.exists() and not matrix.exists():
        table = json.loads(counts.read_text(encoding="utf-8"))
        of = "" if table["folds"] == 1 else f" of {count(table['folds'], 'fold')}"
        yield (
            matrix,
            lambda file: confusion_matrix(
                table["counts"], table["classes"], file, title=f"{title}, validation images{of}"
            ),
        )


class PicturesOnDemand:
    """An artifact store for optuna-dashboard that draws a trial's pictures when one of them is first opened.

    Args:
        study: The study whose artifacts are served.
    """

    def __init__(self, study: Study) -> None:
        self._study, self._store = study, study.files.dashboard_store()
        self._lock = threading.Lock()  # the server answers each request in a thread of its own
        self._trials: dict[str, FrozenTrial] = {}
        """Artifact id -> its trial."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an artifact.

        Raises:
            ArtifactNotFound: There is none with this id.
        """
        with self._lock:
            self._draw(artifact_id)
        return self._store.open_reader(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store an artifact that the user uploads in the dashboard."""
        self._store.write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Delete an artifact."""
        self._store.remove(artifact_id)

    def _draw(self, artifact_id: str) -> None:
        if artifact_id not in self._trials:
            for trial in self._study.optuna.get_trials(deepcopy=False):
                ids = (key.removeprefix(ARTIFACT) for key in trial.system_attrs if key.startswith(ARTIFACT))
                self._trials |= dict.fromkeys(ids, trial)
        owner = self._trials.get(artifact_id)
        if owner is None:  # the user attached it to the study
            return
        try:
            _draw_trial(self._study, owner, self._store)
        except Exception as error:  # the dashboard shows the placeholder
            logger.warning("trial %d: its pictures cannot be drawn (%s)", owner.number, error)
