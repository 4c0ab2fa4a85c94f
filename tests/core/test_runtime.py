"""Free memory of a device, within the limits of control groups and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from core.errors import ConfigError
from core.runtime import (
    _free_host_memory,
    check_autocast,
    compute_dtype,
    free_memory,
    noticed_waits,
    tuned_convolutions,
)

CPU = torch.device("cpu")
GIB = 2**30
UNLIMITED_V1 = 9223372036854771712  # written by version 1 without a limit

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Write the control group files of a machine with 8 GiB available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))

    def write(cgroup: str = "", **files: str | int) -> Path:
        memory = {"proc/meminfo": f"MemTotal: {2**24} kB\nMemFree: 5 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"}
        for name, text in (memory | {"proc/self/cgroup": cgroup} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text), encoding="ascii")
        return tmp_path

    return write


def group_v2(path: str, limit: str | int, used: int, cache: int = 0) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cache}\nactive_file 5",
    }


def group_v1(path: str, limit: int, used: int, cache: int = 0) -> dict[str, str | int]:
    folder = f"sys/fs/cgroup/memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}",
    }


def test_without_control_groups_all_available_memory_is_free(machine: Machine) -> None:
    assert _free_host_memory(machine()) == 8 * GIB


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/job", group_v2("/job", 4 * GIB, GIB), 3 * GIB),
        ("0::/job", group_v2("/job", 4 * GIB, 2 * GIB, cache=GIB), 3 * GIB),
        ("0::/job", group_v2("/job", "max", GIB), 8 * GIB),
        ("0::/job", group_v2("/job", 64 * GIB, GIB), 8 * GIB),
        ("0::/all/job", group_v2("/all/job", "max", GIB) | group_v2("/all", 3 * GIB, GIB), 2 * GIB),
        ("0::/job", group_v2("/job", GIB, 2 * GIB), 0),
        ("0::/", group_v2("", 2 * GIB, GIB), GIB),
        ("9:cpu:/x\n4:memory:/job\n0::/", group_v1("/job", 4 * GIB, GIB), 3 * GIB),
        ("4:cpu,memory:/job", group_v1("/job", 4 * GIB, 2 * GIB, cache=GIB), 3 * GIB),
        ("4:memory:/job", group_v1("/job", UNLIMITED_V1, GIB), 8 * GIB),
        ("4:memory:/all/job", group_v1("/all/job", UNLIMITED_V1, GIB) | group_v1("/all", 3 * GIB, GIB), 2 * GIB),
        ("4:memory:/docker/1f", group_v1("", 2 * GIB, GIB), GIB),
        ("0::/../outside", group_v2("", 2 * GIB, GIB), GIB),
    ],
    ids=[
        "v2", "v2 counts cache as free", "v2 without a limit", "v2 limited above the machine", "v2 limited further up",
        "v2 over its limit", "v2 at the root", "v1", "v1 counts cache as free", "v1 without a limit",
        "v1 limited further up", "v1 in a container with the path of its host",
        "v2 in a container with the path of its host",
    ],
)  # fmt: skip
def test_a_control_group_may_limit_free_memory(
    machine: Machine, cgroup: str, files: dict[str, str | int], free: int
) -> None:
    assert _free_host_memory(machine(cgroup, **files)) == free


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def _empty_cache(self) -> None:
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("name", ["cuda", "cuda:0"])
    def test_unused_memory_of_the_allocator_counts_as_free(self, name: str) -> None:
        device = torch.device(name)
        before = free_memory(device)
        held = torch.empty(2**28, dtype=torch.uint8, device=device)
        assert free_memory(device) <= before - 2**28 + 2**24
        del held  # stays reserved by the allocator
        assert free_memory(device) == pytest.approx(before, abs=2**24)

    def test_a_process_is_limited_to_its_fraction_of_the_device(self) -> None:
        device, total = torch.device("cuda:0"), torch.cuda.mem_get_info(0)[1]
        before = torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(0.05, device)
        try:
            free = free_memory(device)
            assert free <= 0.05 * total
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(free + 2**22, dtype=torch.uint8, device=device)
        finally:
            torch.cuda.set_per_process_memory_fraction(before, device)


def test_waits_of_the_host_are_noticed_and_other_warnings_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> list[str]:
        with noticed_waits(torch.device("cuda")) as places:
            for text in ("called a synchronizing CUDA operation (Triggered internally", "another"):
                warnings.warn(text, stacklevel=1)
            assert modes[-1] == "warn"
        return places

    with pytest.warns(UserWarning, match="another") as kept:
        places = wait()
    assert [place.partition(":")[0] for place in places] == ["test_runtime.py"]
    assert len(kept) == 1
    assert modes[-1] == "default"
    with noticed_waits(CPU) as places:
        assert places == []


@pytest.mark.parametrize(
    ("mode", "capability", "dtype"),
    [
        ("auto", (7, 5), torch.float32),
        ("auto", (8, 0), torch.bfloat16),
        ("auto", (12, 1), torch.bfloat16),
        ("off", (9, 0), torch.float32),
        ("bf16", (9, 0), torch.bfloat16),
    ],
)
def test_automatic_bfloat16_needs_a_gpu_that_computes_in_it(
    mode: str, capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype(mode, torch.device("cuda:0")) == dtype
    check_autocast(mode, torch.device("cuda:0"))
    assert compute_dtype("auto", CPU) == torch.float32


def test_emulated_bfloat16_is_an_error_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    text = r"^precision\.autocast: bf16 needs .* 8\.0 or higher, and Tesla T4 has 7\.5; set it to auto$"
    with pytest.raises(ConfigError, match=text):
        check_autocast("bf16", torch.device("cuda:0"))
    check_autocast("bf16", CPU)


def test_cudnns_choice_of_algorithms_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        with tuned_convolutions(CPU):
            assert torch.backends.cudnn.benchmark is before
        with pytest.raises(KeyError), tuned_convolutions(torch.device("cuda")):
            assert torch.backends.cudnn.benchmark
            raise KeyError
        assert torch.backends.cudnn.benchmark is before


FAULTS = """
import resource, torch
from core.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB, or 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library is Linux's")
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_unless_the_user_has_settings_of_their_own(own: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if own:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=environment, check=True, capture_output=True, text=True)
    before, after = map(int, ran.stdout.split())
    assert (after < before / 10) is not own
