"""Commands that need torch, whole, against the imports of what they need: at most 1.3 times their processor time.

A study of two short trainings of a small network on the digits. Each command runs as a process of its own and has
little to do, so that its time is that of its start. The other side imports the same modules in a process of its own:
all of this project and of its dependencies that the command had loaded at its end.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import finish, machine, parser, quarters, table

LIMIT = 1.3
COMMANDS = {
    "report": ["report", "digits"],
    "refit": ["refit", "0", "--no-confirm"],
    "predict": ["predict", "studies/digits/refit/00000", "images.npz"],
}
SETTINGS = ("epochs=2", "model.width=0.5")
LIST_MODULES = """
import json, sys
from pathlib import Path
from hpo.cli import main
sys.argv[0] = "hpo"
try:
    main()
finally:
    own = {module.split(".")[0] for module in sys.modules} - sys.stdlib_module_names - {"__main__"}
    Path("modules.json").write_text(json.dumps([name for name in sys.modules if name.split(".")[0] in own]))
"""
IMPORT = """
import importlib, json
from pathlib import Path
for name in json.loads(Path("modules.json").read_text()):
    try:
        importlib.import_module(name)
    except ImportError:  # made by another module when it runs, not a file
        pass
"""


def processor_s(*arguments: str) -> float:
    """Processor time of a Python process; CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    given = parser(__doc__).parse_args()
    described = machine()
    found: dict[str, dict[str, list[float]]] = {name: {"command": [], "imports": []} for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ |= {"HPO_STUDIES": "studies", "HPO_CACHE": "cache", "OMP_NUM_THREADS": "1"}
        pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
        np.savez("images.npz", images=pixels)
        settings = [word for text in SETTINGS for word in ("--set", text)]
        processor_s("-m", "hpo.cli", "run", "digits", "--trials", "2", "--no-recipes", *settings)
        processor_s("-m", "hpo.cli", *COMMANDS["refit"])
        for name, words in COMMANDS.items():
            processor_s("-c", LIST_MODULES, *words)
            for _ in range(given.repeats):
                found[name]["command"].append(processor_s("-m", "hpo.cli", *words))
                found[name]["imports"].append(processor_s("-c", IMPORT))
        os.chdir(Path(__file__).parent)
    rows = []
    for name, sides in found.items():
        ratios = [whole / only for whole, only in zip(sides["command"], sides["imports"], strict=True)]
        rows.append([f"hpo {name}", quarters(sides["command"]), quarters(sides["imports"]), quarters(ratios, 2)])
    print(table(["command", "processor seconds", "imports alone", f"ratio (target: {LIMIT})"], rows))
    finish("startup", given.json, described, found=found)


if __name__ == "__main__":
    main()
