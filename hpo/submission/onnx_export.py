"""A submission model as one ONNX file, for use without torch.

The file contains everything between resized uint8 images and probabilities: the normalisation, the views, all networks,
their average and the temperature. It is kept only if onnxruntime reproduces torch's probabilities on real images.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.calibration import scaled
from core.runtime import scale_and_shift
from core.tta import EVALUATION_BATCH, VIEWS, average, look
from hpo.errors import BundleError
from hpo.submission.bundle import Bundle, LoadedBundle

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "probabilities"

TOLERANCE = 1e-4
"""Largest accepted difference of a probability. 32-bit sums in another order mostly differ by less than 1e-6."""

MAX_BYTES = (1 << 31) - (1 << 25)  # a protobuf's limit of 2 GiB, less the graph

CPU = torch.device("cpu")


def check_onnx() -> None:
    """Raise BundleError if a package of the export is missing, before hours of training."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BundleError(f"ONNX needs {' and '.join(missing)}; install hpo-vision[onnx]")


def export_onnx(bundle: LoadedBundle, path: Path, check: Tensor) -> float:
    """Export the model as ONNX: `images` (N, C, H, W) uint8 to `probabilities` (N, K) float32, with any N.

    Args:
        check: Images (M, C, H, W) uint8 for the check, M at least 1.

    Returns:
        The largest difference of a probability between onnxruntime and torch, both on the CPU in 32-bit floats.

    Raises:
        BundleError: A package is missing, the network cannot be exported, or the two differ by more than 1e-4.
    """
    check_onnx()
    bundle = _on_cpu(bundle)
    whole = _Whole(bundle).eval()
    size = sum(weight.nbytes for weight in whole.state_dict().values())
    if size > MAX_BYTES:
        raise BundleError(
            f"an ONNX file is limited to 2 GB, and the weights take {size / 1e9:.1f} GB; leave --onnx out"
        )
    program = _export(whole, check[:1].cpu().expand(2, -1, -1, -1))  # a batch of one would be exported as a constant
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # positions in this machine's source files
    program.model.metadata_props.update(_metadata(bundle.meta))
    try:
        program.save(str(path), external_data=False)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        return _checked(bundle, path, check)
    except BundleError:
        path.unlink()
        raise


def onnx_probabilities(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, C, H, W) uint8 to probabilities (N, K), run by onnxruntime on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


class _Whole(nn.Module):
    """`LoadedBundle.probabilities` as one network."""

    def __init__(self, bundle: LoadedBundle) -> None:
        super().__init__()
        self.networks = nn.ModuleList(bundle.models)
        self.parts = bundle.meta.networks
        self.temperature = bundle.meta.temperature
        for place, by in enumerate(bundle.meta.normalizations):
            scale, shift = scale_and_shift(by.mean, by.std, CPU)
            self.register_buffer(f"scale{place}", scale.clone())
            self.register_buffer(f"shift{place}", shift.clone())

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float()
        looks = {  # (V·N, C, H, W)
            views: torch.cat([look(pixels, view) for view in VIEWS[views]])
            for views in dict.fromkeys(part.views for part in self.parts)
        }
        of_each = []
        for place, (network, part) in enumerate(zip(self.networks, self.parts, strict=True)):
            scale, shift = self.get_buffer(f"scale{place}"), self.get_buffer(f"shift{place}")
            logits = network(looks[part.views] * scale + shift)  # (V·N, K)
            of_each.append(average(logits.unflatten(0, (len(VIEWS[part.views]), -1))))
        weights = [part.weight for part in self.parts]
        return scaled(average(torch.stack(of_each), weights), self.temperature).softmax(1)


def _on_cpu(bundle: LoadedBundle) -> LoadedBundle:
    """A copy on the CPU, in 32-bit floats."""
    models = tuple(copy.deepcopy(model).to(CPU).eval() for model in bundle.models)
    meta, exact = bundle.meta, {"precision.autocast": "off"}
    parts = tuple(replace(part, config=part.config.override(exact)) for part in meta.parts)
    return LoadedBundle(models, replace(meta, config=meta.config.override(exact), parts=parts), CPU)


def _export(whole: nn.Module, example: Tensor) -> Any:
    try:
        return torch.onnx.export(
            whole,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise BundleError(f"torch cannot export this network to ONNX ({reason}); leave --onnx out") from error


def _metadata(meta: Bundle) -> dict[str, str]:
    """Metadata for users of the file alone, as JSON or plain text."""
    facts = {
        "classes": meta.classes,
        "channels": meta.in_channels,
        "image_size": meta.image_size,
        "tta_views": meta.views,
        "networks": len(meta.weights),
        **({"weights": [part.weight for part in meta.parts]} if meta.parts else {}),
        "temperature": meta.temperature,
        "versions": meta.versions,
    }
    origin = {"study": meta.study, "trial": meta.trial, "data": meta.data_name, "fingerprint": meta.fingerprint}
    return {
        **{name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()},
        **{name: str(word) for name, word in origin.items() if word is not None},
    }


def _checked(bundle: LoadedBundle, path: Path, check: Tensor) -> float:
    predict, batches = onnx_probabilities(path), torch.split(check.cpu(), EVALUATION_BATCH)
    differences = [(predict(images) - bundle.probabilities(images)).abs().max() for images in batches]
    largest = float(torch.stack(differences).max())
    if not largest <= TOLERANCE:  # also if it is NaN
        raise BundleError(
            f"{path.name}: its probabilities differ from torch's by up to {largest:.2g}, more than {TOLERANCE:g}; the "
            "file is not kept"
        )
    return largest
