"""Views and their average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from core.config import ModelConfig
from core.tta import VIEWS, View, average, evaluation_batch, look, predict_by_views, predict_logits


def _images(n: int = 7, side: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _prepare(images: Tensor) -> Tensor:
    return images.float() / 255


class Net(nn.Sequential):
    """A classifier of 8×8 images that is not mirror-symmetric, with layers that behave differently in training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize(("name", "number"), [("none", 1), ("flip", 2), ("shift", 5), ("flip_shift", 6)])
def test_each_set_has_distinct_views_including_the_image(name: str, number: int) -> None:
    images = _images()
    seen = [look(images, view) for view in VIEWS[name]]
    assert torch.equal(seen[0], images)
    assert len({view.numpy().tobytes() for view in seen}) == len(seen) == number


def test_sets_of_views_are_symmetric() -> None:
    for views in VIEWS.values():
        assert sum(view.down for view in views) == sum(view.right for view in views) == 0


@pytest.mark.parametrize("views", ["flip", "flip_shift"])
def test_each_view_has_its_mirror_image(views: str) -> None:
    shown = {look(_images(), view).numpy().tobytes() for view in VIEWS[views]}
    assert {look(_images(), view).flip(-1).contiguous().numpy().tobytes() for view in VIEWS[views]} == shown


def test_a_step_moves_the_image_with_reflection() -> None:
    image = torch.arange(4, dtype=torch.uint8).expand(1, 1, 4, 4)
    assert look(image, View(right=1))[0, 0, 0].tolist() == [1, 0, 1, 2]
    assert look(image, View(right=-1))[0, 0, 0].tolist() == [1, 2, 3, 2]
    assert torch.equal(look(image.mT, View(down=1)), look(image, View(right=1)).mT)


@pytest.mark.parametrize(("side", "pixels"), [(8, 1), (32, 1), (96, 3), (224, 7)])
def test_a_step_is_a_32nd_of_the_side_and_at_least_a_pixel(side: int, pixels: int) -> None:
    images = _images(1, side)
    assert torch.equal(look(images, View(right=1))[..., pixels:], images[..., :-pixels])


def test_a_view_keeps_shape_and_type() -> None:
    images = _images()[..., :5]  # not square
    for view in VIEWS["flip_shift"]:
        assert look(images, view).shape == images.shape
        assert look(images, view).dtype == torch.uint8


def test_one_view_returns_the_logits_themselves() -> None:
    model, images = Net().eval(), _images()
    with torch.no_grad():
        torch.testing.assert_close(predict_logits(model, images, prepare=_prepare), model(_prepare(images)))


@pytest.mark.parametrize("views", ["flip", "shift", "flip_shift"])
def test_several_views_return_the_log_of_the_mean_of_their_probabilities(views: str) -> None:
    model, images = Net().eval(), _images()
    with torch.no_grad():
        each = [model(_prepare(look(images, view))).softmax(1) for view in VIEWS[views]]
    got = predict_logits(model, images, prepare=_prepare, views=views)
    torch.testing.assert_close(got.exp(), torch.stack(each).mean(0))
    torch.testing.assert_close(got.exp().sum(1), torch.ones(len(images)))


def test_agreeing_views_do_not_change_probabilities() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average(logits.expand(3, 5, 4)).exp(), logits.softmax(1))


def test_the_average_is_finite_for_zero_probabilities() -> None:
    logits = torch.tensor([[0.0, 1e4]]).expand(2, 1, 2)
    assert average(logits).isfinite().all()


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("batch_size", [1, 4, 13, 512])
def test_the_batch_size_counts_every_view(views: str, batch_size: int) -> None:
    model, images = Net(), _images()
    torch.testing.assert_close(
        predict_logits(model, images, prepare=_prepare, views=views, batch_size=batch_size),
        predict_logits(model, images, prepare=_prepare, views=views),
    )
    number = len(VIEWS[views])
    assert max(model.seen[:-1]) <= max(batch_size, number)


@pytest.mark.parametrize(
    ("image_size", "input_size", "device", "images"),
    [
        ((8, 8), None, "cpu", 512),
        ((96, 96), None, "cpu", 56),
        ((32, 32), 128, "cpu", 32),
        ((32, 64), 128, "cpu", 16),
        ((1024, 1024), 64, "cpu", 128),
        ((1024, 1024), None, "cpu", 8),
        ((1024, 1024), None, "cuda", 512),
    ],
)
def test_a_cpu_evaluates_as_many_images_as_their_size_in_the_network_allows(
    image_size: tuple[int, int], input_size: int | None, device: str, images: int
) -> None:
    assert evaluation_batch(ModelConfig(input_size=input_size), image_size, torch.device(device)) == images


def test_several_views_are_one_batch() -> None:
    model = Net()
    predict_logits(model, _images(), prepare=_prepare, views="flip_shift")
    assert model.seen == [42]


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_in_evaluation_mode_and_restores_it(training: bool) -> None:
    model = Net().train(training)
    model[0].eval()  # a frozen batch norm in a model that trains
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (predict_logits(model, _images(), prepare=_prepare) for _ in range(2))
    assert torch.equal(first, second), "dropout was at work"
    assert model.training == model[2].training == training
    assert not model[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_modes_are_restored_on_errors() -> None:
    model = Net()
    model.append(nn.Linear(5, 5))  # does not fit four logits
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        predict_logits(model, _images(), prepare=_prepare)
    assert all(module.training for module in model.modules())


def test_the_result_is_float32_and_usable_with_autograd() -> None:
    got = predict_logits(Net(), _images(), prepare=_prepare, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert not got.is_inference()


def test_the_model_runs_in_the_given_context() -> None:
    entered = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        entered.append(True)
        yield

    predict_logits(Net(), _images(), prepare=_prepare, batch_size=4, autocast=context)
    assert len(entered) == 2


def test_each_view_passes_the_network_once_for_all_choices() -> None:
    model, images = Net(), _images()
    names = ("none", "flip", "flip_shift")
    found = predict_by_views(model, images, prepare=_prepare, names=names)
    assert model.seen == [42], "the six views of flip_shift include the others"
    for name in names:
        torch.testing.assert_close(found[name], predict_logits(model, images, prepare=_prepare, views=name))
