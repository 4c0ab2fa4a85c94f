"""The model card: it contains all numbers of the bundle and its report, and nothing else."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from core.config import TrainConfig
from core.metrics import Gain, Scores
from core.tta import VIEWS
from hpo.confirmation.statistics import Interval
from hpo.study.versions import versions
from hpo.submission.bundle import writing
from hpo.submission.candidates import Candidate, Temperature
from hpo.submission.card import model_card, write_card
from hpo.submission.decision import Decision
from tests.hpo.confirmation.simulated import some_confirmation, some_contender
from tests.hpo.submission.test_bundle import CLASSES, REPORT, make, make_ensemble, make_several

BASE = TrainConfig().override({"model.widths": (8, 16), "model.blocks": (1, 1)})
WINNER = BASE.override({"optim.lr_scale": 3.21, "batch_size": 64})


CONFIRMATION = some_confirmation(
    some_contender("trial 7", WINNER, 0.912, interval=Interval(0.912, 0.004, 5)),
    some_contender("baseline", BASE, 0.881, interval=Interval(0.881, 0.004, 5)),
    study="pets",
    evidence=True,
    advantage=Interval(0.031, 0.006, 5),
    optimism=0.012,
    search_epochs=900,
    epochs=240,
    trainings=12,
    replicates=5,
)
TO_THE_BASE = replaced(CONFIRMATION, winner="baseline", evidence=False, advantage=Interval(0.002, 0.006, 5))


SCORES_OF = Scores(0.2, 0.9, 0.9, 0.9, 0.05)


def per_class(*support: int) -> list[dict[str, Any]]:
    """Rows whose recall falls with their place, from 0.9 by tenths."""
    return [
        {"class": name, "precision": 0.8, "recall": 0.9 - 0.1 * place, "f1": 0.85 - 0.1 * place, "support": count}
        for place, (name, count) in enumerate(zip(CLASSES, support, strict=True))
    ]


def whole_report() -> dict[str, Any]:
    """A report with every key that a refit writes."""
    report = copy.deepcopy(REPORT)
    report["data"] = {"train": 90, "own_test": False, "broken": 4}
    report["members"] = 3
    report["objective"] = "accuracy"
    report["decision"] = Decision(
        "own", "flip", "one",
        (Candidate("views", "none", 0.95, None, 1, False, False, False),
         Candidate("views", "flip", 0.961, Gain(0.011, 0.004, 0.006), 2, True, True, False)),
        5, Temperature(1.0, SCORES_OF, SCORES_OF, None), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), 20,
    ).metadata()  # fmt: skip
    report["temperature"] = {"value": 1.6, "val_nll_before": 0.2134, "val_nll_after": 0.1812, "val_ece_before": 0.081,
                             "val_ece_after": 0.023}  # fmt: skip
    report["search"] = {"study": "pets", "space": "my_space", "trials": 60, "complete": 20, "pruned": 38, "failures": 2,
                        "epochs": 900, "elapsed_s": 3600.0, "device": "NVIDIA X", "best_value": 0.9241}  # fmt: skip
    report["confirmation"] = CONFIRMATION.to_json()
    report["test"] |= {"opened": 1, "images": 300, "confusion": [[1]], "errors": []}
    report["test"]["with_tta"] |= {
        "ece": 0.031,
        "per_class": per_class(150, 100, 50),
        "intervals": {"accuracy": [0.98, 0.995], "loss": [0.03, 0.05]},
    }
    return report


def card(report: dict[str, Any] | None = None, *, files: tuple[str, ...] = (), **changes: Any) -> str:
    """The card of the bundle of `test_bundle`, with changes."""
    return model_card(replaced(make()[0], **changes), whole_report() if report is None else report, files=files)


def changed(*path: str, to: Any) -> dict[str, Any]:
    """The whole report with the value at this path of keys."""
    report = whole_report()
    *parents, last = path
    section = report
    for key in parents:
        section = section[key]
    section[last] = to
    return report


# What it says


@pytest.mark.parametrize(
    "words",
    [
        "# A classifier of 3 classes, trained on pets",
        "from trial 7 of study `pets`",
        "takes color images, resized to 16×12 pixels, and names one of 3 classes: cat, dog, Größe, {x}.",
        "**99.1 %** of 300 test images, which were not used in training, are classified correctly",
        "(95 % interval 98.0–99.5 %)",
        "hpo predict . photos -o submission.csv",
        "| test (300) | the model's | 0.9911 (0.980–0.995) | 0.9800 | 0.9700 | 0.0412 (0.030–0.050) | 0.0310 |",
        "| validation (20) | one view | 0.9876 |",
        "The test images were used once, after all decisions.",
        "| dog | 0.800 | 0.800 | 0.750 | 100 |",
        "the logits are divided by 1.6, the temperature that fits the validation images best",
        "Their NLL was 0.2134 before and is 0.1812 after. Their ECE was 0.0810 before and is 0.0230 after.",
        "confidence and accuracy differ by 3.1 points",
        "pets, from `photos/pets.zip`; fingerprint `0123abcd`.",
        "90 for training, 20 of them held out for decisions by trainings before, 300 for the test.",
        "Test: 20 % of all images, chosen by their pixels alone",
        "4 files could not be read, and were left out.",
        "`flip`, 2 views of each image.",
        "How it was chosen, on 20 images by 5 networks that have not seen them.",
        "Study `pets` ran 60 trials of the search space `my_space` (20 complete, 38 pruned and 2 failed to train).",
        "It took 900 epochs and 60 min on NVIDIA X.",
        "Its best validation score was 0.9241, which is partly luck",
        "accuracy 0.912 ± 0.004 (n = 5)",
        "| `optim.lr_scale` | `3.21` | `1` |",
        "| `batch_size` | `64` | `128` |",
        *(f"{name} {number}" for name, number in versions().items()),
    ],
)  # fmt: skip
def test_every_known_number_is_in_the_card(words: str) -> None:
    text = card(config=WINNER, study="pets", trial=7, source="photos/pets.zip")
    assert words in text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("data", "chosen by their pixels"),
        ("decision", "on 20 images by 5 networks that have not seen them"),
        ("decision", "| views | `flip` | 0.9610 | +0.0110 ± 0.0040 | 2 | taken |"),
        ("temperature", "Calibration:"),
        ("search", "ran 60 trials"),
        ("confirmation", "Confirmed on other seeds"),
        ("val", "| validation (20)"),
        ("test", "| test (300)"),
    ],
)
def test_text_with_a_missing_number_is_left_out(key: str, words: str) -> None:
    assert words in card()
    for report in ({name: part for name, part in whole_report().items() if name != key}, whole_report() | {key: None}):
        if report.get(key) is None and key in ("data", "val", "test", "decision"):
            report = {name: part for name, part in report.items() if name != key}  # these are never null
        assert words not in card(report)
    assert "None" not in card({})


def test_the_report_of_an_older_version_gives_a_shorter_card() -> None:
    text = model_card(make()[0], REPORT)
    assert "| test (30) | the model's | 0.9911 | 0.9800 | 0.9700 | 0.0412 | – |" in text
    assert "Written by `hpo refit`. It takes" in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("changes", "report", "words"),
    [
        ({"study": "pets", "trial": 7}, {}, "Written by `hpo refit` from trial 7 of study `pets`."),
        (
            {"study": "pets", "trial": 0},
            {"confirmation": TO_THE_BASE.to_json()},
            "from the baseline, trial 0 of study `pets`.",
        ),
        ({"study": "pets"}, {"recipe": "jan29"}, "Written by `hpo refit` from the recipe `jan29` of study `pets`."),
        ({"study": "pets"}, {}, "Written by `hpo refit` from the baseline of study `pets`."),
        ({}, {}, "Written by `hpo refit`. It"),
    ],
)
def test_the_origin_of_the_configuration_is_named(changes: dict[str, Any], report: dict[str, Any], words: str) -> None:
    assert words in card(report, **changes)


def test_one_view_without_a_temperature_has_one_row() -> None:
    assert "| one view |" in card(views="none")
    assert "| one view |" in card(temperature=1.0)
    assert "| one view |" not in card(views="none", temperature=1.0)


def test_a_temperature_that_was_not_used_has_a_reason() -> None:
    text = card(changed("temperature", to={"value": 1.0, "why": "no mistake says how sure is too sure"}))
    assert "Calibration: the logits are unchanged, since no mistake says how sure is too sure." in text


def test_repeated_use_of_the_test_images_is_reported() -> None:
    assert "have been used 4 times" in card(changed("test", "opened", to=4))


def test_a_search_without_a_significant_gain_is_reported() -> None:
    assert "no significant gain" in card(changed("confirmation", to=TO_THE_BASE.to_json()))


@pytest.mark.parametrize("whose", ["base", "defaults"])
def test_the_configuration_is_compared_with_the_baseline_or_else_the_defaults(whose: str) -> None:
    report = whole_report() if whose == "base" else changed("confirmation", to=None)
    rows = re.findall(r"^\| `([\w.]+)` \| `.*` \| `.*` \|$", card(report, config=WINNER), re.MULTILINE)
    ours, theirs = WINNER.flat(), (BASE if whose == "base" else TrainConfig()).flat()
    assert rows == [path for path in ours if ours[path] != theirs[path]]
    assert "Nothing differs from the baseline" in card(config=BASE)
    assert "Nothing differs from the baseline" in card(config=BASE.override({"seed": 5})), "every trial has its own"


def test_many_classes_are_shown_by_their_worst_and_best() -> None:
    names = tuple(f"c{i:03}" for i in range(50))
    rows = [
        {"class": name, "precision": 0.5, "recall": 0.6, "f1": i / 50, "support": 40} for i, name in enumerate(names)
    ]
    text = card(changed("test", "with_tta", "per_class", to=rows), classes=names)
    shown = re.findall(r"^\| (c\d{3}) \|", text, re.MULTILINE)
    assert shown == [*names[:10], *names[-5:]]
    assert "`metrics.json` has all 50" in text
    assert "c028, c029 and 20 more." in text


@pytest.mark.parametrize("name", ["one.png", "a|b", "*bold*", "`code`", "<script>", "[x](y)", "two\nlines", "$x$ & y"])
def test_class_names_are_escaped(name: str) -> None:
    rows = per_class(50, 50, 50)
    rows[0]["class"] = name
    text = card(changed("test", "with_tta", "per_class", to=rows), classes=(name, *CLASSES[1:]))
    html = MarkdownIt("commonmark").enable("table").render(text)
    cells = re.findall(r"<td>(.*?)</td>", html)
    escaped = " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert escaped in cells


def test_control_characters_in_names_are_escaped() -> None:
    text = card(changed("search", "study", to="own\x1b[31m"), classes=("a\u202eb", *CLASSES[1:]))
    assert text.replace("\n", "").isprintable()


# What it is not for


@pytest.mark.parametrize(
    ("report", "words", "otherwise"),
    [
        ({}, "has no answer “none of these”", None),
        ({}, "on pets only", None),
        ({}, "Details that are not visible in 16×12 pixels", None),
        ({}, "those that do not have the shape 16:12 are distorted", None),
        ({"test": {}}, "it has not been evaluated on test images", "whole"),
        ("whole", "Decisions about people without a human", {"test": {}}),
        ((100, 20, 90), "fewer than 30 test images, which are a rough guess: dog (20)", (100, 90, 90)),
        ((10, 20, 29), "none has more than 29 test images", (10, 20, 40)),
        ((90, 60, 30), "cat has 90 test images, Größe, {x} 30", (80, 60, 30)),
    ],
)
def test_each_limit_follows_from_a_number(report: Any, words: str, otherwise: Any) -> None:
    def text(given: Any) -> str:
        if isinstance(given, tuple):
            given = changed("test", "with_tta", "per_class", to=per_class(*given))
        return card(whole_report() if given == "whole" else given)

    assert words in text(report)
    if otherwise is not None:
        assert words not in text(otherwise)


def test_a_class_with_low_recall_is_named() -> None:
    rows = per_class(50, 50, 50)
    rows[1]["recall"] = 0.42
    assert "by its recall: dog (0.42)." in card(changed("test", "with_tta", "per_class", to=rows))
    assert "by its recall" not in card()


def test_grey_images_have_a_limit_of_their_own() -> None:
    assert "Colors are ignored" in card(in_channels=1)
    assert "Colors are ignored" not in card()


# Several networks


@pytest.mark.parametrize("views", sorted(VIEWS))
def test_the_views_are_counted(views: str) -> None:
    count = len(VIEWS[views])
    assert f"`{views}`, {count} view{'s' if count > 1 else ''} of each image" in card({}, views=views)


def test_the_card_of_an_ensemble_describes_it() -> None:
    text = model_card(make_ensemble()[0], REPORT)
    assert "`resnet`, an ensemble of 3, whose probabilities are averaged" in text
    assert "out-of-fold: each image was classified by the one member that was not trained on it" in text
    assert "`member_1.safetensors` … `member_3.safetensors`" in text
    assert "`model.safetensors`" not in text
    assert "trains it 3 times" in text
    plain = model_card(make()[0], REPORT)
    assert "ensemble" not in plain
    assert "`model.safetensors`" in plain


def test_the_card_of_several_configurations_lists_them_with_their_weights() -> None:
    chosen = [
        {"name": "trial 7", "trial": 7, "weight": 0.75, "average": "own", "views": "flip", "epochs": 12},
        {"name": "recipe a_b", "trial": None, "weight": 0.25, "average": "own", "views": "none", "epochs": 9},
    ]
    text = model_card(make_several()[0], REPORT | {"decision": {"selection": chosen}})
    assert "- An ensemble of 2 networks of different configurations" in text
    assert "| `resnet` | trial 7 | 0.75 | `flip` | 12 |" in text
    assert "| `resnet` | recipe a_b | 0.25 | `none` | 9 |" in text
    assert "each fifth of the images was predicted with the weights selected on the others" in text
    assert "| `config_2.yaml` | the configuration of another network of the ensemble |" in text
    assert "Differences of the first network from" in text
    assert "out-of-fold" not in text


def test_out_of_fold_scores_of_one_network_are_explained() -> None:
    text = model_card(make(**{"data.folds": 4})[0], REPORT)
    assert "out-of-fold: the trial trained 4 networks" in text
    assert (
        "stratified by class and drawn with `data.split_seed` 0; each image is in the validation part of one of them"
        in text
    )


def test_the_recipe_is_not_promised_to_reproduce_the_model() -> None:
    assert "trains it on the training images alone, without the validation images" in card()


# As a file


def test_only_existing_pictures_and_files_are_shown(tmp_path: Path) -> None:
    beside = ("confusion.png", "confident_errors.png", "learning_curves.png", "submission.csv", "model.onnx")
    bundle, model = make()
    with writing(tmp_path / "best") as folder:
        bundle.write(folder, [model], REPORT)
        write_card(folder, bundle, REPORT)
        bare = (folder / "README.md").read_text(encoding="utf-8")
        for name in beside:
            (folder / name).touch()
        write_card(folder, bundle, REPORT)
    text = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    for name in beside:
        assert name not in bare.replace("-o submission.csv", "")
        assert f"| `{name}` |" in text
    assert "](confusion.png)" in text
    assert "](confident_errors.png)" in text
    for name in (path.name for path in (tmp_path / "best").iterdir()):
        assert f"`{name}`" in text or name == "README.md"


def test_it_is_well_formed_markdown() -> None:
    tokens = (
        MarkdownIt("commonmark")
        .enable("table")
        .parse(ModelCard(card(files=("confusion.png", "model.onnx"), config=WINNER)).text)
    )
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        "A classifier of 3 classes, trained on pets", "How to use it", "How good it is",
        "What it should not be used for", "Data", "Model", "How it was found", "Configuration",
        "What is in this folder",
    ]  # fmt: skip
    assert sum(token.type == "table_open" for token in tokens) == 5
    assert [token.info for token in tokens if token.type == "fence"] == ["sh", "python", "python", "text"]
    for row in (token for token in tokens if token.type == "inline" and token.content.startswith("|")):
        raise AssertionError(f"a table that is none: {row.content}")


def test_its_metadata_names_task_library_and_scores_and_no_license() -> None:
    data = ModelCard(card(config=WINNER)).data
    assert (data.pipeline_tag, data.library_name, data.license) == ("image-classification", "hpo-vision", None)
    scores = {(each.dataset_split, each.metric_type): each.metric_value for each in data.eval_results}
    assert scores["test", "accuracy"] == 0.9911
    assert scores["validation", "macro_f1"] == 0.97
    assert data.metrics == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert ModelCard(card({})).data.eval_results is None


def test_its_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, model = make()
    with writing(tmp_path / "best") as folder:
        bundle.write(folder, [model], REPORT)
        write_card(folder, bundle, REPORT)
    monkeypatch.chdir(tmp_path / "best")
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(f"photos/{name}")
    [snippet] = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(snippet, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a.png", "b.jpg"]
    assert all(re.fullmatch(r"\S+ (cat|dog|Größe, \{x\}) [01]\.\d{3}", line) for line in lines)


def test_the_report_may_come_back_from_its_file() -> None:
    report = whole_report()
    report["test"]["with_tta"]["ece"] = math.nan
    back = json.loads(json.dumps(report).replace("NaN", "null"))
    assert "| 0.0412 (0.030–0.050) | – |" in card(back)
