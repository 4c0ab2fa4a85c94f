"""The bundle: written completely or not at all, and loaded unchanged."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from core.calibration import scaled
from core.config import TrainConfig
from core.errors import UserError
from core.models import build_model
from core.runtime import normalize
from core.tta import VIEWS, look, predict_logits
from hpo.errors import BundleError
from hpo.space import load_recipe, to_yaml
from hpo.study.versions import versions
from hpo.submission.bundle import Bundle, Normalization, Part, load_bundle, writing

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "Größe, {x}")
FILES = {
    "model.safetensors",
    "config.yaml",
    "classes.json",
    "preprocess.json",
    "origin.json",
    "metrics.json",
}
SCORES = {"accuracy": 0.9876, "balanced_accuracy": 0.98, "macro_f1": 0.97, "loss": 0.0412, "ece": float("nan")}
REPORT: dict[str, Any] = {
    "trial": 7,
    "val": {"images": 20, "without_tta": SCORES, "with_tta": SCORES},
    "test": {"images": 30, "without_tta": SCORES, "with_tta": SCORES | {"accuracy": 0.9911}},
}


def make(*, channels: int = 3, views: str = "flip", **changes: Any) -> tuple[Bundle, nn.Module]:
    """A bundle of a tiny network for 12 × 16 images, batch norms in use, and that network."""
    config = TrainConfig().override({"model.widths": (8, 16), "model.blocks": (1, 1), **changes})
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=len(CLASSES), in_channels=channels, image_size=(12, 16))
    model.train()
    with torch.no_grad():
        model(torch.randn(8, channels, 12, 16))  # moves the batch norms' statistics
    bundle = Bundle(
        config=config,
        classes=CLASSES,
        in_channels=channels,
        image_size=(12, 16),
        normalizations=(Normalization((0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]),),
        views=views,
        data_name="pets",
        fingerprint="0123abcd",
        versions=versions(),
        temperature=1.6,
    )
    return bundle, model.eval()


def write(folder: Path, **changes: Any) -> Path:
    bundle, model = make(**changes)
    with writing(folder) as new:
        bundle.write(new, [model], REPORT)
    return folder


def make_ensemble(members: int = 3, **changes: Any) -> tuple[Bundle, list[nn.Module]]:
    """As `make`, of several networks, each with weights and a normalisation of its own."""
    bundle, first = make(**{"data.folds": members}, **changes)
    models = [first]
    for member in range(1, members):
        model = copy.deepcopy(first)
        with torch.no_grad():
            for weights in model.parameters():
                weights.mul_(1 + 0.2 * member)
        models.append(model)
    of_each = tuple(
        Normalization(tuple(0.1 * i + mean for mean in each.mean), tuple(each.std))
        for i in range(members)
        for each in bundle.normalizations
    )
    return replaced(bundle, normalizations=of_each), models


def write_ensemble(folder: Path, **changes: Any) -> Path:
    bundle, models = make_ensemble(**changes)
    with writing(folder) as new:
        bundle.write(new, models, REPORT)
    return folder


def make_several() -> tuple[Bundle, list[nn.Module]]:
    """Two networks of different widths, with weights 3 to 1 and views of their own."""
    first, wide = make(views="flip")
    second, narrow = make(**{"model.widths": (8,), "model.blocks": (2,)})
    with torch.no_grad():
        for weights in narrow.parameters():
            weights.mul_(1.3)
    parts = (Part(first.config, 0.75, "flip"), Part(second.config, 0.25, "none"))
    return replaced(first, parts=parts, normalizations=first.normalizations * 2), [wide, narrow]


def write_several(folder: Path) -> Path:
    bundle, models = make_several()
    with writing(folder) as new:
        bundle.write(new, models, REPORT)
    return folder


def some_images(channels: int = 3, count: int = 5) -> torch.Tensor:
    shape = (count, channels, 12, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# What is written is what is loaded


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", sorted(VIEWS))
def test_a_loaded_bundle_answers_as_the_network_that_was_written(tmp_path: Path, channels: int, views: str) -> None:
    bundle, model = make(channels=channels, views=views)
    folder = write(tmp_path / "best", channels=channels, views=views)
    loaded = load_bundle(folder, CPU)
    images = some_images(channels)
    [by] = bundle.normalizations
    plain = predict_logits(model, images, prepare=lambda x: normalize(x, by.mean, by.std), views=views)
    expected = scaled(plain, 1.6)
    assert torch.equal(loaded.logits(images), expected)
    torch.testing.assert_close(loaded.probabilities(images), (plain / 1.6).softmax(1))
    torch.testing.assert_close(loaded.probabilities(images).sum(1), torch.ones(5))
    torch.testing.assert_close(loaded.logits(images, batch_size=2), expected)
    assert loaded.meta == bundle
    assert not any(model.training for model in loaded.models)


@pytest.mark.parametrize("views", sorted(VIEWS))
def test_an_ensemble_answers_with_the_mean_of_its_members_probabilities(tmp_path: Path, views: str) -> None:
    bundle, models = make_ensemble(views=views)
    images = some_images()
    total = torch.zeros(5, len(CLASSES))
    for model, by in zip(models, bundle.normalizations, strict=True):
        for view in VIEWS[views]:
            with torch.inference_mode():
                total += model(normalize(look(images, view), by.mean, by.std)).softmax(1)
    mean = total / (3 * len(VIEWS[views]))
    loaded = load_bundle(write_ensemble(tmp_path / "best", views=views), CPU)
    uncalibrated = replaced(loaded, meta=replaced(bundle, temperature=1.0))
    torch.testing.assert_close(uncalibrated.probabilities(images), mean)
    torch.testing.assert_close(loaded.probabilities(images), (mean.log() / 1.6).softmax(1))
    torch.testing.assert_close(loaded.logits(images).exp(), loaded.probabilities(images))
    torch.testing.assert_close(loaded.logits(images, batch_size=2), loaded.logits(images))
    assert loaded.meta == bundle


def test_networks_of_different_configurations_answer_with_their_weights_and_views(tmp_path: Path) -> None:
    meta, models = make_several()
    folder = write_several(tmp_path / "best")
    loaded, images = load_bundle(folder, CPU), some_images()
    assert loaded.meta == meta
    by = meta.normalizations[0]
    pixels = (images / 255 - torch.tensor(by.mean)[:, None, None]) / torch.tensor(by.std)[:, None, None]
    with torch.inference_mode():
        wide, narrow = ((model(pixels).softmax(1), model(pixels.flip(-1)).softmax(1)) for model in models)
    mean = 0.75 * (wide[0] + wide[1]) / 2 + 0.25 * narrow[0]
    expected = (mean.log() / 1.6).softmax(1)
    torch.testing.assert_close(loaded.probabilities(images), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((folder / "origin.json").read_text())["format"] == 5
    assert {file.name for file in folder.glob("*.yaml")} == {"config.yaml", "config_2.yaml"}


def test_one_configuration_is_written_in_the_format_before_several(tmp_path: Path) -> None:
    for folder in (write(tmp_path / "one"), write_ensemble(tmp_path / "folds")):
        assert json.loads((folder / "origin.json").read_text())["format"] == 4
        networks = json.loads((folder / "preprocess.json").read_text())["networks"]
        assert all(set(network) == {"weights", "mean", "std"} for network in networks)


def test_an_ensemble_of_equals_answers_as_one_of_them(tmp_path: Path) -> None:
    bundle, model = make()
    with writing(tmp_path / "best") as new:
        replaced(bundle, normalizations=bundle.normalizations * 3).write(new, [model] * 3, REPORT)
    alone = load_bundle(write(tmp_path / "one"), CPU).probabilities(some_images())
    torch.testing.assert_close(load_bundle(tmp_path / "best", CPU).probabilities(some_images()), alone)


def test_an_ensemble_has_a_file_for_each_member_and_no_other(tmp_path: Path) -> None:
    folder = write_ensemble(tmp_path / "best")
    members = {f"member_{i}.safetensors" for i in (1, 2, 3)}
    assert {path.name for path in folder.iterdir()} == (FILES - {"model.safetensors"}) | members
    assert json.loads((folder / "origin.json").read_text())["weights_sha256"].keys() == members


def test_it_holds_these_files_and_none_of_them_is_a_pickle(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    assert {path.name for path in folder.iterdir()} == FILES
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() is None
        assert set(weights.keys()) == set(make()[1].state_dict())


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_configuration_is_a_recipe_that_trains(tmp_path: Path) -> None:
    folder = write(tmp_path / "best", epochs=7)
    assert load_recipe(folder / "config.yaml").config == make(epochs=7)[0].config


def test_a_score_that_does_not_exist_is_null_in_valid_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((write(tmp_path / "best") / "metrics.json").read_text(), parse_constant=refuse)
    assert report["test"]["with_tta"]["ece"] is None
    assert report["test"]["with_tta"]["accuracy"] == 0.9911


def test_pretrained_weights_are_not_asked_for_when_the_bundle_brings_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "best")
    asked = []

    def build(config: Any, **shape: Any) -> nn.Module:
        asked.append(config.pretrained)
        return build_model(TrainConfig().model.model_copy(update={"widths": (8, 16), "blocks": (1, 1)}), **shape)

    monkeypatch.setattr("hpo.submission.bundle.build_model", build)
    text = (folder / "config.yaml").read_text()
    # A timm model refuses the fields of resnet, so they are cut out of the file.
    text = re.sub(r"(?ms)^model:.*?(?=^\S)", "model: {name: timm/resnet18, pretrained: true}\n", text)
    (folder / "config.yaml").write_text(text)
    assert load_bundle(folder, CPU).meta.config.model.pretrained
    assert asked == [False]


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    before = torch.get_rng_state()
    load_bundle(folder, CPU)
    assert torch.equal(torch.get_rng_state(), before)


# Whole or not at all


def test_a_failure_while_writing_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    before = (folder / "model.safetensors").read_bytes()

    def fail() -> None:
        with writing(folder) as new:
            (new / "model.safetensors").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "best"] == []


def test_the_new_bundle_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    (folder / "stray.txt").write_text("of the old one")
    write(folder, epochs=9)
    assert {path.name for path in folder.iterdir()} == FILES
    assert load_bundle(folder, CPU).meta.config.epochs == 9
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_kill_at_the_worst_moment_loses_no_bundle(tmp_path: Path) -> None:
    before, between = (write(tmp_path / name, epochs=3) for name in ("before", "between"))
    # A child dies before the first rename, and another one between the renames, without running any `finally`.
    code = """
import os, sys
from pathlib import Path
from hpo.submission.bundle import writing
rename = Path.rename
for folder in map(Path, sys.argv[1:]):
    if os.fork() == 0:
        def killed(self, target):
            if folder.name == "between":
                rename(self, target)
            os._exit(9)
        Path.rename = killed
        with writing(folder) as new:
            (new / "model.safetensors").write_bytes(b"new")
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
"""
    subprocess.run(
        [sys.executable, "-c", code, str(before), str(between)], cwd=Path(__file__).parents[3], check=True, timeout=120
    )
    assert (before.exists(), between.exists()) == (True, False)
    for folder in (before, between):
        assert load_bundle(folder, CPU).meta.config.epochs == 3
        assert {path.name for path in folder.iterdir()} == FILES


# A fault of a folder is one line


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def replace(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def edit(name: str, key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {key: value}))

    return change


def drop(name: str, key: str) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return change


def edit_network(key: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        content = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
        content["networks"][0][key] = value
        (folder / "preprocess.json").write_text(json.dumps(content))

    return change


def flip_a_bit(folder: Path, name: str = "model.safetensors") -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_weights(folder: Path) -> None:
    """Weights of another network, with everything that belongs to them but the configuration."""
    other = write(folder.parent / "other", **{"model.widths": (16, 16)})
    for name in ("model.safetensors", "origin.json"):
        shutil.copy(other / name, folder / name)


def large_network(folder: Path) -> None:
    """A configuration of two terabytes, which must be refused before they are asked of the memory."""
    config = load_recipe(folder / "config.yaml").config
    huge = config.override({"model.widths": (4096, 4096), "model.width": 4.0, "model.blocks": (64, 64)})
    (folder / "config.yaml").write_text(to_yaml(huge), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no such folder; give an output folder of `hpo refit`"),
        *((remove(name), rf"{re.escape(name)} is missing") for name in sorted(FILES - {"metrics.json"})),
        (flip_a_bit, r"model\.safetensors: damaged, or from another bundle"),
        (replace("model.safetensors", "no weights"), r"model\.safetensors: damaged, or from another bundle"),
        (other_weights, r"model\.safetensors: does not fit config\.yaml and the 3 classes of classes\.json"),
        (replace("classes.json", '["cat", "dog"]'), r"does not fit config\.yaml and the 2 classes of classes\.json"),
        (replace("classes.json", '["cat"'), r"classes\.json: damaged \(Invalid JSON"),
        (replace("classes.json", '{"cat": 0}'), r"classes\.json: damaged \(Input should be a valid array\)"),
        (replace("config.yaml", "epochs: [1"), r"config\.yaml: damaged \(.*config\.yaml:1"),
        (replace("config.yaml", "epoch: 1\n"), r"config\.yaml: damaged \(.*epoch"),
        (edit("preprocess.json", "channels", 2), r"preprocess\.json: damaged \(channels: "),
        (edit("preprocess.json", "networks", []), r"preprocess\.json: damaged \(networks: "),
        (edit_network("mean", [0.5]), r"preprocess\.json: mean and std must have one number for each"),
        (edit_network("std", [1, 1, 0]), r"preprocess\.json: damaged \(networks\.0\.std\.2: "),
        (edit_network("weights", "../model.safetensors"), r"the weights of its networks must be model\.safetensors"),
        (edit("preprocess.json", "tta_views", "zoom"), r"preprocess\.json: tta_views zoom: this hpo knows none"),
        (edit("origin.json", "format", 1), r"the bundle has format 1, and this version of hpo reads 2, 3, 4 and 5"),
        (edit("origin.json", "format", 6), r"the bundle has format 6, and this version of hpo reads 2, 3, 4 and 5"),
        (edit("origin.json", "format", 2), r"preprocess\.json: damaged \(temperature: "),
        (edit("preprocess.json", "temperature", 0), r"preprocess\.json: damaged \(temperature: "),
        (drop("preprocess.json", "temperature"), r"preprocess\.json: damaged \(temperature: "),
        (edit("origin.json", "weights_sha256", {}), r"model\.safetensors: damaged, or from another bundle"),
        (edit("origin.json", "versions", None), r"origin\.json: damaged \(versions: "),
        (edit("origin.json", "versions", {"a\n\x1b[2J": 1}), r"origin\.json: damaged \(versions\.a\\n\\x1b\[2J: "),
        (edit("origin.json", "study", "x" * (1 << 24)), r"origin\.json: damaged \(longer than 16,777,216 bytes\)"),
        (replace("classes.json", "[]"), r"classes\.json: damaged \(.*at least 1 item"),
        (replace("classes.json", "[" * 100_000), r"classes\.json: damaged \(Invalid JSON: recursion limit"),
        (replace("config.yaml", "a: 1\n" * 300_000), r"config\.yaml: damaged \(.*longer than 1,048,576 bytes"),
        (edit("preprocess.json", "image_size", [10**9, 10**9]), r"damaged \(image_size: more than 4096×4096\)"),
        (edit("preprocess.json", "networks", 21 * [{"weights": "x", "mean": [0], "std": [1]}]), r"at most 20 items"),
        (large_network, r"model\.safetensors: does not fit config\.yaml and the 3 classes of classes\.json"),
    ],
)
def test_a_damaged_bundle_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write(tmp_path / "best")
    damage(folder)
    with pytest.raises(BundleError, match=message) as raised:
        load_bundle(folder, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("member_2.safetensors"), r"member_2\.safetensors is missing"),
        (partial(flip_a_bit, name="member_3.safetensors"), r"member_3\.safetensors: damaged, or from another bundle"),
        (
            lambda folder: shutil.copy(folder / "member_1.safetensors", folder / "member_2.safetensors"),
            r"member_2\.safetensors: damaged, or from another bundle",
        ),
        (edit_network("weights", "member_2.safetensors"), r"must be member_1\.safetensors, member_2\.safetensors, m"),
    ],
)
def test_every_member_is_checked(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_ensemble(tmp_path / "best")
    damage(folder)
    with pytest.raises(BundleError, match=message) as raised:
        load_bundle(folder, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config_2.yaml"), r"config_2\.yaml is missing"),
        (replace("config_2.yaml", "epochs: many"), r"config_2\.yaml: damaged"),
        (edit_network("weight", 0), r"preprocess\.json: damaged \(networks"),
        (edit_network("views", "sideways"), r"tta_views sideways: this hpo knows"),
        (lambda folder: shutil.copy(folder / "config.yaml", folder / "config_2.yaml"), r"does not fit config_2\.yaml"),
    ],
)
def test_every_configuration_is_checked(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write_several(tmp_path / "best")
    damage(folder)
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(folder, CPU)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("")
    with pytest.raises(BundleError, match="no such folder"):
        load_bundle(path, CPU)


@pytest.mark.parametrize(
    "images",
    [
        some_images(channels=1),
        some_images()[:, :, :8],
        some_images().float(),
        some_images()[:0],
    ],
    ids=["channels", "size", "type", "none"],
)
def test_images_that_do_not_fit_are_refused(tmp_path: Path, images: torch.Tensor) -> None:
    with pytest.raises(BundleError, match=r"this bundle takes uint8 of \(N, 3, 12, 16\), N at least 1"):
        load_bundle(write(tmp_path / "best"), CPU).logits(images)


# Where it came from


def test_it_remembers_the_study_the_trial_and_where_the_data_came_from(tmp_path: Path) -> None:
    bundle, model = make()
    bundle = replaced(bundle, study="rooms", trial=7, source="photos/scenes5k.zip")
    with writing(tmp_path / "best") as new:
        bundle.write(new, [model], REPORT)
    origin = json.loads((tmp_path / "best" / "origin.json").read_text(encoding="utf-8"))
    assert (origin["study"], origin["trial"], origin["data"]["source"]) == ("rooms", 7, "photos/scenes5k.zip")
    loaded = load_bundle(tmp_path / "best", CPU)
    assert loaded.meta == bundle
    assert loaded.folder == tmp_path / "best"


def test_a_bundle_without_an_origin_in_a_study_loads(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    origin = json.loads((folder / "origin.json").read_text(encoding="utf-8"))
    del origin["study"], origin["trial"], origin["data"]["source"]
    (folder / "origin.json").write_text(json.dumps(origin), encoding="utf-8")
    meta = load_bundle(folder, CPU).meta
    assert (meta.study, meta.trial, meta.source) == (None, None, None)


def test_a_bundle_of_the_format_before_temperatures_is_read_with_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    drop("preprocess.json", "temperature")(folder)
    edit("origin.json", "format", 2)(folder)
    loaded = load_bundle(folder, CPU)
    assert loaded.meta == replaced(make()[0], temperature=1.0)
    with_one = replaced(load_bundle(write(tmp_path / "new"), CPU), meta=loaded.meta)
    assert torch.equal(loaded.logits(some_images()), with_one.logits(some_images()))


def test_a_folder_and_a_device_may_be_given_in_words(tmp_path: Path) -> None:
    assert load_bundle(str(write(tmp_path / "best")), "cpu").device == CPU
    with pytest.raises(UserError, match="tpu"):
        load_bundle(tmp_path / "best", "tpu")


def test_a_bundle_of_the_format_before_ranges_has_that_of_16_bits(tmp_path: Path) -> None:
    folder = write(tmp_path / "best")
    drop("preprocess.json", "sixteen_bit_top")(folder)
    edit("origin.json", "format", 3)(folder)
    assert load_bundle(folder, CPU).meta == make()[0]


def test_16_bit_images_are_read_on_the_scale_of_the_training_images(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 4096, (12, 16)).astype(np.uint16)
    Image.fromarray(samples).save(tmp_path / "dark.png")
    Image.fromarray((samples * 16).astype(np.uint16)).save(tmp_path / "bright.png")
    bundle, model = make(channels=1)
    with writing(tmp_path / "best") as new:
        replaced(bundle, top=4095).write(new, [model], REPORT)
    twelve, sixteen = load_bundle(tmp_path / "best", CPU), load_bundle(write(tmp_path / "other", channels=1), CPU)
    assert twelve.meta.top == 4095
    dark, bright = (tmp_path / f"{name}.png" for name in ("dark", "bright"))
    with Image.open(dark) as opened:
        expected = sixteen.predict(bright).probabilities
        torch.testing.assert_close(twelve.predict(dark).probabilities, expected, atol=1e-2, rtol=0)
        torch.testing.assert_close(twelve.predict([opened]).probabilities, twelve.predict(dark).probabilities)
    assert not torch.allclose(sixteen.predict(dark).probabilities, expected, atol=1e-2)
