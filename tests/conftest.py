"""What all tests share: the real image sets, where they are, and folders of their own to write in."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Read when Ray is imported: under `uv run` it would otherwise install an environment for each of its workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

from tests.hpo.commands import RunHpo

# With few processes, a long file that began last would keep all of them waiting.
LONGEST_FILES = (
    *("test_ray.py", "test_chaos.py", "test_writes.py", "test_house.py", "test_end_to_end.py", "test_fuzz.py"),
    "test_safety.py",
)
_MODULES = itertools.count()
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_xdist_auto_num_workers() -> int:
    """Return half as many processes again as cores for `-n auto`: many tests wait for processes that they started."""
    return max(1, (os.cpu_count() or 1) * 3 // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, in the order of `LONGEST_FILES`."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("chaos") is not None and "chaos" not in item.config.getoption("-m"):
        pytest.skip("takes minutes to an hour: pytest -m chaos")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Ctrl-C interrupts, here and in the processes that tests start: pytest-xdist's own processes ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real image sets beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real image sets are not here: {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's studies, cache or data."""
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("HPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's own into the working directory, and returns its name, which no other test uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(source: str) -> str:
        name = f"own_code_{next(_MODULES)}"
        Path(f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def run_hpo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunHpo:
    """Runs `hpo` commands in this process and returns what they print."""
    return RunHpo(monkeypatch, capfd)
