"""ONNX: one file with the bundle's probabilities and metadata, for every family of networks."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from core.config import TrainConfig
from core.models import build_model
from core.runtime import normalize
from hpo.errors import BundleError
from hpo.submission import onnx_export
from hpo.submission.bundle import Bundle, LoadedBundle, Normalization, Part
from hpo.submission.card import model_card
from hpo.submission.onnx_export import check_onnx, export_onnx, onnx_probabilities

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")
TINY = {"model.widths": (8, 16), "model.blocks": (1, 1)}
EXTRAS = TINY | {
    "model.se": True, "model.drop_path": 0.2, "model.dropout": 0.1, "model.anti_alias": True, "model.max_pool": True,
    "model.activation": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """(64, 1, 8, 8) uint8: scikit-learn's."""
    return torch.from_numpy(load_digits().images[:64, None] * 15.9375).to(torch.uint8)


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> Tensor:
    """(16, 3, 96, 96) uint8 of TrashNet."""
    with zipfile.ZipFile(shared_data / "trashnet96.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::120][:16]
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def make(images: Tensor, *, views: str, networks: int = 1, temperature: float = 1.0, **changes: Any) -> LoadedBundle:
    """A bundle of random networks that tell these images apart, each with a normalisation of its own."""
    channels, height, width = images.shape[1:]
    config = TrainConfig().override(changes)
    shape = {"num_classes": 10, "in_channels": channels, "image_size": (height, width)}
    models, normalizations = [], []
    for member in range(networks):
        torch.manual_seed(member)
        by = Normalization((0.4 + 0.05 * member,) * channels, (0.3,) * channels)
        model = build_model(config.model, **shape).train()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):  # the last of a block begins at zero
                    nn.init.uniform_(module.weight, 0.5, 1.5)
            model(normalize(images, by.mean, by.std))  # moves the batch norms' statistics
            last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            nn.init.normal_(last.weight)  # a new classifier of timm's begins at zero
            logits = model.eval()(normalize(images, by.mean, by.std))
            last.weight.mul_(2 / logits.std(0).mean())
        models.append(model.eval().to(memory_format=torch.channels_last))
        normalizations.append(by)
    meta = Bundle(
        config=config,
        classes=tuple(f"class {i}, é" for i in range(10)),
        in_channels=channels,
        image_size=(height, width),
        normalizations=tuple(normalizations),
        views=views,
        data_name="some images",
        fingerprint="0123abcd",
        versions={"torch": "2"},
        study="pets",
        temperature=temperature,
    )
    return LoadedBundle(tuple(models), meta, CPU)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("digits", {"views": "flip", "model.name": "vgg", "model.hidden": 16, "model.norm": "group"} | TINY),
        ("photographs", {"views": "flip_shift", "networks": 2, "temperature": 1.7} | EXTRAS),
        ("photographs", {"views": "shift", "temperature": 0.6, "model.name": "timm/test_vit", "model.drop_path": 0.1}),
    ],
    ids=["vgg", "an ensemble of two resnets with all their parts", "timm"],
)
def test_onnxruntime_reproduces_torch_on_real_images_for_any_batch_size(
    tmp_path: Path, request: pytest.FixtureRequest, which: str, changes: dict[str, Any]
) -> None:
    images: Tensor = request.getfixturevalue(which)
    bundle = make(images, **changes)
    expected = bundle.probabilities(images)
    assert expected.std(0).mean() > 0.02, "the images are told apart, or all would agree"
    assert export_onnx(bundle, tmp_path / "model.onnx", images) <= 1e-4
    ask = onnx_probabilities(tmp_path / "model.onnx")
    found = torch.cat([ask(images[:1]), ask(images[1:4]), ask(images[4:])])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(len(images)))


def test_onnxruntime_reproduces_networks_of_different_configurations(tmp_path: Path, digits: Tensor) -> None:
    wide, narrow = make(digits, views="flip", **TINY), make(digits, views="none", **TINY | {"model.widths": (4, 8)})
    parts = (Part(wide.meta.config, 0.75, "shift"), Part(narrow.meta.config, 0.25, "none"))
    meta = replace(wide.meta, parts=parts, normalizations=wide.meta.normalizations * 2, temperature=1.3)
    bundle = LoadedBundle((*wide.models, *narrow.models), meta, CPU)
    assert export_onnx(bundle, tmp_path / "model.onnx", digits) <= 1e-4
    found = onnx_probabilities(tmp_path / "model.onnx")(digits)
    torch.testing.assert_close(found, bundle.probabilities(digits), atol=1e-4, rtol=0)
    one_view = replace(bundle, meta=replace(meta, parts=tuple(replace(part, weight=0.5) for part in parts)))
    assert (found - one_view.probabilities(digits)).abs().max() > 1e-3, "the weights matter"


def test_the_file_has_metadata_without_this_machines_paths_and_the_cards_example_runs(
    tmp_path: Path, digits: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    bundle = make(digits, views="none", **TINY)
    before = torch.get_rng_state()
    export_onnx(bundle, tmp_path / "model.onnx", digits)
    assert torch.equal(torch.get_rng_state(), before)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [taken], [given] = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [1, 8, 8])
    assert (given.name, given.type, given.shape[1:]) == ("probabilities", "tensor(float)", [10])
    assert isinstance(taken.shape[0], str), "any number at once"

    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list(bundle.meta.classes)
    assert json.loads(said["image_size"]) == [8, 8]
    assert json.loads(said["versions"]) == {"torch": "2"}
    assert {key: said[key] for key in ("fingerprint", "study", "data", "temperature", "networks", "channels")} == {
        "fingerprint": "0123abcd", "study": "pets", "data": "some images", "temperature": "1.0", "networks": "1",
        "channels": "1",
    }  # fmt: skip
    assert "trial" not in said
    content = (tmp_path / "model.onnx").read_bytes()
    for folder in (Path(onnx_export.__file__).parents[2], Path(torch.__file__).parents[1]):
        assert str(folder).encode() not in content

    monkeypatch.chdir(tmp_path)
    Image.fromarray(digits[5, 0].numpy()).save("photo.png")
    text = model_card(bundle.meta, {}, files=("model.onnx",)).replace("photo.jpg", "photo.png")
    by_onnx = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "torch" not in by_onnx
    exec(by_onnx, {})
    label = int(bundle.probabilities(digits[5:6]).argmax())
    assert capsys.readouterr().out == f"{bundle.meta.classes[label]}\n"


# A failed export is one line and leaves no file


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(BundleError, match=r"ONNX needs onnxscript; install hpo-vision\[onnx\]"):
        check_onnx()


class Waiting(nn.Module):
    """A network whose way depends on its input, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        logits: Tensor = self.linear(flat if flat.sum() > 0 else -flat)
        return logits


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TOLERANCE": -1.0}, r"model\.onnx: its probabilities differ from torch's by up to \S+, more than -1"),
        (
            {"onnx_probabilities": lambda _: lambda images: torch.full((len(images), 10), torch.nan)},
            "by up to nan, more",
        ),
        ({"MAX_BYTES": 100}, r"an ONNX file is limited to 2 GB, and the weights take 0\.0 GB; leave --onnx out"),
        ({"a network": Waiting()}, r"torch cannot export this network to ONNX \(.+\); leave --onnx out"),
    ],
    ids=["differs", "not a number", "too large", "a way that depends on the pixels"],
)
def test_a_failure_is_one_line_and_leaves_no_file(
    tmp_path: Path, digits: Tensor, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    bundle = make(digits, views="none", **{"model.widths": (8,), "model.blocks": (1,)})
    for name, value in changed.items():
        if name != "a network":
            monkeypatch.setattr(onnx_export, name, value)
    bundle = replace(bundle, models=(changed.get("a network", bundle.models[0]),))
    with pytest.raises(BundleError, match=message) as raised:
        export_onnx(bundle, tmp_path / "model.onnx", digits)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
