"""The shipped search spaces: every recipe trains, every value of every space trains, no two recipes are the same.

The images are real, a few of each class of the sets beside the checkout, or digits where those are not there. Networks
are shrunk as a user would shrink them, with `--set`.
"""

from __future__ import annotations

import json
import math
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from core.config import DataConfig, TrainConfig
from core.data import Dataset, Splits, load_dataset, split
from core.loop import train
from core.models import build_model, layer_scales
from hpo.space import load_recipe, load_space
from hpo.space.space import Categorical, Integer, Parameter, Real, SearchSpace
from tests.conftest import SHARED_DATA
from tests.hpo.commands import RunHpo
from tests.hpo.digits import digit_pixels, rows_of

SPACES = Path(__file__).resolve().parents[1] / "search_spaces"
SPACE_NAMES = sorted(path.stem for path in SPACES.glob("*.yaml"))
RECIPE_NAMES = sorted(path.stem for path in (SPACES / "recipes").glob("*.yaml"))
CPU = torch.device("cpu")

# First part of a recipe's or space's name -> its reduced data set.
SETS = {
    "stl10": "scenes",
    "intel": "scenes",
    "photos": "scenes",
    "probe": "scenes",
    "scratch": "scenes",
    "cifar100": "cifar",
    "imbalanced": "trash",
    "digits": "digits",
}

# Number of images per class from trashnet96.zip: 4 : 1, as in the full set. A fifth of them is the test set.
TRASH = {"paper": 20, "glass": 15, "plastic": 13, "metal": 10, "cardboard": 10, "trash": 5}


# Reduced data sets


def write_images(folder: Path, members: Iterator[tuple[str, bytes]], wanted: Mapping[str, int]) -> None:
    """Write the wanted number of images of each folder."""
    left = dict(wanted)
    for name, content in members:
        place = name.rpartition("/")[0]
        if left.get(place, 0) > 0:
            left[place] -= 1
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    assert not any(left.values()), left


def zip_members(archive: Path, wanted: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if name.rpartition("/")[0] in wanted and not name.endswith("/"):
                yield name, opened.read(name)


def tar_members(archive: Path, wanted: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    left = dict(wanted)
    with tarfile.open(archive) as opened:
        for member in opened:
            place = member.name.rpartition("/")[0]
            if member.isfile() and left.get(place, 0):
                left[place] -= 1
                file = opened.extractfile(member)
                assert file is not None
                yield member.name, file.read()
            if not any(left.values()):  # the rest need not be read
                return


def digits_as_photographs(path: Path, classes: int) -> None:
    """Write real digits as 32×32 images with three channels, in place of missing photographs."""
    pixels, labels = digit_pixels()
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:10] for digit in range(classes)])
    images = np.kron(pixels[chosen], np.ones((1, 4, 4), np.uint8))[..., None].repeat(3, -1)
    np.savez(path, x_train=images, y_train=labels[chosen])


@pytest.fixture(scope="session")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Paths of a few images of each set: six classes of scenes, ten of CIFAR, and six classes of unequal size."""
    root = tmp_path_factory.mktemp("cuts")
    found = {name: root / name for name in ("scenes", "cifar", "trash")}
    if not SHARED_DATA.is_dir():
        for name, classes in (("scenes", 6), ("cifar", 10), ("trash", 6)):
            found[name] = root / f"{name}.npz"
            digits_as_photographs(found[name], classes)
        return found
    scenes = ("buildings", "forest", "glacier", "mountain", "sea", "street")
    wanted = {f"{part}/{name}": count for part, count in (("train", 10), ("test", 3)) for name in scenes}
    write_images(found["scenes"], zip_members(SHARED_DATA / "scenes5k.zip", wanted), wanted)
    cifar = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    wanted = {f"train/{name}": 8 for name in cifar}
    write_images(found["cifar"], tar_members(SHARED_DATA / "cifar10_jpeg.tar.xz", wanted), wanted)
    write_images(found["trash"], zip_members(SHARED_DATA / "trashnet96.zip", TRASH), TRASH)
    return found


@pytest.fixture(scope="session")
def datasets(cuts: Mapping[str, Path]) -> Mapping[str, Dataset]:
    """The reduced sets, decoded to 32×32, and all digits."""
    at_32 = {name: load_dataset(DataConfig(name=str(path), image_size=32)) for name, path in cuts.items()}
    return {**at_32, "digits": load_dataset(DataConfig(name="digits"))}


def set_of(name: str) -> str:
    """The reduced set of a recipe or a space."""
    return SETS[name.partition("_")[0]]


def shrunk(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Overrides with which a configuration trains in a second or two."""
    if config.is_probe:
        name = config.model.name.removeprefix("timm/").partition(".")[0]
        return {"model.pretrained_file": str(pretrained_file(folder / "weights.safetensors", name))}
    if config.model.name.startswith("timm/"):
        size = {} if config.model.input_size is None else {"model.input_size": 32}
        return {"model.pretrained": False, "batch_size": 32, **size}
    return {"model.width": 0.125, "batch_size": 16}


# Notes


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_documents_source_result_and_guesses(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert all([recipe.description, recipe.source, recipe.result, recipe.guesses])
    if recipe.config.model.pretrained:
        assert "pretrained weights" in recipe.guesses, "what it needs must be said"
    if recipe.config.epochs >= 180:
        assert "a GPU's work" in recipe.guesses or "pieces" in recipe.config.schedule.name, "what it needs must be said"


def test_recipes_that_use_adam_document_it_as_adamw_without_weight_decay() -> None:
    for recipe in map(load_recipe, RECIPE_NAMES):
        is_adam = recipe.config.optim.name == "adamw" and recipe.config.optim.weight_decay == 0
        assert ("(here adamw" in recipe.guesses) == is_adam, recipe.name


def test_the_docs_describe_every_space_and_recipe() -> None:
    text = (SPACES.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in [*RECIPE_NAMES, *SPACE_NAMES] if f"`{name}`" not in text] == []


def test_no_two_recipes_are_the_same_configuration() -> None:
    configs = {name: load_recipe(name).config for name in RECIPE_NAMES}
    assert [pair for pair in combinations(configs, 2) if configs[pair[0]] == configs[pair[1]]] == []


@pytest.mark.parametrize("name", SPACE_NAMES)
def test_no_two_recipes_are_the_same_on_a_spaces_data_and_epochs(name: str) -> None:
    space = load_space(name)
    configs = {"base": space.baseline, **{recipe.name: recipe.config for recipe in space.recipes}}
    for name, config in configs.items():
        normalize = load_recipe(name).config.data.normalize if config.model.pretrained and name != "base" else None
        data = space.baseline.data.model_copy(update={"normalize": normalize} if normalize else {})
        assert (config.epochs, config.data) == (space.baseline.epochs, data)
    assert [pair for pair in combinations(configs, 2) if configs[pair[0]] == configs[pair[1]]] == []


@pytest.mark.parametrize("family", sorted(set(SETS) - {"digits"}))
def test_no_two_recipes_for_one_data_set_differ_only_in_epochs_and_split(family: str) -> None:
    """A space sets epochs and split of its recipes, so they must differ otherwise."""
    alike = {"epochs": 60, "data.val_fraction": 0.2, "data.image_size": 96, "data.normalize": "train"}
    configs = {name: load_recipe(name).config.override(alike) for name in RECIPE_NAMES if name.startswith(f"{family}_")}
    assert [pair for pair in combinations(configs, 2) if configs[pair[0]] == configs[pair[1]]] == []


# Training


def few(splits: Splits) -> Splits:
    """About 16 images to train on and 16 to validate on."""
    return replace(splits, train=splits.train[:: max(1, len(splits.train) // 16)], val=splits.val[:16])


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_trains_two_epochs(name: str, datasets: Mapping[str, Dataset], tmp_path: Path) -> None:
    values = {"epochs": 2, "data.val_fraction": 0.25, **shrunk(load_recipe(name).config, tmp_path)}
    if name.startswith("digits"):
        values = {"epochs": 2}
    config = load_recipe(name, [f"{key}={json.dumps(value)}" for key, value in values.items()]).config
    result = train(config, few(split(datasets[set_of(name)], config.data)), device=CPU, metric="macro_f1")
    assert [epoch.epoch for epoch in result.history] == ([1] if config.is_probe else [1, 2])
    assert all(math.isfinite(epoch.train_loss) for epoch in result.history)
    assert all(bool(tensor.isfinite().all()) for tensor in result.model.state_dict().values())


def one_at_a_time(space: SearchSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The baseline; then each choice or both bounds of every parameter, with its conditions met."""
    yield "base", {}
    for path, parameter in space.search.items():
        for value in edges(parameter):
            if value != space.baseline.flat()[path]:
                yield f"{path}={value}", {**conditions(space, parameter), path: value}


def edges(parameter: Parameter) -> Sequence[Any]:
    if isinstance(parameter, Categorical):
        return parameter.choices
    assert isinstance(parameter, Integer | Real)
    return (parameter.low, parameter.high)


def conditions(space: SearchSpace, parameter: Parameter) -> dict[str, Any]:
    """Values with which the parameter is active, including the conditions of its conditions."""
    found: dict[str, Any] = {}
    for path, allowed in parameter.when.items():
        if path in space.search:
            found |= conditions(space, space.search[path])
            found[path] = next(value for value in allowed if space.search[path].contains(value))
    return found


# Narrow stages, or timm's tiny network. `model.width` and `model.name` are searched, so they are not pinned.
TINY: dict[str, list[str]] = {
    "digits": ["model.widths=[8, 8]"],
    "scratch": ["model.widths=[8, 8, 8]"],
    "stl10_small": ["model.widths=[8, 8, 8, 8]", "model.blocks=[1, 1, 1, 1]"],
    "cifar100": ["model.widths=[8, 8, 8, 8]", "model.blocks=[1, 1, 1, 1]"],
    "imbalanced": ["model.widths=[8, 8, 8, 8]", "model.blocks=[1, 1, 1, 1]"],
    "intel_scenes": ["model.name=timm/test_resnet", "model.pretrained=false"],
    "photos": ["model.name=timm/test_efficientnet", "model.pretrained=false"],
    "probe": ["model.name=timm/test_resnet"],
}


@pytest.mark.parametrize("name", SPACE_NAMES)
def test_every_value_of_a_space_trains(name: str, datasets: Mapping[str, Dataset], tmp_path: Path) -> None:
    """Train with each value alone for an epoch of a few steps."""
    more = [] if name == "digits" else ["data.val_fraction=0.3", "data.image_size=32"]
    if name == "probe":
        more.append(f"model.pretrained_file={pretrained_file(tmp_path / 'weights.safetensors', 'test_resnet')}")
    space = load_space(name, [*TINY[name], *more])
    splits = few(split(datasets[set_of(name)], space.baseline.data))
    tried = 0
    for said, values in one_at_a_time(space):
        config = space.baseline.override({"epochs": 4, "batch_size": 8, **values})
        result = train(config, splits, device=CPU, stop_after=1, metric=space.metric)
        assert math.isfinite(result.history[-1].train_loss), said
        assert all(bool(tensor.isfinite().all()) for tensor in result.model.state_dict().values()), said
        tried += 1
    assert tried > len(space.search)


@pytest.mark.parametrize("field", ["optim.layer_decay", "model.drop_path", "model.dropout"])
def test_every_network_of_the_photos_space_has_the_searched_fields(field: str) -> None:
    """The space is tested with a tiny network."""
    for name in edges(load_space("photos").search["model.name"]):
        config = TrainConfig().override({"model.name": name, field: 0.5})
        model = build_model(config.model, num_classes=3, in_channels=3, image_size=(64, 64))
        assert len(set(layer_scales(model, 0.5).values())) > 4


def test_the_networks_of_the_scenes_space_are_those_of_its_recipes() -> None:
    """The recipes train each of them; the space is tested with a tiny network."""
    space = load_space("intel_scenes")
    trained = [recipe.config for recipe in space.recipes if not recipe.config.is_probe]
    assert set(edges(space.search["model.name"])) == {config.model.name for config in trained}


# From the command line


# Space, reduced data set, and overrides that make it small enough for two cores.
SHALLOW = ["model.width=0.125", "model.blocks=[1, 1, 1, 1]"]
ROADS: dict[str, tuple[str, str, list[str]]] = {
    "E1, ResNet-10": ("stl10_small", "scenes", SHALLOW),
    "E2, k-fold": ("stl10_small", "scenes", [*SHALLOW, "data.folds=2"]),
    "E3": ("cifar100", "cifar", SHALLOW),
    "E4": ("imbalanced", "trash", ["model.width=0.125"]),
    "E5": ("intel_scenes", "scenes", ["model.name=timm/test_resnet"]),
}


@pytest.mark.parametrize("road", ROADS)
def test_each_space_works_from_search_to_predictions(
    road: str, cuts: Mapping[str, Path], shared_data: Path, tmp_path: Path, run_hpo: RunHpo
) -> None:
    space, images, small = ROADS[road]
    sets = [*small, "epochs=2", "batch_size=16", "data.val_fraction=0.25", "data.image_size=32", "pruner.rungs=[0.5]"]
    if space == "intel_scenes":
        sets.append(f"model.pretrained_file={pretrained_file(tmp_path / 'weights.safetensors')}")
    options = [word for value in sets for word in ("--set", value)]
    data = str(cuts[images])
    said = run_hpo("run", space, "--data", data, "--trials", "3", *options)
    for recipe in load_space(space).recipes:
        assert f"recipe {recipe.name} " in said or recipe.name == "stl10_jan30_ema", "which that space can express"
    run_hpo("refit", "best", "--no-confirm")
    bundle = tmp_path / "studies" / space / "refit/best"
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert metrics["objective"] == load_space(space).metric
    assert metrics["test"]["images"] > 0
    out = tmp_path / "submission.csv"
    run_hpo("predict", str(bundle), data, "-o", str(out))
    rows = rows_of(out)
    assert len(rows) == sum(path.suffix == ".jpg" for path in cuts[images].rglob("*"))
    assert {row["label"] for row in rows} <= set(json.loads((bundle / "classes.json").read_text()))


def pretrained_file(path: Path, name: str = "test_resnet") -> Path:
    """Random weights of a network with other classes, as a user would provide them."""
    network = timm.create_model(name, pretrained=False, num_classes=1000)
    save_file(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["imbalanced", "intel_scenes", "photos"])
def test_a_space_for_any_images_requires_data(name: str, run_hpo: RunHpo) -> None:
    run_hpo("run", name, "--set", "model.pretrained=false", code=2)
    assert "hpo: data.name: path/to/images is neither" in run_hpo.error.splitlines()[-1]
