"""Pretrained weights from a folder, `--weights`, and a search without those of some networks."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from core.errors import MissingWeightsError, UserError
from core.models import has_weights, timm_models
from core.weights import weights_folder, weights_in
from hpo.api.networks import with_weights
from hpo.space import load_space
from tests.hpo.commands import RunHpo
from tests.hpo.digits import digit_pixels

NETWORKS = ("test_resnet.r160_in1k", "test_efficientnet.r160_in1k")
SPACE = """
data: {name: some.npz, normalize: half}
base:
  model: {name: timm/test_efficientnet.r160_in1k, pretrained: true}
  epochs: 1
  batch_size: 64
pruner: {name: none}
sampler: {name: random}
search:
  model.name: {choices: [timm/test_efficientnet.r160_in1k, timm/test_resnet.r160_in1k]}
  optim.lr_scale: {low: 0.5, high: 2, log: true}
  model.drop_path: {low: 0.0, high: 0.1, when: {model.name: timm/test_efficientnet.r160_in1k}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for weights beside a space, on a machine without a cache or a network."""
    unplugged = ConnectionError("no route to host")

    def no_session() -> None:
        raise unplugged

    monkeypatch.setattr(huggingface_hub, "get_session", no_session)
    monkeypatch.setattr(timm_models.hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for worker processes
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    timm_models._answers.cache_clear()
    (tmp_path / "space.yaml").write_text(SPACE)
    pixels, labels = digit_pixels()
    np.savez(tmp_path / "some.npz", images=pixels[:200], labels=labels[:200])
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def save(folder: Path, name: str) -> None:
    """Save random weights of a network of other classes."""
    torch.manual_seed(0)
    save_file(timm.create_model(name.partition(".")[0], num_classes=1000).state_dict(), folder / f"{name}.safetensors")


def test_workers_and_later_commands_use_the_folder_of_the_search(folder: Path, run_hpo: RunHpo) -> None:
    for name in NETWORKS:
        save(folder, name)
    run_hpo("run", "space.yaml", "--weights", "weights", "--study", "own", "--trials", "2", "--workers", "2")
    run_hpo("run", "space.yaml", "--weights", "weights", "--study", "own", "--trials", "3", "--workers", "0")
    run_hpo("worker", "own")
    assert "3 of 3 trials finished" in run_hpo("study", "show", "own")
    run_hpo("refit", "best", "--study", "own")  # which confirms first
    run_hpo("train", "--from", "own/1")
    folder.rename(folder.with_name("elsewhere"))
    said = run_hpo.fails("refit", "0", "--study", "own")
    assert said == f"hpo: --weights: {folder}: no such folder; give another one"
    run_hpo("refit", "0", "--study", "own", "--weights", "elsewhere")


def test_networks_without_weights_are_left_out_of_a_new_study(folder: Path, run_hpo: RunHpo) -> None:
    save(folder, NETWORKS[0])
    said = run_hpo("run", "space.yaml", "--weights", "weights", "--study", "own", "--trials", "2")
    [line] = [line for line in said.splitlines() if line.startswith("left out")]
    for words in ("timm/test_efficientnet.r160_in1k;", "/timm/test_efficientnet.r160_in1k/", "model.safetensors"):
        assert words in line
    assert "timm/test_resnet.r160_in1k" in run_hpo("study", "trials", "own", "--csv")
    save(folder, NETWORKS[1])
    again = run_hpo("run", "space.yaml", "--weights", "weights", "--study", "own", "--trials", "3")
    assert "left out" not in again
    assert "test_efficientnet" not in run_hpo("study", "trials", "own", "--csv"), "the study keeps its networks"


def test_a_search_without_any_weights_names_the_way_out(folder: Path, run_hpo: RunHpo) -> None:
    said = run_hpo.fails("run", "space.yaml", "--study", "own")
    assert "no network of space has its pretrained weights here" in said
    assert said.endswith("or train from scratch with: hpo run stl10_small")
    assert not Path("studies/own").exists()
    assert list(folder.iterdir()) == []


def test_the_base_takes_the_first_network_that_is_left(folder: Path) -> None:
    save(folder, NETWORKS[0])
    with weights_in(folder):
        space, missing = with_weights(load_space("space.yaml"), None)
    assert missing == ("timm/test_efficientnet.r160_in1k",)
    assert space.baseline_params() == {"model.name": "timm/test_resnet.r160_in1k", "optim.lr_scale": 1.0}
    assert set(space.search) == {"model.name", "optim.lr_scale"}


def test_a_space_without_a_choice_of_pretrained_networks_stays_as_it_is(folder: Path) -> None:
    for settings in ("model.pretrained=false", "model.name=timm/test_resnet.r160_in1k"):
        space = load_space("space.yaml", [settings])
        assert with_weights(space, None) == (space, ())


def test_weights_are_found_in_folder_and_cache_and_on_a_server_that_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "timm/test_resnet.r160_in1k"
    assert not has_weights(name)
    save(folder, NETWORKS[0])
    with weights_in(folder):
        assert has_weights(name)
        assert not has_weights("timm/test_efficientnet.r160_in1k")
    monkeypatch.setenv("HPO_WEIGHTS", str(folder))
    assert has_weights(name)
    monkeypatch.delenv("HPO_WEIGHTS")
    monkeypatch.setattr(timm_models, "_in_cache", lambda repository: repository)
    assert has_weights(name)
    assert not has_weights("timm/test_vit4"), "timm has no weights of it"
    assert not has_weights("resnet")


def test_a_server_is_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    class Session:
        status_code = 200

        def head(self, address: str, timeout: float) -> Session:
            asked.append((address, timeout))
            return self

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    timm_models._answers.cache_clear()
    assert has_weights("timm/test_resnet.r160_in1k")
    assert has_weights("timm/test_efficientnet.r160_in1k")
    assert asked == [(timm_models.hub.ENDPOINT, timm_models.SERVER_TIMEOUT_S)]
    timm_models._answers.cache_clear()


def test_the_given_folder_takes_precedence_and_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPO_WEIGHTS", raising=False)
    assert weights_folder() is None
    monkeypatch.setenv("HPO_WEIGHTS", str(tmp_path / "nowhere"))
    with weights_in(tmp_path):
        assert weights_folder() == tmp_path
        with weights_in(None):
            assert weights_folder() == tmp_path
    with pytest.raises(UserError, match=re.escape(f"HPO_WEIGHTS: {tmp_path}/nowhere: no such folder")):
        weights_folder()
    with pytest.raises(UserError, match=r"--weights: .*nowhere: no such folder"), weights_in(tmp_path / "nowhere"):
        pass


def test_a_search_of_one_network_without_weights_is_refused(folder: Path, run_hpo: RunHpo) -> None:
    said = run_hpo.fails("run", "space.yaml", "--study", "own", "--set", "model.name=timm/test_resnet.r160_in1k")
    assert "put the file as test_resnet.r160_in1k.safetensors into a folder named by --weights or HPO_WEIGHTS" in said
    with pytest.raises(MissingWeightsError):
        with_weights(load_space("space.yaml"), None)
