"""Hostile input for each entrance of `hpo`: how it is damaged, and what must hold if it is accepted.

An `Entrance` takes edits, which hypothesis draws and shrinks, damages a valid input by them, and hands it in. Refused
input is one line per fault, without control characters.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import typer.main
from PIL import Image

from core.checkpoint import load_checkpoint, save_checkpoint
from core.data.decode import BrokenImageError, decode
from core.errors import CoreError
from hpo import cli
from hpo.cli.app import app
from hpo.errors import HpoError, SpaceError
from hpo.paths import StudyPaths
from hpo.space import dump_yaml, load_yaml, space_from_yaml, space_to_yaml
from hpo.submission.bundle import load_bundle
from tests.core.layouts import npz, pixel_rows, table, zip_of
from tests.core.test_data import encoded, load, noise, tree, write_folder, write_tar
from tests.hpo.invented import ALL_STATES, SPACE, invented_study
from tests.hpo.storage.journals import without_checksums
from tests.hpo.submission.test_bundle import write as write_bundle

CPU = torch.device("cpu")
HANG_S = 5.0
KINDS = ("flip", "byte", "cut", "drop", "repeat", "word", "value", "value", "value", "key")
"""The last two change a tree of values, the others bytes."""
WORDS = (
    *("", "0", "-1", "nan", "inf", "1e400", "10" * 40, "x" * 3000, "\x1b[2J", "a\nb", "../x", "é\u202e", "%s{}", "'"),
    *("~", "\0", "[", "{", "a:b", "1_000", "0x1F", "2026-01-30", "yes", "-", "--", "=", "NaN", "1e-400", "\ud800"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 1.5, 1e308, math.nan, math.inf, 10**30, 2**63, [], [[]], {}, [1, "a"], {"a": 1}),
    *WORDS[:-1],
)

Edit = tuple[str, float, int]
"""(kind, place in [0, 1), which of the values)."""
Edits = Sequence[Edit]


def damaged(content: bytes, edits: Edits) -> bytes:
    """Damage bytes."""
    changed = bytearray(content)
    for kind, place, which in edits:
        at = int(place * len(changed))
        match kind:
            case "flip" | "byte" if changed:
                changed[at] = changed[at] ^ 1 << which % 8 if kind == "flip" else which
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + 1 + which]
            case "repeat":
                changed[at:at] = changed[max(0, at - 1 - which) : at]
            case "word":
                changed[at:at] = WORDS[which % len(WORDS)].encode(errors="surrogatepass")
    return bytes(changed)


def retyped(content: Any, edits: Edits) -> Any:
    """Replace values of a tree of lists and objects by others, or delete or add keys."""
    for kind, place, which in edits:
        places = list(_places(content))
        if not places:
            break
        holder, key = places[int(place * len(places))]
        if kind == "value":
            holder[key] = copy.deepcopy(VALUES[which % len(VALUES)])
        elif kind == "key" and isinstance(holder, dict):
            kept = holder.pop(key)
            if which % 2:
                holder[WORDS[which % (len(WORDS) - 1)]] = kept
    return content


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def of_values(edits: Edits) -> bool:
    """Whether the first edit changes a tree, not bytes."""
    return bool(edits) and edits[0][0] in ("value", "key")


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Raise AssertionError if the block takes too long."""

    def hangs(*_: Any) -> None:
        raise AssertionError(f"it takes more than {HANG_S:g} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_told(error: Exception) -> None:
    """Check that an error is one line, of a space one per fault, without control characters."""
    told = str(error)
    assert told.strip()
    assert len(told) < 20_000
    assert all(line.isprintable() for line in told.splitlines()), told
    assert isinstance(error, SpaceError) or "\n" not in told, told


class Entrance(ABC):
    """One way for input to come in.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, edits: Edits) -> bool:
        """Hand in a damaged input. Returns whether it was accepted."""
        with no_hang():
            try:
                self.check(edits)
            except (HpoError, CoreError, BrokenImageError) as error:
                check_told(error)
                return False
            except RefusedError:
                return False
        return True

    @abstractmethod
    def check(self, edits: Edits) -> None:
        """Hand it in, and check what was accepted; an error of the user is raised."""


class Spaces(Entrance):
    """A search space in YAML."""

    def check(self, edits: Edits) -> None:
        text = SPACE
        if of_values(edits):
            (self.folder / "space.yaml").write_text(SPACE)
            text = dump_yaml(retyped(load_yaml(self.folder / "space.yaml"), edits))
        else:
            text = damaged(SPACE.encode(), edits).decode(errors="replace")
        space = space_from_yaml(text, "own")
        again = space_from_yaml(space_to_yaml(space), "own")
        assert again.hash == space.hash
        sampler = optuna.samplers.RandomSampler(seed=0)
        trial = optuna.create_study(direction=space.direction, sampler=sampler).ask()
        config = space.config(space.suggest(trial))
        assert all(math.isfinite(value) for value in trial.params.values() if isinstance(value, float))
        assert config.epochs >= 1


def said(*arguments: str) -> tuple[int, str, str]:
    """Run `hpo` in this process: (exit code, output, errors)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["hpo", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("a command exits")


class RefusedError(Exception):
    """A command ended with an exit code other than 0."""


def check_said(code: int, out: str, err: str, *, faults: Sequence[int] = (0, 2)) -> None:
    """Check the exit code, and that neither stream has control characters; RefusedError if the command failed."""
    assert code in faults, (code, out, err)
    assert code == 0 or (err + out).strip()
    for line in [*out.split("\n"), *err.split("\n")]:
        assert line.isprintable(), line
    if code:
        raise RefusedError


class Words(Entrance):
    """The words of a command line. No study, space or image exists, so that nothing is trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._commands = list(_commands(typer.main.get_command(app), ()))

    def check(self, edits: Edits) -> None:
        (_, place, which), *more = edits
        words, options = self._commands[int(place * len(self._commands))]
        arguments = [*words, *(WORDS[(which + i) % (len(WORDS) - 2)] for i in range(which % 3))]
        for _, place, which in more:
            value = WORDS[which % len(WORDS)]
            option = options[int(place * len(options))] if options else "--none"
            arguments += [f"{option}={value}"] if which % 2 else [option, value]
        if any("\0" in word for word in arguments):  # the system passes none
            arguments = [word.replace("\0", "") for word in arguments]
        check_said(*said(*arguments))


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(words, options) of each command."""
    if hasattr(command, "commands"):
        for name, inner in sorted(command.commands.items()):
            yield from _commands(inner, (*words, name))
        return
    yield words, [name for parameter in command.params for name in parameter.opts if name.startswith("--")]


class Journals(Entrance):
    """The journal of a study, as this version and as earlier ones write it, read by several commands."""

    checksums = True

    def __init__(self, folder: Path, digits: Any) -> None:
        super().__init__(folder)
        study = invented_study(SPACE, digits, "own", **ALL_STATES)
        invented_study(SPACE, digits, "other", trials=1)
        self._journal = study.paths.journal
        self._content = self._journal.read_bytes()
        if not self.checksums:
            self._content = without_checksums(self._content)
        self._undamaged = self._complete(said("study", "trials", "own", "--json")[1])

    def check(self, edits: Edits) -> None:
        content = self._content
        if of_values(edits):
            lines = content.splitlines()
            at = int(edits[0][1] * 7919 % 1 * len(lines))
            lines[at] = json.dumps(retyped(json.loads(lines[at]), edits), separators=(",", ":")).encode()
            content = b"\n".join(lines) + b"\n"
        else:
            content = damaged(content, edits)
        self._journal.write_bytes(content)
        for left in self._journal.parent.glob("journal.log.*"):
            left.unlink()
        of_one = (("study", "show", "own"), ("study", "trials", "own", "--json"))
        commands = (*of_one * 3, ("study", "list"), ("study", "doctor", "own"))
        command = commands[edits[-1][2] % 8]
        code, out, err = said(*command)
        if command[1] == "list":
            assert code == 0, err
            assert "other" in out
        check_said(code, out, err, faults=(0, 1, 2) if command[1] == "doctor" else (0, 2))
        if command[1] == "trials" and self.checksums:
            assert all(trial in self._undamaged for trial in self._complete(out))

    def _complete(self, out: str) -> list[dict[str, Any]]:
        return [trial for trial in json.loads(out)["trials"] if trial["state"] == "complete"]


class OldJournals(Journals):
    """Journals without checksums."""

    checksums = False


class Archives(Entrance):
    """A .zip or .tar of images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        files = tree(per_class=6, test=0)
        self._contents = {"set.zip": zip_of(files)}
        for suffix in (".tar", ".tar.gz", ".tar.xz"):
            self._contents[f"set{suffix}"] = write_tar(folder / f"own{suffix}", files).read_bytes()

    def check(self, edits: Edits) -> None:
        names = list(self._contents)
        name = names[edits[0][2] % len(names)]
        (self.folder / name).write_bytes(damaged(self._contents[name], edits))
        check_dataset(load(self.folder / name), most=12)


def check_dataset(dataset: Any, *, most: int) -> None:
    """Check that images and labels fit each other."""
    labels = dataset.labels
    assert len(dataset.images) == len(labels) <= most
    assert dataset.images.dtype == torch.uint8
    assert 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.classes)
    assert len(set(dataset.classes)) == len(dataset.classes) >= 2
    assert all(name.isprintable() and name.strip() for name in dataset.classes)


class Arrays(Entrance):
    """An .npz."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._arrays = {"x": noise(0, 12, 8, 8), "y": np.arange(12) % 3}

    def check(self, edits: Edits) -> None:
        file = self.folder / "set.npz"
        if of_values(edits):  # inside the archive, whose checksums then fit
            members = {}
            for name, array in self._arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                members[f"{name}.npy"] = buffer.getvalue()
            chosen = list(members)[edits[0][2] % 2]
            inner = [("flip" if kind == "value" else "byte", place * 0.3, which) for kind, place, which in edits]
            members[chosen] = damaged(members[chosen], inner)
            file.write_bytes(zip_of(members))
        else:
            file.write_bytes(damaged(npz(**self._arrays), edits))
        check_dataset(load(file), most=12)


class Tables(Entrance):
    """A CSV of paths, or of pixels."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_folder(folder, {f"{i}.png": encoded(noise(i, 8, 8, 3)) for i in range(12)})
        pixels = ",".join(["label", *(f"pixel{i}" for i in range(16))])
        self._texts = (
            table("path,label", *(f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(12))),
            table(pixels, *pixel_rows("ab" * 6)),
        )

    def check(self, edits: Edits) -> None:
        file = self.folder / "set.csv"
        file.write_bytes(damaged(self._texts[edits[0][2] % 2].encode(), edits))
        check_dataset(load(file), most=40)


class Images(Entrance):
    """One image of each format."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        picture = Image.fromarray(noise(0, 9, 7, 3))
        self._contents = [encoded(picture, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]

    def check(self, edits: Edits) -> None:
        content = self._contents[edits[0][2] % len(self._contents)]
        pixels = decode(damaged(content, edits), (8, 8)).pixels
        assert pixels.dtype == np.uint8
        assert pixels.shape in ((1, 8, 8), (3, 8, 8))


class Bundles(Entrance):
    """The folder of a submission model."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._whole = write_bundle(folder / "whole")
        self._files = sorted(file.name for file in self._whole.iterdir() if file.name != "README.md")
        self._picture = noise(0, 12, 16, 3)

    def check(self, edits: Edits) -> None:
        name = self._files[edits[0][2] % len(self._files)]
        bundle = self.folder / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(self._whole, bundle)
        file = bundle / name
        if of_values(edits) and name.endswith(".json"):
            file.write_text(json.dumps(retyped(json.loads(file.read_text()), edits)))
        else:
            file.write_bytes(damaged(file.read_bytes(), edits))
        model = load_bundle(bundle, CPU)
        probabilities = np.asarray(model.predict(self._picture).probabilities)
        assert probabilities.shape == (1, 3)
        if name != "model.safetensors":  # its numbers may be any
            assert np.isfinite(probabilities).all()
            assert abs(probabilities.sum() - 1) < 1e-3


class Checkpoints(Entrance):
    """A checkpoint of a training."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._state = {"model": {"w": torch.arange(12.0)}, "epoch": 3, "rng": torch.arange(8, dtype=torch.uint8)}
        save_checkpoint(folder / "whole.pt", self._state)
        self._content = (folder / "whole.pt").read_bytes()

    def check(self, edits: Edits) -> None:
        file = self.folder / "00000.pt"
        file.write_bytes(damaged(self._content, edits))
        state = load_checkpoint(file, CPU)
        assert torch.equal(state["model"]["w"], self._state["model"]["w"])  # type: ignore[index]
        assert state["epoch"] == 3


class StudyFiles(Entrance):
    """The metadata of a study and the result of its confirmation."""

    def __init__(self, folder: Path, digits: Any) -> None:
        super().__init__(folder)
        self._paths: StudyPaths = invented_study(SPACE, digits, "files", trials=3).paths
        self._content = load_yaml(self._paths.study_yaml)
        self._text = self._paths.study_yaml.read_bytes()

    def check(self, edits: Edits) -> None:
        if of_values(edits):
            text = json.dumps(retyped(json.loads(json.dumps(self._content)), edits)).encode()
        else:
            text = damaged(self._text, edits)
        self._paths.study_yaml.write_bytes(text)
        commands = (*[("study", "show", "files")] * 5, *[("study", "list")] * 2, ("study", "doctor", "files"))
        command = commands[edits[-1][2] % 8]
        code, out, err = said(*command)
        assert code == 0 or command[1] != "list", err
        check_said(code, out, err, faults=(0, 1, 2) if command[1] == "doctor" else (0, 2))


ENTRANCES: dict[str, type[Entrance]] = {
    "spaces": Spaces,
    "command lines": Words,
    "journals": Journals,
    "old journals": OldJournals,
    "study.yaml": StudyFiles,
    "archives": Archives,
    "npz": Arrays,
    "csv": Tables,
    "images": Images,
    "bundles": Bundles,
    "checkpoints": Checkpoints,
}
