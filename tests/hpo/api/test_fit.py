"""`hpo fit`: how it divides its time and chooses a space, what it leaves after a kill, and its errors."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hpo
from core.config import TrainConfig
from core.data import Splits
from core.loop import TrainResult, train
from hpo.analysis.study_data import read_study_data
from hpo.api import fit_choice
from hpo.api.fit import _Fit
from hpo.api.fit_choice import LARGE, PHOTOS, PROBE, SCRATCH, Chooser
from hpo.api.fit_length import Length
from hpo.api.fit_plan import REFIT_SLOWER, SEARCH, TRAININGS, Plan, Timed, confirmation_s, divide, least_s
from hpo.api.options import FitOptions
from hpo.confirmation.result import read_confirmation
from hpo.errors import StudyError
from hpo.paths import StudyPaths
from hpo.report.length import length
from hpo.reporter import Silent
from hpo.search import pace
from hpo.search.length import LengthProbe, probe_of
from hpo.study import find_study
from hpo.study.fit_record import FitRecord, read_fit
from hpo.study.results import read_rows
from hpo.submission.bundle import load_bundle
from tests.hpo.cli.test_cli import COMMANDS
from tests.hpo.commands import RunHpo
from tests.hpo.digits import rows_of, write_digits
from tests.hpo.workers.processes import wait_until
from tests.hpo.zygote import Hpo

TRIALS = 3
SPACE = f"""
data: {{name: digits}}
trials: {TRIALS}
base: {{model: {{widths: [8], blocks: [1]}}, epochs: 2, batch_size: 128, augment: {{flip: 0.0}},
  optim: {{lr_scale: 10}}}}
pruner: {{name: none}}
sampler: {{name: random}}
search:
  optim.lr_scale: {{low: 5, high: 20, log: true}}
"""


SLOW = Chooser._slow


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose as on a machine that nothing else uses."""
    monkeypatch.setattr(Chooser, "_slow", 1.0)


@pytest.fixture
def space(tmp_path: Path) -> str:
    file = tmp_path / "own.yaml"
    file.write_text(SPACE)
    return str(file)


def record_of(name: str) -> dict[str, Any]:
    found = read_fit(StudyPaths.of(name))
    assert found is not None
    return found


# The division of the time


@pytest.mark.parametrize(
    ("left_s", "epoch_s", "epochs", "left_out"),
    [
        (7200, 0.5, 60, ""),  # as long as the space wants
        (600, 1.0, 26, ""),  # 0.45 × 590 s hold ten trainings
        (300, 1.0, 34, "no confirmation"),  # too short for trials of 20 epochs, a third of 60, and a confirmation
        (100, 1.0, 20, "no search"),  # one training of 20 epochs, and a longer refit
        (40, 2.0, 5, "no search"),
        (20, 2.0, 1, "no search"),
    ],
)
def test_the_time_decides_about_epochs_and_stages(left_s: float, epoch_s: float, epochs: int, left_out: str) -> None:
    plan = divide(left_s, Timed(epoch_s, 1.3, after_s=10.0), 60)
    assert plan is not None
    assert (plan.epochs, plan.confirm_s > 0) == (epochs, not left_out)
    assert plan.search_s + plan.confirm_s + plan.refit_s + plan.after_s == pytest.approx(left_s)
    assert [line.partition(",")[0].partition(":")[0] for line in plan.left_out] == [left_out] * bool(left_out)
    if left_out != "no search":
        assert plan.search_s >= 5 * epochs * epoch_s
    assert plan.refit_s >= 1.3 * epochs * epoch_s


def test_a_trial_is_as_long_as_ten_of_them_fit_the_search() -> None:
    for left_s in np.geomspace(200, 20_000, 30):
        plan = divide(float(left_s), Timed(1.0, 1.3, after_s=10.0), 1000, fewest_epochs=5)
        assert plan is not None
        assert TRAININGS * plan.epochs <= SEARCH * (left_s - 10) < TRAININGS * (plan.epochs + 1)


def test_less_than_one_epoch_is_refused_and_the_least_time_is_enough() -> None:
    timed = Timed(30.0, 1.3, after_s=10.0)
    assert divide(60, timed, 60) is None
    assert divide(least_s(timed, 1), timed, 60) is not None


# The record


def test_a_killed_run_loses_no_more_than_a_tick(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "fit-x")
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(paths.dir)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = float(process.stdout.readline())
        time.sleep(2.5)
        process.kill()
    lasted = time.time() - began
    time.sleep(1)  # between two runs, which does not count
    found = read_fit(paths)
    assert found is not None
    assert lasted - 1.5 < found["used_s"] <= lasted + 0.1
    with FitRecord.opened(paths, {}, began=time.time()) as record:
        assert record["limit_s"] == 60
        assert 0 < record.left_s < 60 - lasted + 1.5


_HOLD = """
import sys, time
from pathlib import Path
from hpo.paths import StudyPaths
from hpo.study.fit_record import FitRecord
began = time.time()
with FitRecord.opened(StudyPaths(Path(sys.argv[1])), {"limit_s": 60.0}, began=began):
    print(began, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_an_ended_one_is_not(tmp_path: Path) -> None:
    paths = StudyPaths(tmp_path / "fit-x")
    with FitRecord.opened(paths, {"limit_s": 60.0}, began=time.time() - 20) as record:
        with pytest.raises(StudyError, match="another hpo fit is running"):
            FitRecord.opened(paths, {}, began=time.time()).__enter__()
        record.finish("search", 7)
    with FitRecord.opened(paths, {}, began=time.time()) as record:
        assert record.done == {"search": 7}
        assert record.used_s == pytest.approx(20, abs=1)
    paths.fit.write_text("{")
    with pytest.raises(StudyError, match=r"fit\.json: cannot be read"):
        FitRecord.opened(paths, {}, began=time.time()).__enter__()


# The choice


def images_of(folder: Path, side: int, *, count: int = 24, other: int | None = None) -> Path:
    """Images of two classes, some of another size if given."""
    rng = np.random.default_rng(0)
    for number in range(count):
        target = folder / ("light" if number % 2 else "dark")
        target.mkdir(parents=True, exist_ok=True)
        here = other if other and number % 5 == 4 else side
        pixels = rng.integers(0, 128, (here, here, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")
    return folder


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the only network that has its weights here."""

    def only(name: str) -> None:
        for place in ("hpo.api.fit_choice", "hpo.api.networks"):
            monkeypatch.setattr(f"{place}.has_weights", lambda asked: asked == name)

    return only


@pytest.mark.parametrize(
    ("epoch_s", "space", "settings", "trials", "why"),
    [
        (0.1, PHOTOS, ("data.image_size=64",), 40, ""),
        (4, PHOTOS, ("data.image_size=64", "epochs=8"), 40, ""),
        (10, PHOTOS, ("data.image_size=64", "epochs=8"), 40, "no confirmation"),
        (30, PHOTOS, ("data.image_size=64", "epochs=5"), 40, "no search"),
        (60, PHOTOS, ("data.image_size=64", "model.input_size=96", "epochs=5"), 40, "inputs of 96²"),
        (200, PROBE, ("data.image_size=64",), 8, "no fine-tuning"),
    ],
)
def test_with_weights_at_hand_networks_are_fine_tuned_or_probed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_hand: Callable[[str], None],
    epoch_s: float,
    space: str,
    settings: tuple[str, ...],
    trials: int,
    why: str,
) -> None:
    """A probe takes 20 s here, an epoch of fine-tuning the given time at inputs of 128²."""
    at_hand("timm/tf_efficientnet_lite0.in1k")

    def seconds(config: TrainConfig, *_: Any, **__: Any) -> float:
        return 20.0 if config.is_probe else epoch_s * ((config.model.input_size or 128) / 128) ** 2

    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", seconds)
    options = FitOptions(data=str(images_of(tmp_path / "photos", 64)))
    choice, dataset, _ = Chooser(options, torch.device("cpu"), Silent(), to_predict=0).choose(800)
    assert (choice.space, choice.settings, choice.trials) == (space, settings, trials)
    assert dataset.images.shape[-1] == 64, "kept at its size; the network enlarges it"
    assert any(line.startswith(why) for line in choice.why) or not (why or choice.why)


def test_without_weights_the_choice_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_hand: Callable[[str], None]
) -> None:
    at_hand("none")
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 0.1)
    options = FitOptions(data=str(images_of(tmp_path / "photos", 64)))
    choice, _, _ = Chooser(options, torch.device("cpu"), Silent(), to_predict=0).choose(600)
    assert choice.space == LARGE
    first, how = choice.why
    assert first == "no pretrained weights are here, so from scratch; fine-tuning is usually better:"
    assert how.startswith("  download, for example, https://")
    assert "into a folder, and give that with --weights" in how


@pytest.mark.parametrize(
    ("side", "other", "epoch_s", "space", "settings"),
    [
        (64, None, 0.01, LARGE, ()),
        (64, 80, 0.01, LARGE, ("data.image_size=64",)),
        (160, None, 0.01, LARGE, ("data.image_size=96",)),
        (64, None, 2.0, LARGE, ("epochs=35",)),
        (96, None, 15.0, SCRATCH, ("data.image_size=48", "epochs=13")),
        (64, None, 40.0, SCRATCH, ("data.image_size=32", "epochs=4")),
        (28, None, 1.5, SCRATCH, ("epochs=46",)),
        (28, None, 4.0, SCRATCH, ("epochs=20",)),
    ],
)
def test_space_size_and_epochs_follow_from_the_images_and_the_speed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_hand: Callable[[str], None],
    side: int,
    other: int | None,
    epoch_s: float,
    space: str,
    settings: tuple[str, ...],
) -> None:
    at_hand("none")
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: epoch_s)
    options = FitOptions(data=str(images_of(tmp_path / "photos", side, other=other)))
    choice, dataset, splits = Chooser(options, torch.device("cpu"), Silent(), to_predict=0).choose(600)
    assert (choice.space, choice.settings) == (space, settings)
    assert len(splits[0].train) < len(dataset.labels) < 24
    why = [line for line in choice.why if "weights" not in line]
    assert (why == []) == (epoch_s < 1)


@pytest.mark.parametrize(
    ("data", "given", "space", "settings"),
    [
        ("digits", (), "digits", ("epochs=12",)),
        ("digits", ("epochs=3",), "digits", ("epochs=3",)),
        ("digits", ("data.test_fraction=0.4",), "digits", ("data.test_fraction=0.4", "epochs=12")),
    ],
)
def test_a_builtin_set_has_its_own_space_and_given_settings_stay(
    monkeypatch: pytest.MonkeyPatch, data: str, given: tuple[str, ...], space: str, settings: tuple[str, ...]
) -> None:
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 1.0)
    options = FitOptions(data=data, set=given)
    choice, _, _ = Chooser(options, torch.device("cpu"), Silent(), to_predict=0).choose(300)
    assert (choice.space, choice.settings) == (space, settings)


@pytest.mark.parametrize(
    ("law", "trials", "refit"),
    [
        (LengthProbe(8, 0.0, 1.0, 0.5), 32, 32),
        (LengthProbe(8, 0.1, 1.0, 4.0), 4, 8),
        (LengthProbe(8, 0.0, 0.05, 0.3), 8, 8),
        (None, 8, 8),
    ],
)
def test_a_length_probe_chooses_the_epochs_of_the_trials_and_the_refit_has_no_fewer_than_the_space(
    law: LengthProbe | None, trials: int, refit: int, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(space).write_text(SPACE.replace("epochs: 2", "epochs: 8"))
    monkeypatch.setattr("hpo.search.length.fit_length", lambda *_: law)
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 0.05)
    monkeypatch.setattr(_Fit, "_search", stop)
    with pytest.raises(KeyboardInterrupt):
        hpo.fit("digits", space=space, minutes=10)
    record = record_of("fit-digits")
    settings = [text for text in record["choice"]["settings"] if text.startswith("epochs")]
    assert settings == ([] if trials == 8 else [f"epochs={trials}"])
    assert record["choice"]["epochs"] == refit
    assert record["length_probe"] == {"law": None if law is None else law.to_json()}
    assert len(read_rows(StudyPaths.of("fit-digits").length_probe.metrics)) == 8


def stop(_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("more", [{"minutes": 0.5}, {"minutes": 10, "set": ["epochs=8"]}])
def test_a_short_search_and_given_epochs_are_not_probed(
    more: dict[str, Any], space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(space).write_text(SPACE.replace("epochs: 2", "epochs: 8"))
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 0.1)
    monkeypatch.setattr(_Fit, "_search", stop)
    with pytest.raises(KeyboardInterrupt):
        hpo.fit("digits", space=space, **more)
    assert record_of("fit-digits").get("length_probe") is None


def test_the_advice_of_a_length_probe_is_searched_and_reported(
    space: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(space).write_text(SPACE.replace("epochs: 2", "epochs: 8"))
    law = LengthProbe(8, 0.1, 1.0, 4.0)
    monkeypatch.setattr("hpo.search.length.fit_length", lambda *_: law)
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 0.05)
    hpo.fit("digits", space=space, minutes=2)
    said = capfd.readouterr().out
    assert said.count("length probe: the baseline once") == 1
    study = find_study("fit-digits")
    assert "own.yaml, 4 epochs to a trial" in said
    assert {trial.user_attrs["epochs"] for trial in study.optuna.get_trials()} >= {4}
    assert probe_of(study.settings.length_probe) == law
    section = length(read_study_data(study))
    assert section is not None
    assert "so trials have 4" in section.body
    assert load_bundle(study.paths.refit("best")).meta.config.epochs == 4 * 8


def test_images_to_label_take_time_from_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 1.0)
    choosers = [Chooser(FitOptions(data="digits"), torch.device("cpu"), Silent(), to_predict=n) for n in (0, 10_000)]
    few, many = (chooser.choose(300)[0].plan for chooser in choosers)
    assert many.after_s - few.after_s == pytest.approx(10_000 * (0.003 + 2 / 1078))
    assert many.epochs < few.epochs


def test_on_a_busy_machine_more_time_is_kept_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.api.fit_choice.seconds_per_epoch", lambda *_, **__: 1.0)
    monkeypatch.setattr(Chooser, "_slow", SLOW)

    def end_s(cpu_share: float) -> float:
        monkeypatch.setattr("hpo.api.fit_choice.time.process_time", lambda: cpu_share * time.monotonic())
        chooser = Chooser(FitOptions(data="digits"), torch.device("cpu"), Silent(), to_predict=0)
        return chooser.choose(300)[0].end_s

    quiet = end_s(1.0)
    assert [end_s(share) / quiet for share in (2.0, 0.5, 0.01)] == pytest.approx([1, 2, 4], rel=0.05)


def test_time_that_the_refit_does_not_need_is_the_confirmations() -> None:
    long, short = Length(5, 15, 15, epoch_s=2.0), Length(15, 15, 60, epoch_s=2.0)
    assert (long.is_shortened, short.is_shortened) == (True, False)
    assert long.longest_s == pytest.approx(15 * 2.0 * REFIT_SLOWER)


# The whole


def test_fit_ends_with_a_model_a_submission_and_a_report(
    space: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_digits(tmp_path / "new", 6)
    like = tmp_path / "sample.csv"
    like.write_text("id,label\n" + "".join(f"{number:03d},0\n" for number in reversed(range(6))))
    output = tmp_path / "mine.csv"

    def run(**more: Any) -> str:
        options = {"space": space, "predict": images, "like": like, "output": output, "minutes": 2} | more
        model = hpo.fit("digits", **options)
        assert model.folder == StudyPaths.of("fit-digits").refit("best")
        return capfd.readouterr().out

    said = run()
    record = record_of("fit-digits")
    assert record["done"] == {
        "search": TRIALS,
        "confirm": None,
        "refit": str(StudyPaths.of("fit-digits").refit("best")),
        "predict": str(output),
        "report": str(StudyPaths.of("fit-digits").report),
    }
    assert 0 < record["used_s"] < 120
    assert StudyPaths.of("fit-digits").report.stat().st_size > 100_000
    assert [row["id"] for row in rows_of(output)] == [f"{number:03d}" for number in reversed(range(6))]
    study = find_study("fit-digits")
    assert (study.total, study.counts().finished) == (TRIALS, TRIALS)
    given = ["--predict", images, "--like", like, "--output", output, "--space", space, "--minutes", 2]
    assert study.command == shlex.join(["hpo", "fit", "digits", *map(str, given)])
    by_hand = [line.strip() for line in said.splitlines() if line.startswith("  hpo ")]
    assert [line.split()[1] for line in by_hand] == ["run", "confirm", "refit", "predict"]
    for line in by_hand:
        name, *arguments = shlex.split(line)[1:]
        COMMANDS[name].make_context(name, arguments)

    again = run()
    assert "study fit-digits was finished before" in again
    assert "trial" not in again
    output.unlink()
    assert "trial" not in run(like=None)
    assert len(rows_of(output)) == 6, "another submission is written from the same model"
    with pytest.raises(StudyError, match="was begun with 2 min, and 60 s are less"):
        run(minutes=1)
    with pytest.raises(StudyError, match=r"was begun with --set none, not epochs=3"):
        run(set={"epochs": 3})


@pytest.fixture
def start(space: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts `hpo fit` in a process group of its own, which is killed at the end."""
    processes = []

    def begin() -> subprocess.Popen[str]:
        arguments = ["fit", "digits", "--space", space, "--minutes", "4"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        processes.append(
            Hpo(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_killed_in_every_stage_it_continues_and_loses_nothing_finished(
    start: Callable[[], subprocess.Popen[str]], space: str
) -> None:
    paths = StudyPaths.of("fit-digits")

    def trained(name: str) -> bool:
        return StudyPaths.of(name).study_yaml.exists() and find_study(name).counts().finished > 0

    stages: list[Callable[[], Any]] = [
        lambda: trained("fit-digits"),
        lambda: trained("fit-digits.confirm"),
        lambda: paths.fit.exists() and "confirm" in record_of("fit-digits")["done"],
    ]
    done: dict[str, Any] = {}
    used_s = 0.0
    for reached in stages:
        process = start()
        wait_until(reached, "the stage is reached", process=process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        record = record_of("fit-digits")
        assert record["used_s"] >= used_s
        assert done.items() <= record["done"].items()
        done, used_s = record["done"], record["used_s"]
    process = start()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "continuing study fit-digits, after search, confirm" in said
    record = record_of("fit-digits")
    assert find_study("fit-digits").counts().finished == record["done"]["search"] == TRIALS
    assert record["used_s"] > used_s
    assert load_bundle(paths.refit("best")).meta.classes == tuple("0123456789")
    assert len(paths.test_openings.read_text().splitlines()) == 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.zip"], "nowhere.zip: no such file or folder"),
        (["digits", "--minutes", "0.06"], "give --minutes"),
        (["digits", "--space", "nothing"], "nothing: no such search space"),
        (["digits", "--set", "epoch=3"], "epoch"),
        (["digits", "--set", "epochs=100000", "--minutes", "3"], "a training of 100,000 epochs with its refit takes"),
        (["digits", "--predict", "nowhere"], "nowhere: no such file or folder"),
        (["digits", "--like", "sample.csv"], "give the images to label with --predict too"),
        (["digits", "--predict", "new", "--like", "other.csv"], "none of its columns names the images"),
        (["digits", "--predict", "new", "-o", "no/such.csv"], "there is no such folder"),
        (["one"], "one: a single class, light"),
        (["loose"], "loose"),
    ],
)
def test_a_mistake_is_one_line_before_any_training(
    run_hpo: RunHpo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpo.cli.library.process_began", time.time)  # of the command, not of pytest
    write_digits(tmp_path / "new", 3)
    (tmp_path / "other.csv").write_text("id,label\nx,0\ny,1\n")
    images_of(tmp_path / "one", 16).joinpath("dark").rename(tmp_path / "dark")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "notes.txt").write_text("no images")
    assert expected in run_hpo.fails("fit", *arguments)
    assert not list(Path(os.environ["HPO_STUDIES"]).glob("*")), "nothing is left behind"


def test_a_refit_that_no_longer_fits_is_shorter(
    space: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The trials seem to have taken 60 s an epoch: two on all images are 160 s."""
    monkeypatch.setattr("hpo.api.fit_length.seconds_per_epoch", lambda *_: 60.0)
    hpo.fit("digits", space=space, minutes=2)
    assert "a refit of 2 epochs does not fit the time that is left: 1 instead" in capfd.readouterr().out
    report = json.loads((StudyPaths.of("fit-digits").refit("best") / "metrics.json").read_text())
    assert report["epochs"] == 1


@pytest.mark.parametrize("confirms", [True, False])
def test_shortened_trials_are_refitted_as_long_as_the_space_wants_and_nothing_else_is_trained(
    confirms: bool, space: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def shortened(*arguments: Any, **more: Any) -> Plan | None:
        plan = divide(*arguments, **more)
        assert plan is not None
        return replace(plan, epochs=1, **({} if confirms else {"confirm_s": 0.0, "search_s": 30.0, "refit_s": 80.0}))

    trained: list[tuple[int, int]] = []

    def training(config: TrainConfig, splits: Splits, **options: Any) -> TrainResult:
        trained.append((config.epochs, len(splits.val)))
        return train(config, splits, **options)

    monkeypatch.setattr(fit_choice, "divide", shortened)
    monkeypatch.setattr("hpo.submission.networks.train", training)
    if not confirms:
        monkeypatch.setattr("hpo.api.fit._Fit._least_confirm_s", lambda _: math.inf)
    hpo.fit("digits", space=space, minutes=2)
    assert "the refit has up to 8 epochs, as many as fit; a trial has 1" in capfd.readouterr().out
    assert trained == [(8, 0)], "the choices rest on trainings of the trials' length"
    folder = StudyPaths.of("fit-digits").refit("best")
    report = json.loads((folder / "metrics.json").read_text())
    assert report["epochs"] == 8
    assert report["length"] is None
    assert load_bundle(folder).meta.config.epochs == 8
    assert (report["val"]["networks"] > 1) == confirms


def test_a_search_whose_timed_steps_were_too_slow_continues(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial is thought to take 12 days, and is trained to its end, since a model needs one."""
    timed, first = pace.seconds_per_epoch, iter([1e6])
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *a, **k: next(first, None) or timed(*a, **k))
    hpo.fit("digits", space=space, minutes=2)
    assert record_of("fit-digits")["done"]["search"] == TRIALS


def test_a_search_that_ends_early_goes_on_in_the_time_that_is_left(
    space: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The timed steps of the second and third trial are slow, as beside another process, when they are first tried."""
    timed, asked = pace.seconds_per_epoch, iter([None, 1e6, 1e6])
    monkeypatch.setattr(pace, "seconds_per_epoch", lambda *a, **k: next(asked, None) or timed(*a, **k))
    hpo.fit("digits", space=space, minutes=2)
    assert "trainings are faster than the timed steps: the search goes on" in capfd.readouterr().out
    assert record_of("fit-digits")["done"]["search"] == TRIALS


def test_a_confirmation_that_could_compare_nothing_gets_no_time() -> None:
    assert confirmation_s(100, least_s=30) == pytest.approx(40)
    assert confirmation_s(100, least_s=50) == 0


def test_time_that_the_search_leaves_confirms_its_result(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has no time for a confirmation, but the search has all its trials early."""

    def unconfirmed(*arguments: Any, **more: Any) -> Plan | None:
        plan = divide(*arguments, **more)
        return None if plan is None else replace(plan, search_s=plan.search_s + plan.confirm_s, confirm_s=0.0)

    monkeypatch.setattr(fit_choice, "divide", unconfirmed)
    hpo.fit("digits", space=space, minutes=2)
    assert record_of("fit-digits")["done"]["confirm"] is None
    assert read_confirmation(StudyPaths.of("fit-digits").confirmation) is not None
