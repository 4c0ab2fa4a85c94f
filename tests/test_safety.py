"""Hostile input of the commands: code in files is not run, names stay in their folder, passwords stay secret."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from core.checkpoint import load_checkpoint
from core.errors import CoreError
from hpo.dashboard import serve
from hpo.errors import HpoError
from hpo.space import dump_yaml, load_yaml
from hpo.space.document import MAX_BYTES
from hpo.submission.bundle import load_bundle
from tests.core.test_data import tree, write_folder, write_zip
from tests.core.test_hostile_data import Evil
from tests.hpo.commands import SPACE, RunHpo
from tests.hpo.confirmation.simulated import on_disk, space_of
from tests.hpo.storage.postgresql import Server, free_port, running_server
from tests.hpo.submission.test_bundle import write as write_bundle

CPU = torch.device("cpu")
SECRET = "correct.horse-battery"
TINY = ("--set", "epochs=2", "--set", "model.widths=[8]", "--set", "model.blocks=[1]", "--set", "pruner.name=none")


# Code


@pytest.fixture
def proof(tmp_path: Path) -> Iterator[Path]:
    """The file that hostile code would create."""
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_checkpoint_with_code_is_refused_before_it_runs(tmp_path: Path, proof: Path, how: str) -> None:
    path = tmp_path / "00000.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"format": 2, "model": Evil(proof)}))
    else:
        torch.save({"format": 2, "model": Evil(proof)}, path)
    with pytest.raises(CoreError, match=r"00000\.pt: .*delete it") as raised:
        load_checkpoint(path, CPU)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "classes.json", "preprocess.json", "origin.json"])
def test_a_bundle_with_code_is_refused_before_it_runs(tmp_path: Path, proof: Path, name: str) -> None:
    folder = write_bundle(tmp_path / "best")
    torch.save({"model": Evil(proof)}, folder / name)
    with pytest.raises(HpoError, match=r"damaged") as raised:
        load_bundle(folder, CPU)
    assert str(raised.value).isprintable()


def test_a_file_of_torch_is_not_a_bundle(tmp_path: Path, proof: Path, run_hpo: RunHpo) -> None:
    (tmp_path / "best").mkdir()
    torch.save(Evil(proof), tmp_path / "best" / "model.pt")
    for bundle in (tmp_path / "best", tmp_path / "best" / "model.pt"):
        told = run_hpo.fails("predict", str(bundle), str(tmp_path))
        assert "give" in told
        assert "hpo refit" in told


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_a_file_of_weights_with_code_is_refused_before_it_runs(
    tmp_path: Path, proof: Path, suffix: str, run_hpo: RunHpo
) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": Evil(proof)}, path)
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"data: {{name: digits}}\nmodel: {{name: timm/resnet10t, pretrained: true, pretrained_file: {path}}}\n"
    )
    told = run_hpo.fails("train", str(recipe), "--device", "cpu")
    assert f"model.pretrained_file: {path} is no " in told


def test_data_with_code_is_refused_before_it_runs(tmp_path: Path, proof: Path, run_hpo: RunHpo) -> None:
    np.savez(tmp_path / "set.npz", allow_pickle=True, x=np.array([Evil(proof)], dtype=object), y=np.zeros(1))
    told = run_hpo.fails("run", "digits", "--data", str(tmp_path / "set.npz"))
    assert "cannot be read as an .npz of plain arrays" in told


# YAML


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, ":6: more than 100000 values"),
        ("a: " + "[" * 100, ":1: nested more than 32 deep"),
        ("a: " + "[" * 10_000, ":1: not YAML: exceeded maximum nesting depth"),  # libyaml's own bound
        ("#" * (MAX_BYTES + 1), ": longer than 1,048,576 bytes, too long for a configuration; choose another file"),
    ],
    ids=["aliases", "depth", "more depth than libyaml parses", "size"],
)
class TestYaml:
    def test_of_a_space_or_recipe(self, tmp_path: Path, text: str, told: str, run_hpo: RunHpo) -> None:
        (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
        for command in ("run", "train"):
            assert f"own.yaml{told}" in run_hpo.fails(command, str(tmp_path / "own.yaml"))

    def test_of_a_study_yaml(self, tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(HpoError) as raised:
            load_yaml(tmp_path / "study.yaml")
        assert f"study.yaml{told}" in str(raised.value)
        assert str(raised.value).isprintable()


WRITTEN_BY_RUAMEL = """\
name: '0x1F'
hash: '012345678901234567890123456789012345678901234567890123456789'
none:
created: '2026-01-30T10:00:00+00:00'
numbers:
- 1
- 1e-05
- -2.5e+300
- true
words:
- off
- '1_000'
- '~'
- é
- 'a: b'
- ''
- ' '
- '1e3'
- 12:30:00
- it's
- "a\\nb"
- 'folded
  here'
paths:
  optim.lr:
    choices:
    - - 8
    - - 16
      - 32
"""


def test_a_study_yaml_written_by_an_older_version_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(WRITTEN_BY_RUAMEL, encoding="utf-8")
    content = {
        "name": "0x1F", "hash": "0123456789" * 6, "none": None, "created": "2026-01-30T10:00:00+00:00",
        "numbers": [1, 1e-05, -2.5e300, True],
        "words": ["off", "1_000", "~", "é", "a: b", "", " ", "1e3", "12:30:00", "it's", "a\nb", "folded here"],
        "paths": {"optim.lr": {"choices": [[8], [16, 32]]}},
    }  # fmt: skip
    assert load_yaml(tmp_path / "study.yaml") == content
    (tmp_path / "study.yaml").write_text(dump_yaml(content), encoding="utf-8")
    assert load_yaml(tmp_path / "study.yaml") == content


# Names and paths


@pytest.mark.parametrize("name", ["../x", "..", ".hidden", "/tmp/x", "a/b", "a\\b", "a\nb", "-x", "a" * 101, "\x1b[2J"])
@pytest.mark.parametrize("command", ["run", "show", "dashboard", "refit"])
def test_the_name_of_a_study_cannot_leave_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, run_hpo: RunHpo
) -> None:
    monkeypatch.chdir(tmp_path)
    words = {
        "run": ["run", "digits"],
        "refit": ["refit", "best"],
        "show": ["study", "show"],
        "dashboard": ["dashboard"],
    }
    option = [f"--study={name}"] if command in ("run", "refit") else ["--", name]
    told = run_hpo.fails(*words[command], *option)
    assert "a name is letters, digits, _ . - and begins with no . or -" in told
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]


def test_the_name_of_a_space_cannot_leave_the_folder(tmp_path: Path, run_hpo: RunHpo) -> None:
    file = tmp_path / "...yaml"
    file.write_text("data: {name: digits}\nsearch: {optim.lr_scale: {low: 0.5, high: 2}}\n")
    assert "--study '..': a name is letters" in run_hpo.fails("run", str(file))


def test_the_name_of_a_recipe_cannot_leave_the_folder(tmp_path: Path, run_hpo: RunHpo) -> None:
    (tmp_path / "...yaml").write_text("epochs: 1\n")
    space = tmp_path / "own.yaml"
    space.write_text(
        "data: {name: digits}\nrecipes: [...yaml]\nbase: {epochs: 1}\nsearch: {optim.lr_scale: {low: 0.5, high: 2}}\n"
    )
    told = run_hpo.fails("run", str(space))
    assert "a file named ...yaml gives the recipe no name; rename it" in told


@pytest.mark.parametrize("kind", ["zip", "csv"])
def test_paths_outside_the_data_are_refused_by_every_command(tmp_path: Path, kind: str, run_hpo: RunHpo) -> None:
    (tmp_path / "set").mkdir()
    if kind == "zip":
        path, wanted = write_zip(tmp_path / "set.zip", tree() | {"../evil.png": b""}), "points outside the archive"
    else:
        write_folder(tmp_path / "set", tree(test=0))
        path, wanted = tmp_path / "set" / "set.csv", "set.csv:3: ../../secret.png is outside"
        path.write_text("path,label\ncat/00.png,cat\n../../secret.png,dog\n", encoding="utf-8")
    bundle = write_bundle(tmp_path / "best")
    assert wanted in run_hpo.fails("run", "digits", "--data", str(path))
    assert wanted in run_hpo.fails("predict", str(bundle), str(path), "-o", str(tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


# The dashboard


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [("127.0.0.1", False), ("localhost", False), ("127.8.8.8", False), ("0.0.0.0", True)],
)
def test_the_dashboard_warns_if_others_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, open_to_others: bool
) -> None:
    monkeypatch.setattr(serve.DashboardServer, "serve_forever", lambda _: None)
    said: list[str] = []
    serve.serve(on_disk(space_of(tmp_path, SPACE)), host=host, port=0, say=said.append)
    assert any("the dashboard asks for no password" in line for line in said) == open_to_others


def test_the_dashboard_listens_on_this_machine_only_by_default(
    monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("hpo.api.study.dashboard", lambda options, _: asked.append(options.host))
    for arguments in ([], ["--host", "0.0.0.0"]):
        run_hpo("dashboard", *arguments)
    assert asked == ["127.0.0.1", "0.0.0.0"]


# Passwords


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that accepts any password."""
    with running_server() as running:
        yield running


def with_password(url: str) -> str:
    return url.replace("hpo@", f"hpo:{SECRET}@")


def words_of(process: psutil.Process) -> str:
    """The command line and the environment of a process; empty if it has just ended."""
    try:
        return " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_a_password_is_in_no_output_no_file_and_no_workers_command_line(tmp_path: Path, server: Server) -> None:
    space = tmp_path / "own.yaml"
    space.write_text(SPACE)
    process = subprocess.Popen(
        [sys.executable, "-m", "hpo.cli", "run", str(space), "--storage", with_password(server.url),
         "--per-device", "2", "--trials", "2", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    seen: dict[int, str] = {}
    try:
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                seen[child.pid] = words_of(child) or seen.get(child.pid, "")
            time.sleep(0.2)
        output = process.communicate()[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "2 complete" in output
    assert SECRET not in output
    assert sum("forkserver" in words for words in seen.values()) >= 3  # the fork server and its two workers
    assert not [words for words in seen.values() if SECRET in words]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "study.yaml" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("wrong", ["port", "database", "host", "driver", "scheme"])
def test_a_password_is_in_no_error(
    caplog: pytest.LogCaptureFixture, server: Server, wrong: str, run_hpo: RunHpo
) -> None:
    url = with_password(server.url)
    url = {
        "port": url.replace(str(server.port), str(free_port())),
        "database": url.replace("/postgres", "/nowhere"),
        "host": url.replace("127.0.0.1", "no.such.host.invalid"),
        "driver": url.replace("psycopg", "psycopg2"),
        "scheme": url.replace("postgresql+psycopg", "postgres"),
    }[wrong]
    told = run_hpo.fails("run", "digits", "--storage", url, *TINY)
    assert SECRET not in told + caplog.text
    assert "hpo:***@" in told
