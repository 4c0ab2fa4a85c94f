"""The dashboard: the plain command, the server, and what a person sees in a browser."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore

from hpo import dashboard
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.report import attach_artifacts, confusion_matrix, learning_curves
from hpo.storage import open_storage
from tests.hpo.browser import open_page, why_no_browser

EPOCHS = 8


def store_of(paths: StudyPaths) -> FileSystemArtifactStore:
    return FileSystemArtifactStore(paths.artifacts)


def run_trial(study: optuna.Study, paths: StudyPaths, *, pruned: bool) -> None:
    """A trial with all that a real one leaves: parameters, values at its epochs, pictures, its configuration."""
    trial = study.ask()
    lr_scale = trial.suggest_float("optim.lr_scale", 0.1, 10, log=True)
    trial.suggest_categorical("optim.name", ["sgd", "adamw"])
    rows: list[dict[str, float]] = []
    for epoch in range(1, 4 if pruned else EPOCHS + 1):
        accuracy = 1 - 0.9 * math.exp(-epoch * lr_scale)
        trial.report(accuracy, epoch)
        loss = 2.3 * math.exp(-epoch / 4)
        rows.append(
            {
                "epoch": epoch,
                "lr": 0.001,
                "train_loss": loss,
                "val_loss": loss + 0.1,
                "val_accuracy": accuracy,
                "val_macro_f1": accuracy - 0.01,
            }
        )
    folder = paths.trial(trial.number)
    folder.mkdir(parents=True)
    paths.artifacts.mkdir(exist_ok=True)
    files = [folder / "learning_curves.png", folder / "confusion.png", paths.trial_config(trial.number)]
    learning_curves(rows, files[0], title=f"trial {trial.number}")
    confusion_matrix(30 * torch.eye(10, dtype=torch.int64) + 1, [str(digit) for digit in range(10)], files[1])
    files[2].write_text("epochs: 8\n")
    attach_artifacts(study, trial.number, files, store_of(paths))
    if pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, rows[-1]["val_accuracy"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> StudyPaths:
    """The folder of a finished study of five trials, one of them pruned."""
    paths = StudyPaths(tmp_path_factory.mktemp("studies") / "demo")
    study = optuna.create_study(
        study_name="demo",
        storage=open_storage(str(paths.journal)),
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for number in range(5):
        run_trial(study, paths, pruned=number == 3)
    return paths


@contextmanager
def served(paths: StudyPaths) -> Iterator[str]:
    """The dashboard on a free port, and the address of the study's page."""
    server = dashboard.make_server(str(paths.journal), store_of(paths), study_name="demo", host="127.0.0.1", port=0)
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.study_url
        finally:
            server.shutdown()
            thread.join()


def body(url: str) -> tuple[str, bytes]:
    """The media type of an answer, and what is in it."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.headers.get_content_type()), answer.read()


# The plain command


@pytest.mark.parametrize(
    ("storage_url", "shown"),
    [
        ("studies/demo/journal.log", "studies/demo/journal.log"),
        ("sqlite:///demo.db", "sqlite:///demo.db"),
        ("postgresql+psycopg://hpo:secret@db/hpo", "postgresql+psycopg://hpo:***@db/hpo"),
    ],
)
def test_the_plain_command_names_storage_and_artifacts_and_no_password(storage_url: str, shown: str) -> None:
    assert dashboard.command(storage_url, Path("studies/demo/artifacts")) == [
        "optuna-dashboard",
        shown,
        "--artifact-dir",
        "studies/demo/artifacts",
    ]


# The server


def test_it_serves_the_study_its_page_and_its_artifacts(paths: StudyPaths) -> None:
    with served(paths) as url:
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith("/dashboard/studies/0")
        assert body(url)[0] == "text/html"
        assert b'"study_name": "demo"' in body(url.replace("/dashboard/studies/0", "/api/studies"))[1]
        study = optuna.load_study(study_name="demo", storage=open_storage(str(paths.journal)))
        trial = study.get_trials(deepcopy=False)[2]
        metas = optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage)
        root = url.replace("/dashboard/studies/0", f"/artifacts/0/{trial._trial_id}")
        answers = {meta.filename: body(f"{root}/{meta.artifact_id}") for meta in metas}
        assert answers["config.yaml"] == ("text/plain", b"epochs: 8\n")
        for name in ("learning_curves.png", "confusion.png"):
            assert answers[name] == ("image/png", (paths.trial(2) / name).read_bytes())


def test_a_taken_port_is_one_line_that_suggests_another(paths: StudyPaths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StudyError, match=rf"^port {port} of 127.0.0.1 is taken; give another: --port \d+$"):
            dashboard.make_server(str(paths.journal), store_of(paths), study_name="demo", host="127.0.0.1", port=port)


def test_an_address_of_another_machine_is_refused_in_one_line(paths: StudyPaths) -> None:
    with pytest.raises(StudyError, match=r"^port 0 of 192\.0\.2\.1 cannot be listened on \(.+\); check --host$"):
        dashboard.make_server(str(paths.journal), store_of(paths), study_name="demo", host="192.0.2.1", port=0)


def test_a_study_that_is_not_in_the_storage_is_an_error(paths: StudyPaths) -> None:
    with pytest.raises(StudyError, match=r"^study other: not in .*journal\.log; hpo study list"):
        dashboard.make_server(str(paths.journal), store_of(paths), study_name="other", host="127.0.0.1", port=0)


def test_a_missing_journal_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "none")
    with pytest.raises(StudyError, match="no such journal"):
        dashboard.make_server(str(paths.journal), store_of(paths), study_name="none", host="127.0.0.1", port=0)
    assert not paths.dir.exists()


def test_ctrl_c_ends_it_quietly(paths: StudyPaths) -> None:
    # A shell without job control starts what runs behind its back with SIGINT ignored, and a child inherits that.
    code = f"""
import signal
from pathlib import Path
from hpo.dashboard import serve
signal.signal(signal.SIGINT, signal.default_int_handler)
from hpo.paths import StudyPaths
paths = StudyPaths(Path({str(paths.dir)!r}))
serve(str(paths.journal), paths, study_name="demo", host="127.0.0.1", port=0)
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "default"},
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("study demo: http://127.0.0.1:")
        assert process.stdout.readline() == "Ctrl-C stops the dashboard\n"
        assert body(first.split()[-1])[0] == "text/html"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert rest == ""
    assert process.returncode == 0


def test_a_page_that_does_not_exist_is_an_answer_and_not_the_end(paths: StudyPaths) -> None:
    with served(paths) as url:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            body(url.replace("/dashboard/studies/0", "/no/such/page"))
        assert body(url)[0] == "text/html"


# In the browser


@pytest.mark.slow
@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_person_sees_a_trials_parameters_its_curve_and_its_pictures(paths: StudyPaths, tmp_path: Path) -> None:
    folder = Path(os.environ.get("HPO_SCREENSHOTS", tmp_path))
    with served(paths) as url, open_page(url, height=1300) as page:
        # The study: one curve of intermediate values for each trial.
        curves = page.locator("#graph-intermediate-values .scatterlayer .trace")
        curves.first.wait_for()
        page.wait_for_function("document.querySelectorAll('#graph-intermediate-values .trace').length >= 4")
        assert curves.count() >= 4
        curves.first.scroll_into_view_if_needed()
        page.screenshot(path=folder / "dashboard_study.png")

        # Its trials: a click on one of them.
        page.goto(f"{url}/trials", wait_until="load")
        page.get_by_text("Trial 2", exact=True).click()
        page.get_by_role("heading", name="Trial 2").wait_for()
        shown = page.locator("body").inner_text()
        trial = optuna.load_study(study_name="demo", storage=open_storage(str(paths.journal))).trials[2]
        for name, value in trial.params.items():
            assert f"{name} {value}" in shown
        for epoch, value in trial.intermediate_values.items():
            assert f"{epoch} {value}"[:12] in shown

        # Its artifacts: both pictures are loaded, and the configuration is offered.
        page.wait_for_function("document.querySelectorAll('img[src*=artifacts]').length === 2")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        pictures = page.evaluate(
            "[...document.querySelectorAll('img[src*=artifacts]')].map(image => [image.alt, image.naturalWidth])"
        )
        assert {name for name, _ in pictures} == {"confusion.png", "learning_curves.png"}
        assert all(width > 0 for _, width in pictures)
        assert page.get_by_text("config.yaml").count() == 1
        page.screenshot(path=folder / "dashboard_trial.png")
