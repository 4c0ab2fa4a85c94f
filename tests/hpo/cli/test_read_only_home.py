"""Commands where the home folder cannot be written, as on the nodes of a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpo.paths import cache_root
from tests.hpo.commands import SPACE, hpo

HOME = "/proc/no-home"
MOVED = ("HPO_CACHE", "MPLCONFIGDIR", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
EVERYTHING = """
import shlex, sys
from hpo.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["hpo", *shlex.split(line)]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, line
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos, from which commands see a home folder that cannot be written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", HOME)
    for variable in MOVED:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "own.yaml").write_text(SPACE.replace("data: {name: digits}", ""))
    draw = np.random.default_rng(0)
    for label, level in (("dark", 0), ("light", 150)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(level, level + 100, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path


def run(*arguments: str, commands: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the zygote's has imported matplotlib already."""
    return subprocess.run([sys.executable, *arguments], input=commands, text=True, capture_output=True, check=False)


@pytest.mark.slow
def test_one_variable_is_enough_and_nothing_warns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_CACHE", str(folder / "caches"))
    done = run(
        "-c",
        EVERYTHING,
        commands="""run own.yaml --data photos --trials 1 --device cpu
refit best --no-confirm --device cpu
report own
predict best photos/dark -o submission.csv --device cpu
study show own
study doctor own
""",
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    assert (folder / "submission.csv").read_text().count("\n") == 13
    assert "matplotlib" in {path.name for path in (folder / "caches").iterdir()}


def test_the_cache_is_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in MOVED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root() == Path("/home/me/.cache/hpo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_root() == Path("/scratch/hpo")
    monkeypatch.setenv("HPO_CACHE", "/local")
    assert cache_root() == Path("/local")


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(_: int) -> Any:
        raise KeyError("as in a container under an arbitrary user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    assert hpo(monkeypatch, "space", "list") == 0
    assert "digits" in capsys.readouterr().out


def test_without_a_variable_the_message_names_it(folder: Path) -> None:
    done = run("-m", "hpo.cli", "run", "own.yaml", "--data", "photos")
    assert done.returncode == 2
    assert done.stderr.startswith(f"hpo: {HOME}/.cache/hpo: cannot write the cache of decoded images there")
    assert "by HPO_CACHE" in done.stderr
