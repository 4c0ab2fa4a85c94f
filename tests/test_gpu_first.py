"""`tests/benchmarks/gpu_first.py` on the CPU, and the predictions beside which its times are read."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "tests" / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_first.py"

NEEDED = ("torch", "timm", "numpy", "scipy", "scikit-learn", "pillow", "pydantic")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code that can import the benchmarks."""
    path = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
    command = [sys.executable, "-c", path + textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_every_configuration_trains_and_every_line_is_in_the_file(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("takes minutes on a GPU")
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(SCRIPT), "faults", "speed", "--out", str(out), "--minutes", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    assert out.read_text(encoding="utf-8") == done.stdout
    faults, speed = done.stdout.split("\n## ")[1:]
    verdicts = {cells(line)[0]: cells(line)[1] for line in faults.splitlines()[4:]}
    assert len(verdicts) > 20
    assert set(verdicts.values()) == {"ok"}, faults
    timed, bounds, loader = (cells(line) for line in speed.splitlines()[4:])
    assert all(float(cell.replace(",", "").rstrip("%")) > 0 for cell in timed[1:12])
    assert [bounds[0], loader[0]] == ["peak and bandwidth", "beside a DataLoader"]
    assert "FAILED" not in done.stdout


def test_a_bare_gpu_image_has_all_libraries(tmp_path: Path) -> None:
    """Runs a row of each part where only those libraries and their requirements can be imported."""
    code = f"""
        import re, runpy
        from importlib import metadata

        def requirements(names):
            found, left = set(), list(names)
            while left:
                name = left.pop().lower().replace("_", "-")
                if name not in found:
                    try:
                        needed = metadata.requires(name) or []
                    except metadata.PackageNotFoundError:  # of another system
                        continue
                    found.add(name)
                    left += [re.match(r"[\\w.-]+", each).group() for each in needed if "extra ==" not in each]
            return found

        bare = requirements({NEEDED!r})
        for module, owners in metadata.packages_distributions().items():
            if module != "core" and not bare.intersection(owner.lower().replace("_", "-") for owner in owners):
                sys.modules[module] = None
        sys.modules["hpo"] = None
        assert all(sys.modules[name] is None for name in ("optuna", "rich", "typer", "psutil", "pytest"))
        script = runpy.run_path({str(SCRIPT)!r})
        for part in script["HEADERS"]:
            if part != "compiled":
                assert script["run_part"](part, len(script["rows"](part)) - 1) == 0
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [cells(line)[0] for line in done.stdout.splitlines()] == ["memory of 3 trainings", "beside a DataLoader"]


def test_rows_survive_a_process_that_hangs_or_dies(tmp_path: Path) -> None:
    """The report asks for the rest in new processes, and the killed one's rows are in the file."""
    code = """
        import json
        from pathlib import Path
        import gpu_first

        dies = "import os; print('| a | ok |', flush=True); os._exit(7)"
        hangs = "import time; print('| c | ok |', flush=True); time.sleep(60)"
        left = [dies, hangs]
        asked = []
        run = gpu_first.run

        def other(report, command, seconds):
            asked.append(command[-1])
            return run(report, ["-c", left.pop(0)], seconds)

        gpu_first.run, gpu_first.rows = other, lambda part: dict.fromkeys("abcd")
        gpu_first.report_part(gpu_first.Report(Path("out.md")), "faults", 3)
        print(json.dumps(asked))
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('["0", "2"]\n')
    rows = (tmp_path / "out.md").read_text(encoding="utf-8").splitlines()[5:]
    assert rows == [
        "| a | ok |",
        "| b | FAILED the process ended with status 7 |",
        "| c | ok |",
        "| out of time, 1 of 4 rows left out |",
    ]


def test_a_process_that_cannot_train_after_a_failure_is_replaced(tmp_path: Path) -> None:
    code = """
        import gpu_first

        def train(*args, **kwargs):
            raise RuntimeError("CUDA error: operation failed\\nmore | text")

        gpu_first.train = train
        assert gpu_first.run_part("faults", 3) == gpu_first.RESTART
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = done.stdout.splitlines()
    assert "plain: RuntimeError: CUDA error: operation failed; streamed: " in row
    assert "; afterwards the process cannot train: RuntimeError: CUDA error" in row


def test_a_failed_capture_on_purpose_may_cost_the_process(tmp_path: Path) -> None:
    code = """
        import gpu_first
        from core.errors import GraphError

        def train(*args, **kwargs):
            raise GraphError("recording failed")

        gpu_first.train = train
        gpu_first.rows = lambda part: {"waits": lambda: gpu_first.uncapturable(print)}
        assert gpu_first.run_part("faults", 0) == gpu_first.RESTART
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout)[:2] == ["waits", "ok"]
    assert "GraphError: recording failed" in done.stdout


def test_a_warning_is_in_the_row_of_its_training(tmp_path: Path) -> None:
    """Such as that a step could not be captured, since the training then succeeds without graphs."""
    code = """
        import logging
        import gpu_first

        def warns():
            logging.getLogger("core.loop.graphs").warning("its step cannot be a CUDA graph")
            return 2.0

        print(gpu_first.compared({"plain": lambda: 2.0, "graphs": warns}))
        print(gpu_first.compared({"plain": lambda: 2.0, "graphs": lambda: 2.1}))
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    warned, differs = map(ast.literal_eval, done.stdout.splitlines())
    assert [warned[0], warned[-1]] == ["WARNS", "graphs: its step cannot be a CUDA graph"]
    assert [differs[0], differs[-1]] == ["DIFFERS", ""]


def test_the_predictions_in_the_readme_are_those_of_the_roofline(tmp_path: Path) -> None:
    """Computed anew: the network's exactly, augmentation within a quarter, since its kernels change more often."""
    done = run("import json, roofline; print(json.dumps(roofline.predictions()))", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines()
    shown = {cells(line)[0]: cells(line)[1::2] for line in lines if line.startswith("| ")}
    for name, *values in json.loads(done.stdout):
        tolerance = 0.25 if name in ("augmentation, ms", "images/s") else 1e-6
        for value, printed in zip(values, shown[name], strict=True):
            numbers = [float(text.replace(",", "")) for text in (value, printed)]
            assert numbers[1] == pytest.approx(numbers[0], rel=tolerance), name


def test_a_kernel_takes_the_longest_of_its_three_times(tmp_path: Path) -> None:
    """Of one convolution and its ReLU on a device with round numbers."""
    code = """
        import torch, roofline
        from roofline import Device, Kernels

        device = Device(flops=1e9, bytes_per_s=1e9, kernel_s=1e-7, share_of_peak=0.5)
        images = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16, device="meta")
        weight = torch.zeros(16, 4, 3, 3, dtype=torch.bfloat16, device="meta")
        with Kernels() as kernels:
            torch.relu(torch.nn.functional.conv2d(images, weight, padding=1)).view(2, -1)
        convolution, relu = kernels.found  # a view is none
        assert convolution.flops == 2 * 2 * 64 * 16 * 4 * 9
        assert convolution.bytes == 2 * (images.numel() + weight.numel() + 2 * 16 * 64)
        assert convolution.seconds(device) == convolution.flops / 5e8
        assert relu.seconds(device) == 2 * 2 * (2 * 16 * 64) / 1e9
        assert relu.seconds(device, times=1e-9) == 1e-7
    """
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
