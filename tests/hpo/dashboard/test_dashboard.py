"""The dashboard: the server, the notes, the artifacts, and clicks in a browser."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note, save_note
from optuna_dashboard._note import get_note_from_system_attrs

from hpo.api.run import _draw_pictures
from hpo.dashboard import artifacts, serve
from hpo.dashboard.notes import note_study, note_trial, trial_note
from hpo.errors import StudyError
from hpo.study import Study, find_study
from hpo.study.results import append_line
from hpo.text import short
from hpo.trials import Outcome
from tests.hpo.browser import open_page, why_no_browser
from tests.hpo.commands import hpo
from tests.hpo.confirmation.simulated import in_memory

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SPACE = """
data: {name: digits}
base: {model: {widths: [8], blocks: [1]}, epochs: 4, batch_size: 128, augment: {flip: 0.0}}
pruner: {name: rungs, rungs: [0.25, 0.5], keep: 0.5}
sampler: {name: random}
search:
  optim.lr_scale: {low: 0.5, high: 20, log: true}
  batch_size: {choices: [64, 128]}
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of five trials trained by `hpo run`, some of them pruned. Tests only draw its pictures."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "demo.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_STUDIES", str(folder / "studies"))
        assert hpo(patch, "run", str(folder / "demo.yaml"), "--trials", "5", "--device", "cpu") == 0
        return find_study("demo")


@pytest.fixture(scope="module")
def url(real: Study) -> Iterator[str]:
    """URL of the study's page, while the dashboard is served."""
    with served(real) as url:
        yield url


@contextmanager
def served(study: Study) -> Iterator[str]:
    with serve.make_server(study, host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.study_url
        finally:
            server.shutdown()
            thread.join()


def body(url: str) -> tuple[str, bytes]:
    """The media type and the content of an answer."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.headers.get_content_type()), answer.read()


def attached(study: Study, number: int) -> dict[str, optuna.artifacts.ArtifactMeta]:
    """The artifacts of a trial, by name."""
    trial = study.optuna.get_trials(deepcopy=False)[number]
    return {meta.filename: meta for meta in get_all_artifact_meta(trial, storage=study.optuna._storage)}


# The server


@pytest.mark.parametrize(
    ("storage_url", "shown"),
    [
        ("studies/demo/journal.log", "studies/demo/journal.log"),
        ("sqlite:///demo.db", "sqlite:///demo.db"),
        ("postgresql+psycopg://hpo:secret@db/hpo", "postgresql+psycopg://hpo:***@db/hpo"),
    ],
)
def test_the_plain_command_names_storage_and_artifacts_and_no_password(storage_url: str, shown: str) -> None:
    command = serve.command(storage_url, Path("studies/demo/artifacts"))
    assert command == ["optuna-dashboard", shown, "--artifact-dir", "studies/demo/artifacts"]


def test_it_serves_the_study_and_survives_a_page_that_does_not_exist(url: str) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dashboard/studies/0", url)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        body(url.replace("/dashboard/studies/0", "/no/such/page"))
    assert body(url)[0] == "text/html"
    assert b'"study_name": "demo"' in body(url.replace("/dashboard/studies/0", "/api/studies"))[1]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("127.0.0.1", 200), ("[::1]:80", 200), ("LOCALHOST:80", 200), (socket.gethostname(), 200),
        ("attacker.example", 403), ("127.0.0.1.attacker.example:80", 403), ("[", 403), ("", 403),
    ],
)  # fmt: skip
def test_it_answers_only_by_its_own_names(url: str, name: str, status: int) -> None:
    """Else a page elsewhere could read and change the study, by a name that it points at this machine."""
    for path in ("/dashboard/studies/0", "/api/studies"):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        with closing(connection):
            connection.request("GET", path, headers={"Host": name})
            assert connection.getresponse().status == status


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_refused(real: Study, host: str) -> None:
    with pytest.raises(StudyError, match="--host is empty, which is every address"):
        serve.make_server(real, host=host, port=0)


def test_a_taken_port_is_one_line_that_suggests_another(real: Study) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StudyError, match=rf"^port {port} of 127.0.0.1 is taken; choose another: --port \d+$"):
            serve.make_server(real, host="127.0.0.1", port=port)


def test_an_address_of_another_machine_is_refused_in_one_line(real: Study) -> None:
    with pytest.raises(StudyError, match=r"^port 0 of 192\.0\.2\.1 cannot be listened on \(.+\); check --host$"):
        serve.make_server(real, host="192.0.2.1", port=0)


def test_ctrl_c_ends_it_quietly(real: Study) -> None:
    # A shell without job control starts background commands with SIGINT ignored, and a child inherits that.
    code = """
import signal
from hpo.dashboard.serve import serve
from hpo.study import find_study
signal.signal(signal.SIGINT, signal.default_int_handler)
serve(find_study("demo"), host="127.0.0.1", port=0, say=print)
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "default", "HPO_STUDIES": str(real.paths.dir.parent)},
    )
    try:
        assert process.stdout is not None
        first, last = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("study demo: http://127.0.0.1:")
        assert last == "Ctrl-C stops the dashboard\n"
        assert body(first.split()[-1])[0] == "text/html"
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert rest == ""
    assert process.returncode == 0


# Artifacts


@pytest.fixture
def copied(real: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The real study before any picture was drawn, in a folder of its own."""
    shutil.copytree(real.paths.dir, tmp_path / "studies" / "demo")
    monkeypatch.setenv("HPO_STUDIES", str(tmp_path / "studies"))
    study = find_study("demo")
    for number in range(5):
        for picture in (study.paths.trial_curves(number), study.paths.trial_confusion(number)):
            picture.unlink(missing_ok=True)
    return study


def test_artifacts_have_the_names_and_types_of_their_files(real: Study) -> None:
    for trial in real.optuna.get_trials(deepcopy=False):
        pictures = {"learning_curves.png", *(["confusion.png"] if trial.state.name == "COMPLETE" else [])}
        kinds = {name: meta.mimetype for name, meta in attached(real, trial.number).items()}
        assert kinds == {"config.yaml": "text/plain"} | dict.fromkeys(pictures, "image/png")


def test_a_picture_is_drawn_when_it_is_first_opened(copied: Study) -> None:
    trial = copied.optuna.get_trials(deepcopy=False)[0]
    with served(copied) as url:
        root = url.replace("/dashboard/studies/0", f"/artifacts/0/{trial._trial_id}")
        kinds = {name: body(f"{root}/{meta.artifact_id}") for name, meta in attached(copied, 0).items()}
        with pytest.raises(urllib.error.HTTPError, match=r"404|500"):
            body(f"{root}/{'0' * 8}")
    assert kinds["config.yaml"] == ("text/plain", copied.paths.trial_config(0).read_bytes())
    for picture in (copied.paths.trial_curves(0), copied.paths.trial_confusion(0)):
        assert kinds[picture.name] == ("image/png", picture.read_bytes())
    assert not copied.paths.trial_curves(1).exists()


def test_missing_pictures_are_drawn_once_and_only_on_the_machine_that_trained_the_trial(copied: Study) -> None:
    store, numbers = copied.paths.artifacts, range(5)
    shutil.rmtree(copied.paths.trial(4))
    before = {number: (store / attached(copied, number)["learning_curves.png"].artifact_id) for number in numbers}
    placeholder = before[4].read_bytes()
    artifacts.draw(copied, numbers)
    for number in range(4):
        assert before[number].read_bytes() == copied.paths.trial_curves(number).read_bytes() != placeholder
    assert before[4].read_bytes() == placeholder
    copied.paths.trial_curves(0).write_bytes(b"drawn")
    artifacts.draw(copied, numbers)
    assert copied.paths.trial_curves(0).read_bytes() == b"drawn"


def test_a_study_with_an_artifact_store_for_several_machines_has_its_pictures_drawn_at_once(
    real: Study, tmp_path: Path
) -> None:
    study = in_memory(real.space())
    study.files.use_store(str(tmp_path / "store"))
    trial, row = study.optuna.ask(), {"epoch": 1, "train_loss": 1.0, "lr": 0.1}
    study.paths.trial(0).mkdir(parents=True)
    append_line(study.paths.trial_metrics(0), row)
    outcome = Outcome(0, 0, "pruned", 0.1, None, {}, rows=(row,))
    artifacts.record(study, real.space(), trial, outcome, confusion=None, classes=(), device="CPU")
    [meta] = get_all_artifact_meta(trial)
    with study.files.dashboard_store().open_reader(meta.artifact_id) as stored:
        assert stored.read() == study.paths.trial_curves(0).read_bytes()


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_shown_as_the_placeholder(
    copied: Study, caplog: pytest.LogCaptureFixture
) -> None:
    copied.paths.trial_metrics(0).write_text("no JSON\n")
    meta = attached(copied, 0)["learning_curves.png"]
    with artifacts.PicturesOnDemand(copied).open_reader(meta.artifact_id) as picture:
        assert picture.read().startswith(b"\x89PNG")
    assert "trial 0: its pictures cannot be drawn" in caplog.text


# Notes


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
        ids = {name: link.rpartition("/")[2] for name, link in links.items()}
        assert ids == {name: meta.artifact_id for name, meta in attached(real, trial.number).items()}
        if kept:
            assert "Trained 4 of 4 epochs; value and weights are those of epoch 4." in note
        else:
            assert re.search(r"Pruned after [12] of 4 epochs: rung [12]: \w+ of \d\.", note)
        for path, value in trial.params.items():
            shown = f"| `{path}` | {'128' if path == 'batch_size' else '1'} | {short(value)} |"
            assert (shown in note) == (value != (128 if path == "batch_size" else 1.0))
    assert "the baseline, which is never pruned" in note_of(real, 0)
    assert "It trained the baseline." in note_of(real, 0)


def test_the_studys_note_has_its_search_its_data_its_commands_and_its_confirmation(real: Study) -> None:
    note = get_note(real.optuna)
    for words in (
        "searched: `optim.lr_scale`, `batch_size`",
        f"data: digits, fingerprint `{real.metadata['data']['fingerprint'][:12]}`",
        "accuracy on the validation images, maximized; seed 0",
        f"\n{real.command}\n",
        "\nhpo refit best --study demo\n",
        "partly luck",
    ):
        assert words in note


def test_the_studys_attributes_describe_it_at_a_glance(real: Study) -> None:
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
        study.settings.add_device(device)
    assert [value for key, value in study.optuna.user_attrs.items() if key.startswith("devices:")] == ["A; B"]


@pytest.mark.parametrize(
    "before",
    ["mine, from before", "old\n---\n*The above is written by hpo; what is written below stays.*\nmine, from before"],
)
def test_text_of_the_user_below_the_studys_note_stays(before: str, real: Study) -> None:
    study = in_memory(real.space())
    save_note(study.optuna, before)
    note_study(study, real.space())
    assert get_note(study.optuna).endswith("stays.*\nmine, from before")
    assert get_note(study.optuna).count("stays.*") == 1
    save_note(study.optuna, get_note(study.optuna) + "\nand more")
    study.settings.verdict = "0.912 ± 0.004 (n = 5), better than the baseline by 0.031 ± 0.006"
    note_study(study, real.space())
    note = get_note(study.optuna)
    assert note.endswith("stays.*\nmine, from before\nand more")
    assert "**0.912 ± 0.004 (n = 5), better than the baseline by 0.031 ± 0.006**" in note
    assert "partly luck" not in note
    attributes = study.optuna._storage.get_study_system_attrs(study.optuna._study_id)
    version = attributes["dashboard:note_ver"]
    note_study(study, real.space())
    assert attributes["dashboard:note_ver"] == version, "an unchanged note is not written again"


def test_text_of_the_user_on_a_running_trial_stays_below_its_note(real: Study) -> None:
    study = in_memory(real.space())
    trial = study.optuna.ask()
    save_note(trial, "why so slow?")
    note_trial(study, real.space(), trial, Outcome(0, 0, "pruned", None, None, {}, why="by hand"), device="CPU")
    note = get_note(trial)
    assert note.startswith("## Trial 0: pruned\n")
    assert note.endswith("\n---\nwhy so slow?")


ENDED = Outcome(7, 7, "complete", 0.3, None, {"optim.lr_scale": 5.0})


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (
            replace(ENDED, state="pruned", value=None, failure="diverged", why="loss is <nan> | `x`"),
            ["failed, diverged", r"Ended after 0 of 4 epochs: loss is \<nan\> \| \`x\`.",
             "| `optim.lr_scale` | 1 | 5 |"],
        ),
        (
            replace(ENDED, state="pruned", replicate_of=3, why="rung 2: 3rd of 4, pruned"),
            ["accuracy 0.3000, pruned", "rung 2: 3rd of 4.", "the same parameters as trial index 3, with another seed",
             "passed rung 1 as 1st of 2"],
        ),
        (
            replace(ENDED, attributes={"kept_epoch": 3}),
            ["those of epoch 3.", "exempt from pruning at rung 2", "recipe a\\_b, which is never pruned"],
        ),
    ],
)  # fmt: skip
def test_a_trials_note_describes_its_end(outcome: Outcome, words: list[str], real: Study) -> None:
    attributes = {"let_through": 2, "recipe": "a_b"} if outcome.state == "complete" else {}
    trial = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        intermediate_values={1: 0.1, 2: 0.3},
        user_attrs=attributes,
        system_attrs={"rung:1": [1, 2, True], "rung:2": [3, 4, False]},
    )
    note = trial_note(real.space(), outcome, trial, device="CPU", links={})
    for each in words:
        assert each in note


# In the browser


@pytest.mark.slow
@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_click_leads_to_a_trials_note_its_pictures_and_its_files(
    real: Study, url: str, browser: Browser, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("HPO_SCREENSHOTS", tmp_path))
    complete = [trial for trial in real.optuna.trials if trial.state.name == "COMPLETE"][-1]
    faults: list[str] = []
    with open_page(url, height=1300, browser=browser) as page:
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))

        # The study has one curve of intermediate values per trial.
        page.wait_for_function("document.querySelectorAll('#graph-intermediate-values .trace').length >= 4")
        page.locator("#graph-intermediate-values .scatterlayer .trace").first.scroll_into_view_if_needed()
        page.screenshot(path=folder / "dashboard_study.png")

        page.goto(f"{url}/note", wait_until="load")
        page.get_by_role("heading", name="demo", exact=True).wait_for()
        assert "hpo refit best --study demo" in page.locator("body").inner_text()

        # A click on a trial shows its parameters, its values and its note.
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

        # Its pictures are drawn.
        page.wait_for_function("document.querySelectorAll('img[src*=artifacts]').length === 2")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        sizes = page.evaluate(
            "[...document.querySelectorAll('img[src*=artifacts]')].map(image => [image.alt, image.naturalWidth])"
        )
        assert {name for name, _ in sizes} == {"confusion.png", "learning_curves.png"}
        assert all(width > 0 for _, width in sizes)
        assert real.paths.trial_curves(complete.number).exists()
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


def test_the_best_trials_pictures_are_drawn_at_the_end_of_a_run(copied: Study) -> None:
    best = copied.best_trial()
    assert best is not None
    _draw_pictures(copied)
    store = copied.paths.artifacts
    for picture in (copied.paths.trial_curves(best.number), copied.paths.trial_confusion(best.number)):
        assert (store / attached(copied, best.number)[picture.name].artifact_id).read_bytes() == picture.read_bytes()
