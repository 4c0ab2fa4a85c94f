"""The record of `hpo fit` in the study's folder: the choices, the finished stages, and the time that all runs used.

The time is the file's modification, which a thread renews every second: it counts for a run that is killed, also before
the study exists and while a long step runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.storage.atomic import replacing

# Seconds between two renewals, which is as much as a killed run may lose.
TICK_S = 1.0


class FitRecord:
    """The content of `fit.json`, and the clock of the runs that share its time limit."""

    def __init__(self, file: Path, content: dict[str, Any], began: float) -> None:
        self._file, self._content, self._began = file, content, began
        self._before_s = float(content["used_s"])

    @classmethod
    @contextmanager
    def opened(cls, paths: StudyPaths, new: dict[str, Any], *, began: float) -> Iterator[FitRecord]:
        """Begin or continue a record; its clock runs within the block.

        Args:
            new: What the command was given, if the record is new.
            began: When this run began, as `time.time()`.

        Raises:
            StudyError: Another process holds the record, or its file is damaged.
        """
        paths.dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(paths.fit_lock).acquire(timeout=0):
                record = cls(paths.fit, read_fit(paths) or {**new, "used_s": 0.0, "done": {}}, began)
                record.save()
                with record._ticking():
                    yield record
        except Timeout as error:
            raise StudyError(f"study {paths.name}: another hpo fit is running it; wait for its end") from error
        finally:
            if not paths.fit.exists():  # nothing was begun
                with contextlib.suppress(OSError):
                    paths.fit_lock.unlink()
                    paths.dir.rmdir()

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def get(self, key: str) -> Any:
        """Return a value; None if it was never set."""
        return self._content.get(key)

    def set(self, **values: Any) -> None:
        """Set values and save."""
        self._content.update(values)
        self.save()

    @property
    def done(self) -> dict[str, Any]:
        """The finished stages, with a result or the reason why it was left out."""
        found: dict[str, Any] = self._content["done"]
        return found

    def finish(self, stage: str, result: Any = None) -> None:
        """Note that a stage is finished, and save."""
        self.set(done={**self.done, stage: result})

    @property
    def used_s(self) -> float:
        """Seconds that all runs have used, up to now."""
        return self._before_s + time.time() - self._began

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return float(self._content["limit_s"]) - self.used_s

    def save(self, *, running: bool = True) -> None:
        """Write the file whole."""
        since = {"since": time.time()} if running else {}
        content = {**{key: value for key, value in self._content.items() if key != "since"}, **since}
        content["used_s"] = self.used_s
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def discard(self) -> None:
        """Delete the record of a run that left nothing to continue."""
        self._file.unlink(missing_ok=True)

    @contextmanager
    def _ticking(self) -> Iterator[None]:
        ended = threading.Event()
        thread = threading.Thread(target=self._tick, args=(ended,), name="fit clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if self._file.exists():
                self.save(running=False)

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(TICK_S):
            if self._file.exists():
                os.utime(self._file)


def read_fit(paths: StudyPaths) -> dict[str, Any] | None:
    """Return the record of a study that `hpo fit` began, in which a killed run's time is used.

    None for any other study, StudyError if it is damaged.
    """
    file = paths.fit
    try:
        text, touched = file.read_text(encoding="utf-8"), file.stat().st_mtime
        content: dict[str, Any] = json.loads(text)
        since = content.pop("since", None)
        used_s, _ = float(content["used_s"]), content["done"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{file}: cannot be read ({error}); delete it, and give hpo fit another --study") from error
    return content | {"used_s": used_s + (0.0 if since is None else max(0.0, touched - since))}
