"""The artifacts of a trial in the dashboard: its configuration, and its pictures, drawn when they are first opened.

Optuna accepts no artifact of a finished trial, and drawing takes longer than some trainings: so the worker attaches a
placeholder, which the picture later replaces in the artifact store.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from optuna.artifacts import ArtifactMeta, get_all_artifact_meta

from core.text import count
from hpo.dashboard.notes import note_trial
from hpo.dashboard.pictures import confusion_matrix, learning_curves
from hpo.storage.atomic import replacing, write_file
from hpo.storage.optuna_access import storage_of, trial_id
from hpo.study.results import read_rows
from hpo.trials import ARTIFACT

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial
    from torch import Tensor

    from hpo.space import SearchSpace
    from hpo.storage.optuna_access import OptunaArtifactStore
    from hpo.study import Study
    from hpo.trials import Outcome

logger = logging.getLogger(__name__)


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
    """Attach the artifacts and the note of a trial that is about to finish or pause. A failure is only a warning.

    Args:
        confusion: Counts (K, K) on the validation images, rows are true classes; None without a result.
        classes: K names.
    """
    if confusion is not None:
        table = {"classes": classes, "folds": space.baseline.data.folds or 1, "counts": confusion.tolist()}
        write_file(study.paths.trial_counts(outcome.number), json.dumps(table))
    with _only_warned(outcome.number, "its pictures are missing"):
        _attach_all(study, trial, outcome)
        if study.files.store is not None:  # read by machines that lack the trial's folder, and so cannot draw
            draw(study, [outcome.number])
    with _only_warned(outcome.number, "its note is missing"):
        study.settings.add_device(device)
        note_trial(study, space, trial, outcome, device=device)


@contextmanager
def _only_warned(number: int, problem: str) -> Iterator[None]:
    """Log an error as a warning: neither a picture nor a note is worth a trial."""
    try:
        yield
    except Exception as error:
        logger.warning("trial %d: %s (%s: %s)", number, problem, type(error).__name__, error)


def _attach_all(study: Study, trial: Trial, outcome: Outcome) -> None:
    number, paths, store = outcome.number, study.paths, study.files.dashboard_store()
    pictures = [paths.trial_curves(number)] if outcome.rows else []
    pictures += [paths.trial_confusion(number)] if outcome.results else []
    paths.trial_curves(number).unlink(missing_ok=True)  # drawn while the trial was paused
    attached = {meta.filename for meta in get_all_artifact_meta(trial)}  # before it paused
    pictures = [picture for picture in pictures if picture.name not in attached]
    with tempfile.TemporaryDirectory(prefix="hpo-") as folder:
        for picture in pictures:
            placeholder = Path(folder) / picture.name
            placeholder.write_bytes(_placeholder(study.name))
            attach(trial, placeholder, store)
    if outcome.config is not None and paths.trial_config(number).name not in attached:
        attach(trial, paths.trial_config(number), store)


def attach(trial: Trial, file: Path, store: OptunaArtifactStore) -> None:
    """Attach a copy of a file to a running trial. The dashboard shows PNG files, and offers all others as text.

    Unlike `optuna.artifacts.upload_artifact`, the copy is made first: a killed process leaves no artifact without it.
    """
    artifact_id, kind = str(uuid.uuid4()), "image/png" if file.suffix == ".png" else "text/plain"
    with file.open("rb") as content:
        store.write(artifact_id, content)
    meta = ArtifactMeta(artifact_id=artifact_id, filename=file.name, mimetype=kind, encoding=None)
    trial.storage.set_trial_system_attr(trial_id(trial), f"{ARTIFACT}{artifact_id}", json.dumps(asdict(meta)))


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
    """Draw the missing pictures of trials that have a folder here, into it and the artifact store."""
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
        whole = f"{title}, validation images{of}"
        yield matrix, lambda file: confusion_matrix(table["counts"], table["classes"], file, title=whole)


class PicturesOnDemand:
    """An artifact store for optuna-dashboard that draws a trial's pictures when one of them is first opened."""

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
        self._store.write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        self._store.remove(artifact_id)

    def _draw(self, artifact_id: str) -> None:
        if artifact_id not in self._trials:
            for trial in self._study.optuna.get_trials(deepcopy=False):
                ids = (key.removeprefix(ARTIFACT) for key in trial.system_attrs if key.startswith(ARTIFACT))
                self._trials |= dict.fromkeys(ids, trial)
        owner = self._trials.get(artifact_id)
        if owner is not None:  # the user attached it to the study otherwise
            with _only_warned(owner.number, "its pictures cannot be drawn"):  # the dashboard shows the placeholder
                _draw_trial(self._study, owner, self._store)
