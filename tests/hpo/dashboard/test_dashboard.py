"""The dashboard: the plain command, the server, and what a person sees in a browser."""

from __future__ import annotations

import math
import os
import re
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
import optuna_dashboard
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna_dashboard import get_note
from optuna_dashboard._note import get_note_from_system_attrs

from hpo.dashboard import serve as dashboard
from hpo.dashboard.notes import note_study, note_trial, read_note, save_note, trial_note
from hpo.dashboard.pictures import attach_artifacts, confusion_matrix, learning_curves
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.storage import open_storage
from hpo.study import CONFIRMATION, Study, find_study
from hpo.text import short
from hpo.trials import Outcome
from tests.hpo.browser import open_page, why_no_browser
from tests.hpo.commands import hpo
from tests.hpo.confirmation.simulated import in_memory

EPOCHS = 8

SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 4, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: rungs, rungs: [0.25, 0.5], keep: 0.5}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
  batch_size: {choices: [64, 128]}
"""


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
from hpo.dashboard.serve import serve
signal.signal(signal.SIGINT, signal.default_int_handler)
from hpo.paths import StudyPaths
paths = StudyPaths(Path({str(paths.dir)!r}))
serve(str(paths.journal), paths, study_name="demo", host="127.0.0.1", port=0)
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=Path(__file__).parents[3],
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


# Notes


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that `hpo run` has trained: the base, three others of which some are pruned, and one that diverged."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "demo.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        assert hpo(patch, "run", str(folder / "demo.yaml"), "--trials", "5", "--device", "cpu") == 0
        return find_study("demo")


def note_of(study: Study, number: int) -> str:
    """A trial's note as optuna-dashboard reads it."""
    trial = study.optuna.get_trials(deepcopy=False)[number]
    attributes = study.optuna._storage.get_study_system_attrs(study.optuna._study_id)
    return str(get_note_from_system_attrs(attributes, trial._trial_id)["body"])


def test_every_trial_has_a_note_with_its_end_its_time_its_rungs_and_its_files(real: Study) -> None:
    trials = real.optuna.get_trials(deepcopy=False)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    for trial in trials:
        note = note_of(real, trial.number)
        kept = trial.state.name == "COMPLETE"
        assert note.startswith(f"## Trial {trial.number}: accuracy {trial.value:.4f}{'' if kept else ', pruned'}\n")
        assert f" on {trial.user_attrs['device']}, " in note
        links = dict(re.findall(r"\[([\w.]+)\]\((/artifacts/[^)]+)\)", note))
        assert set(links) == {"learning_curves.png", "config.yaml"} | ({"confusion.png"} if kept else set())
        if kept:
            assert "Trained 4 of 4 epochs; its value is that of epoch 4, whose weights count." in note
        else:
            assert re.search(r"Pruned after [12] of 4 epochs: rung [12]: \w+ of \d\.", note)
        for path, value in trial.params.items():
            shown = f"| `{path}` | {'128' if path == 'batch_size' else '1'} | {short(value)} |"
            assert (shown in note) == (value != (128 if path == "batch_size" else 1.0))
    assert "it is the base, and never pruned" in note_of(real, 0)
    assert "It trained the base." in note_of(real, 0)


def test_the_studys_note_says_what_how_to_go_on_and_whether_it_is_confirmed(real: Study) -> None:
    note = get_note(real.optuna)
    for said in (
        "searched: `optim.lr_scale`, `batch_size`",
        f"data: digits, fingerprint `{real.metadata['data']['fingerprint'][:12]}`",
        "accuracy on the validation images, maximized; seed 0",
        f"\n{real.command}\n",
        "\nhpo refit best --study demo\n",
        "partly luck",
    ):
        assert said in note


def test_the_studys_attributes_say_at_a_glance_what_it_is(real: Study) -> None:
    attributes = real.optuna.user_attrs
    assert attributes["data"] == "digits"
    assert attributes["data_fingerprint"] == real.metadata["data"]["fingerprint"]
    assert (attributes["space_name"], attributes["space_hash"]) == ("demo", real.space().hash)
    assert attributes["objective"] == "accuracy (maximize)"
    assert "torch " in attributes["versions"]
    [devices] = [value for key, value in attributes.items() if key.startswith("devices:")]
    assert devices == real.optuna.trials[0].user_attrs["device"]


def test_a_host_with_two_devices_names_both_once(real: Study) -> None:
    study = in_memory(real.space())
    for device in ("A", "B", "A"):
        study.remember_device(device)
    assert [value for key, value in study.optuna.user_attrs.items() if key.startswith("devices:")] == ["A; B"]


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_note_is_kept_as_the_dashboard_keeps_it_however_long(storage: str, real: Study, tmp_path: Path) -> None:
    url = str(tmp_path / "journal.log") if storage == "journal" else f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(study_name="s", storage=open_storage(url))
    own = Study(study, StudyPaths(tmp_path / "s"), real.metadata, url)
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING))
    frozen = study.get_trials()[0]
    trial = optuna.Trial(study, frozen._trial_id)
    for body in ("short", "long " * 2000, "short again", "ümläut → 8×8"):
        save_note(own, body, frozen)
        save_note(own, body[::-1])
        assert get_note(trial) == body == read_note(own, frozen)
        assert get_note(study) == body[::-1] == read_note(own)
    write_in_the_dashboard(study, "edited")
    assert read_note(own) == "edited"


def test_what_a_person_wrote_below_the_studys_note_stays(real: Study) -> None:
    study = in_memory(real.space())
    write_in_the_dashboard(study.optuna, "mine, from before")
    note_study(study, real.space())
    assert get_note(study.optuna).endswith("stays.*\nmine, from before")
    write_in_the_dashboard(study.optuna, get_note(study.optuna) + "\nand more")
    study.optuna.set_user_attr(CONFIRMATION, "0.912 ± 0.004 (n = 5), better than the base by 0.031 ± 0.006")
    note_study(study, real.space())
    note = get_note(study.optuna)
    assert note.endswith("stays.*\nmine, from before\nand more")
    assert "**0.912 ± 0.004 (n = 5), better than the base by 0.031 ± 0.006**" in note
    assert "partly luck" not in note
    version = study.optuna._storage.get_study_system_attrs(study.optuna._study_id)["dashboard:note_ver"]
    note_study(study, real.space())
    written = study.optuna._storage.get_study_system_attrs(study.optuna._study_id)
    assert written["dashboard:note_ver"] == version, "what says the same is not written again"


def test_what_a_person_wrote_on_a_running_trial_stays_below_its_note(real: Study) -> None:
    study = in_memory(real.space())
    trial = study.optuna.ask()
    write_in_the_dashboard(trial, "why so slow?")
    note_trial(study, real.space(), Outcome(0, 0, "pruned", None, None, {}, why="by hand"), device="CPU")
    note = get_note(trial)
    assert note.startswith("## Trial 0: pruned\n")
    assert note.endswith("\n---\nwhy so slow?")


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (
            Outcome(7, 7, "pruned", None, None, {"optim.lr_scale": 5.0}, failure="diverged", why="loss is <nan> | `x`"),
            ["could not be trained, diverged", r"Ended after 0 of 4 epochs: loss is \<nan\> \| \`x\`.",
             "| `optim.lr_scale` | 1 | 5 |"],
        ),
        (
            Outcome(7, 7, "pruned", 0.3, None, {"optim.lr_scale": 5.0}, replicate_of=3, why="rung 2: 3rd of 4, pruned"),
            ["accuracy 0.3000, pruned", "rung 2: 3rd of 4.", "the same parameters as slot 3, with another seed",
             "went past rung 1 as 1st of 2"],
        ),
        (
            Outcome(7, 7, "complete", 0.3, None, {"optim.lr_scale": 5.0}, attributes={"kept_epoch": 3}),
            ["that of epoch 3, whose weights count", "let through on purpose at rung 2", "it is the recipe a\\_b"],
        ),
    ],
)  # fmt: skip
def test_a_trials_note_says_what_became_of_it(outcome: Outcome, said: list[str], real: Study) -> None:
    attributes = {"let_through": 2, "recipe": "a_b"} if outcome.state == "complete" else {}
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        intermediate_values={1: 0.1, 2: 0.3},
        user_attrs=attributes,
        system_attrs={"rung:1": [1, 2, True], "rung:2": [3, 4, False]},
    )
    note = trial_note(real.space(), outcome, trial, device="CPU", links={})
    for words in said:
        assert words in note


def write_in_the_dashboard(study_or_trial: optuna.Study | optuna.Trial, body: str) -> None:
    """What a person does with the pencil."""
    optuna_dashboard.save_note(study_or_trial, body)


# In the browser


@pytest.mark.slow
@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_person_clicks_through_to_a_trials_note_its_pictures_and_its_files(real: Study, tmp_path: Path) -> None:
    folder = Path(os.environ.get("HPO_SCREENSHOTS", tmp_path))
    complete = [trial for trial in real.optuna.trials if trial.state.name == "COMPLETE"][-1]
    faults: list[str] = []
    with served(real.paths) as url, open_page(url, height=1300) as page:
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))

        # The study: one curve of intermediate values for each trial.
        page.goto(url, wait_until="load")
        curves = page.locator("#graph-intermediate-values .scatterlayer .trace")
        curves.first.wait_for()
        page.wait_for_function("document.querySelectorAll('#graph-intermediate-values .trace').length >= 4")
        curves.first.scroll_into_view_if_needed()
        page.screenshot(path=folder / "dashboard_study.png")

        # Its note, and what it is by its attributes.
        page.goto(f"{url}/note", wait_until="load")
        page.get_by_role("heading", name="demo", exact=True).wait_for()
        assert "hpo refit best --study demo" in page.locator("body").inner_text()

        # Its trials: a click on one of them shows its parameters, its values, and its note.
        page.goto(f"{url}/trials", wait_until="load")
        page.get_by_text(f"Trial {complete.number}", exact=True).click()
        page.get_by_role("heading", name=f"Trial {complete.number}: accuracy {complete.value:.4f}").wait_for()
        shown = page.locator("body").inner_text()
        for name, value in complete.params.items():
            assert f"{name} {value}" in shown
        for epoch, value in complete.intermediate_values.items():
            assert f"{epoch} {value}"[:12] in shown
        assert "Trained 4 of 4 epochs" in shown
        assert page.get_by_role("cell", name="optim.lr_scale").count() == 1, "the differences are a table"

        # Its artifacts: both pictures are loaded, and the configuration is offered.
        page.wait_for_function("document.querySelectorAll('img[src*=artifacts]').length === 2")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        pictures = page.evaluate(
            "[...document.querySelectorAll('img[src*=artifacts]')].map(image => [image.alt, image.naturalWidth])"
        )
        assert {name for name, _ in pictures} == {"confusion.png", "learning_curves.png"}
        assert all(width > 0 for _, width in pictures)
        page.screenshot(path=folder / "dashboard_trial.png")

        # A link in the note leads to the file itself.
        page.get_by_role("link", name="learning_curves.png").click()
        page.wait_for_url("**/artifacts/**")
        assert page.evaluate("document.images[0].naturalWidth") > 0
        page.go_back(wait_until="load")
        with page.expect_navigation():
            page.get_by_role("link", name="config.yaml").click()
        assert page.locator("body").inner_text().startswith("epochs: 4\n")
    assert faults == []
