"""Networks of the user's own: their import, their arguments, and everything that a training does with a network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from core.config import ModelConfig, TrainConfig
from core.data import Splits
from core.errors import ConfigError, UserError
from core.imports import sources
from core.loop import Execution, train
from core.models import build_model, check_kwargs
from tests.core.recorded import RecordedGraph
from tests.core.trainings import CPU, same

OwnModule = Callable[[str], str]

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, in_channels, num_classes, width=8):
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd")
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))
"""


def build(name: str, **kwargs: Any) -> torch.nn.Module:
    config = ModelConfig(name=name, kwargs=kwargs)
    return build_model(config, num_classes=10, in_channels=1, image_size=(8, 8))


def test_the_network_gets_channels_classes_and_its_arguments(own_module: OwnModule) -> None:
    model = build(f"{own_module(NET)}:Net", width=12)
    assert {name: tuple(tensor.shape) for name, tensor in model.named_parameters()} == {
        "conv.weight": (12, 1, 3, 3), "conv.bias": (12,), "norm.weight": (12,), "norm.bias": (12,),
        "fc.weight": (10, 12), "fc.bias": (10,),
    }  # fmt: skip
    assert model.training
    assert model.norm.running_mean.eq(0).all()  # the two passes of the check have left no trace


def test_a_function_may_ask_for_the_images_size_and_gets_lists_as_lists(own_module: OwnModule) -> None:
    name = own_module(
        """
from torch import nn

def net(in_channels, num_classes, image_size, widths):
    assert isinstance(widths, list)
    height, width = image_size
    units = [in_channels * height * width, *widths, num_classes]
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in zip(units, units[1:])))
"""
    )
    model = build(f"{name}:net", widths=[6, 5])
    assert [layer.weight.shape for layer in list(model.children())[1:]] == [(6, 64), (5, 6), (10, 5)]


def test_layers_without_shapes_get_them_from_the_images(own_module: OwnModule) -> None:
    name = own_module(
        """
from torch import nn

def net(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
"""
    )
    torch.manual_seed(3)
    one = build(f"{name}:net")
    torch.manual_seed(3)
    assert torch.equal(one[1].weight, build(f"{name}:net")[1].weight)
    assert one[1].weight.shape == (10, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}x:Net", r"no module own_code_\d+x in .*, on PYTHONPATH or among installed packages; did you mean own_code"),
        ("{}.nets:Net", r"there is no module own_code_\d+.nets"),
        ("{}:Nett", r"own_code_\d+ \(.*\.py\) has no Nett; did you mean Net\?"),
        ("{}:WIDTH", "is of type int, which cannot be called"),
        ("os:system", "os:system is part of Python or torch"),
        ("torch.hub:load", "torch.hub:load is part of Python or torch"),
    ],
)
def test_a_name_that_is_no_callable_is_refused(own_module: OwnModule, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name.format(own_module(f"{NET}\nWIDTH = 3\n")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = x / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(.*own_code_\d+\.py:2\)"),
        ("x = (\n", r"cannot be imported: SyntaxError: .* \(.*own_code_\d+\.py:1\)"),
        ("import no_such_package\n", r"imported: No module named 'no_such_package' \(.*own_code_\d+\.py:1\)"),
        ("import sys\nsys.exit(1)\n", r"belongs under if __name__ == '__main__': \(.*own_code_\d+\.py:2\)"),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(own_module: OwnModule, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(f"{own_module(source)}:Net")


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        (NET, {"widht": 8}, r"model.kwargs: own_code_\d+:Net has no argument widht; did you mean width\?"),
        (NET, {"size": 8}, "has no argument size; it takes in_channels, num_classes, width"),
        (NET, {"width": 7}, r"model.name: .*:Net fails: ValueError: width 7 is odd \(.*own_code_\d+\.py:9\)"),
        (NET.replace("=8", ""), {}, "Net needs width, which has no default"),
        (NET.replace("num_classes", "classes"), {}, "has no argument num_classes, and is called with in_channels=…"),
        (NET.replace("(width, num_classes", "(width, 7"), {}, r"returns \(2, 7\) float32 .* 10 classes are \(2, 10\)"),
        (NET.replace("return self.fc", "return images, self.fc"), {}, "returns a tuple for images, not a tensor"),
        (NET.replace(".mean((2, 3))", ".view(2, -1)"), {}, r"RuntimeError: view size .*own_code_\d+\.py:\d+"),
        (NET.replace("return self.fc(", "return self.cf("), {}, "AttributeError: .*no attribute 'cf'"),
        ("def Net(in_channels, num_classes): return None\n", {}, "returns None, not a torch.nn.Module"),
        ("import torch.nn\ndef Net(**arguments): return torch.nn.Flatten()\n", {}, r"returns \(2, 64\)"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_trained_is_an_invalid_configuration(
    own_module: OwnModule, source: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(f"{own_module(source)}:Net", **kwargs)


def test_a_network_without_trainable_parameters_is_refused(own_module: OwnModule) -> None:
    source = f"{NET}\ndef frozen(**arguments):\n    return Net(**arguments).requires_grad_(False)\n"
    with pytest.raises(ConfigError, match="has no parameter that can be trained"):
        build(f"{own_module(source)}:frozen")


def test_a_lack_of_memory_stays_one(own_module: OwnModule) -> None:
    source = "import torch\ndef net(in_channels, num_classes): raise torch.OutOfMemoryError('CUDA out of memory')\n"
    with pytest.raises(torch.OutOfMemoryError):
        build(f"{own_module(source)}:net")


def test_arguments_are_checked_without_building_the_network(own_module: OwnModule) -> None:
    name = f"{own_module(NET)}:Net"
    check_kwargs(name, ["width"])
    with pytest.raises(ConfigError, match="did you mean width"):
        check_kwargs(name, ["witdh"])


def test_its_prints_are_no_output_and_its_seeding_changes_no_other_number(
    own_module: OwnModule, capsys: pytest.CaptureFixture[str]
) -> None:
    name = own_module(f"import torch\ntorch.manual_seed(0)\nprint('loaded'){NET}")
    torch.manual_seed(5)
    first = build(f"{name}:Net").conv.weight  # imports the module
    torch.manual_seed(5)
    assert torch.equal(build(f"{name}:Net").conv.weight, first)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loaded\n"


def test_weights_drawn_with_numpy_or_python_follow_torchs_seed(own_module: OwnModule) -> None:
    source = NET.replace("from torch import nn", "import random\nimport numpy as np\nfrom torch import nn").replace(
        "        self.fc = nn.Linear(width, num_classes)\n",
        "        self.fc = nn.Linear(width, num_classes)\n"
        "        nn.init.constant_(self.fc.weight, np.random.rand())\n"
        "        nn.init.constant_(self.fc.bias, random.random())\n",
    )
    name = f"{own_module(source)}:Net"

    def drawn(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = build(name)
        return model.fc.weight[0, 0].item(), model.fc.bias[0].item()

    outside = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert drawn(1) == drawn(1)
    assert drawn(1)[0] != drawn(2)[0]
    assert drawn(1)[1] != drawn(2)[1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == outside  # type: ignore[union-attr]


# Training


TRAININGS: dict[str, dict[str, Any]] = {
    "ema": {"averaging.name": "ema", "averaging.half_life_fraction": 0.1},
    "swa, which recalibrates batch norm": {"averaging.name": "swa", "averaging.swa_start_fraction": 0.25},
    "muon": {"optim.name": "muon"},
    "sgd, the head first": {"optim.name": "sgd", "optim.head_only_fraction": 0.4, "optim.backbone_lr_scale": 0.1},
    "growing images": {"augment.start_size_fraction": 0.5},
    "larger inputs": {"model.input_size": 12},
}


@pytest.fixture
def own(own_module: OwnModule, tiny: TrainConfig) -> TrainConfig:
    """Three epochs of a network of the user's own."""
    return tiny.override({"epochs": 3, "model.name": f"{own_module(NET)}:Net", "model.kwargs.width": 12})


@pytest.mark.parametrize("values", TRAININGS.values(), ids=TRAININGS)
def test_a_resumed_training_is_bitwise_the_same(
    own: TrainConfig, digits: Splits, tmp_path: Any, values: dict[str, Any]
) -> None:
    config, checkpoint = own.override(values), tmp_path / "checkpoint"
    whole = train(config, digits, device=CPU)
    assert whole.history[-1].train_loss < whole.history[0].train_loss

    def stop(epoch: Any) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, digits, device=CPU, checkpoint_to=checkpoint, on_epoch_end=stop)
    assert same(train(config, digits, device=CPU, resume_from=checkpoint), whole)


def test_a_recorded_step_trains_the_same_network(own: TrainConfig, digits: Splits) -> None:
    long = own.override({"epochs": 12, "optim.name": "sgd"})
    recorded = train(long, digits, device=CPU, execution=Execution(capture=RecordedGraph))
    launched = train(long, digits, device=CPU)
    torch.testing.assert_close(recorded.model.state_dict(), launched.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_step_that_cannot_be_recorded_is_launched_with_a_warning(
    own_module: OwnModule, tiny: TrainConfig, digits: Splits, caplog: pytest.LogCaptureFixture
) -> None:
    reading = NET.replace("        return", "        self.largest = images.max().item()\n        return")
    config = tiny.override({"epochs": 12, "model.name": f"{own_module(reading)}:Net"})
    train(config, digits, device=CPU, execution=Execution(capture=RecordedGraph))
    [line] = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert f"model.name {config.model.name}: its step cannot be a CUDA graph, since it" in line


@pytest.mark.parametrize("values", [{"optim.name": "muon"}, {"optim.head_only_fraction": 0.5}])
def test_an_option_of_the_classifier_is_refused_without_one(
    own_module: OwnModule, tiny: TrainConfig, digits: Splits, values: dict[str, Any]
) -> None:
    config = tiny.override({"model.name": f"{own_module(NET.replace('self.fc', 'self.last'))}:Net", **values})
    with pytest.raises(ConfigError, match=r"need a separate classifier, .*; in a network of your own, name it fc"):
        train(config, digits, device=CPU)


# Sources


def test_the_sources_are_the_files_from_which_names_are_taken(own_module: OwnModule, tmp_path: Any) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "blocks.py").write_text("class Block: ...\n")
    (tmp_path / "parts" / "unused.py").write_text("")
    name = own_module(f"import numpy\nfrom torch import nn\nfrom parts.blocks import Block\n{NET}")
    folder, files = sources(f"{name}:Net", "model.name")
    assert folder == str(tmp_path.resolve())
    assert list(files) == [f"{name}.py", "parts/blocks.py"]


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (NET + "# a comment\n\n", False),
        (NET.replace("=8", "=9"), True),
        (NET.replace("class Net", "  \nclass Net"), False),
    ],
)
def test_blank_lines_and_comments_do_not_count(own_module: OwnModule, change: str, counts: bool) -> None:
    [before], [after] = (sources(f"{own_module(text)}:Net", "model.name")[1].values() for text in (NET, change))
    assert (before != after) == counts
