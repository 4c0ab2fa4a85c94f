"""Rules of the code base: layout, imports between packages, the locked test set, forbidden functions, linters.

Imports are read from the syntax trees, so that the rules hold inside functions too: a lazy import is still a
dependency. Two tables, `CORE_FOUNDATION` and `LAYERS`, hold the rules.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("hpo/**/*.py")])

CORE_FOUNDATION = {"config", "errors", "imports", "runtime", "seeds", "text", "weights"}
"""Modules that all of `core` may import. Only `core.loop` imports the others."""

CORE_NEVER = {"hpo", "optuna", "optuna_dashboard", "yaml", "rich", "typer"}
"""`core` trains one configuration; searches, search-space files and the terminal are in `hpo`."""

LAYERS = (
    {"cli"},
    {"api"},
    {"report", "analysis"},
    {"submission", "workers"},
    {"search"},
    {"confirmation", "dashboard", "loggers"},
    {"study"},
    {"space", "storage"},
    {"paths", "trials", "text", "reporter", "errors"},
)
"""The packages of `hpo` and its ground files, top layer first. A lower layer never imports an upper one; `core` is
below them all."""

ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"space"},
}
"""Libraries that one package of `hpo` owns."""

LONGEST_FUNCTION = 60
"""Lines of a function of `core` or `hpo`."""

NEVER_IMPORTED = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Formats that run code when they are read. PyYAML's unsafe loaders are one more."""

STUDY_NAMES = {"journal.log", "study.yaml", "artifacts", "trials", "metrics.jsonl", "checkpoints", "references"}
"""Names under `studies/` that `hpo/paths.py` alone spells as a path; elsewhere they come from `StudyPaths`."""

HEAVY = ("torch", "torchvision", "timm", "optuna", "sklearn", "matplotlib", "pandas")
"""Libraries that take seconds to import."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """`core/models/resnet.py` is `core.models.resnet`, and `core/models/__init__.py` is `core.models`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(tree: ast.Module, module: str, *, is_package: bool, known: set[str]) -> Iterator[tuple[str, int]]:
    """Every module that the tree imports, anywhere in it, with the line. `from hpo import paths` means `hpo.paths`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in known else base), node.lineno


IMPORTS = {
    module: list(imports_of(tree_of(path), module, is_package=path.name == "__init__.py", known=set(MODULES)))
    for module, path in MODULES.items()
}


def room(module: str) -> str:
    """The part of a module's name that the tables use: `models` of `core.models.resnet`."""
    return module.split(".")[1] if "." in module else ""


def is_within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def layer_of(module: str) -> int | None:
    """The index into `LAYERS`; 0 is the highest."""
    return next((i for i, rooms in enumerate(LAYERS) if room(module) in rooms), None)


def core_faults(module: str, imports: list[tuple[str, int]]) -> list[str]:
    """Imports that a module of `core` may not have."""
    faults = []
    for target, line in imports:
        if target.split(".")[0] in CORE_NEVER:
            faults.append(f"{module}:{line}: core never imports {target}")
        if not is_within(target, "core") or room(module) == room(target) or room(target) in CORE_FOUNDATION:
            continue
        if room(module) in CORE_FOUNDATION:
            faults.append(f"{module}:{line}: the foundation imports nothing above it, and not {target}")
        elif room(module) not in {"loop", ""} or room(target) == "":
            faults.append(f"{module}:{line}: core.loop alone composes its siblings; {target} is one")
    return faults


def hpo_faults(module: str, imports: list[tuple[str, int]]) -> list[str]:
    """Imports that a module of `hpo` may not have."""
    own = layer_of(module)
    faults = []
    for target, line in imports:
        theirs = layer_of(target) if is_within(target, "hpo") else None
        if own is not None and theirs is not None and theirs < own:
            faults.append(f"{module}:{line}: {target} lies in a layer above")
    return faults


# Imports ------------------------------------------------------------------------------------------------


def test_core_imports_nothing_of_the_search_and_its_rooms_only_the_foundation() -> None:
    faults = [
        fault for module in MODULES if is_within(module, "core") for fault in core_faults(module, IMPORTS[module])
    ]
    assert not faults, "\n".join(faults)


def test_a_lower_layer_of_hpo_never_imports_an_upper_one() -> None:
    faults = [fault for module in MODULES if is_within(module, "hpo") for fault in hpo_faults(module, IMPORTS[module])]
    assert not faults, "\n".join(faults)


def test_the_top_of_hpo_holds_the_packages_and_ground_files_of_the_layers_alone() -> None:
    top = {path.stem for path in (ROOT / "hpo").glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "hpo").glob("*/__init__.py")}
    assert top == LAYERS[-1]
    assert packages == set().union(*LAYERS[:-1])


def test_no_module_imports_itself_through_others() -> None:
    graph = {m: {t for t, _ in found if t in MODULES and t != m} for m, found in IMPORTS.items()}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import one another in a circle: {sorted(graph)}"


def test_a_library_with_one_owner_is_imported_by_nobody_else() -> None:
    faults = [
        f"{relative(MODULES[module])}:{line}: {target} belongs to {', '.join(sorted(owners))}"
        for library, owners in ONLY_IN.items()
        for module, found in IMPORTS.items()
        for target, line in found
        if is_within(target, library) and not (is_within(module, "hpo") and room(module) in owners)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source", "faults"),
    [
        ("core.data", "from core.errors import UserError", 0),
        ("core.data", "def f():\n    from core.augment import Augment", 1),
        ("core.data", "import optuna.trial", 1),
        ("core.loop", "from core.augment import Augment", 0),
        ("core.loop", "from hpo import paths", 1),
        ("core.config", "from core.loop import train", 1),
        ("core.models.resnet", "from core.models.blocks import Block", 0),
        ("core.models.resnet", "from ..optim import build_optimizer", 1),
        ("hpo.space.pruner", "if TYPE_CHECKING:\n    from hpo.search.objective import Objective", 1),
        ("hpo.study", "from . import cli", 1),
        ("hpo.study", "from hpo import paths, errors", 0),
        ("hpo.cli", "def run():\n    from hpo.search.loop import drive", 0),
    ],
)  # fmt: skip
def test_the_import_rules_catch_what_they_should(module: str, source: str, faults: int) -> None:
    known = set(MODULES) | {"hpo.cli", "hpo.paths", "hpo.errors"}
    found = list(imports_of(ast.parse(source), module, is_package=False, known=known))
    assert len((core_faults if is_within(module, "core") else hpo_faults)(module, found)) == faults


# Private names ------------------------------------------------------------------------------------------------------


def private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Underscore names that the tree reads from other objects or imports from Optuna, with the line.

    A module's own private names are those it defines as functions, classes, fields or attributes of `self`.
    """
    own = {"_exit"}  # of os
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.ImportFrom) and is_within(node.module or "", "optuna"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names if is_within(alias.name, "optuna") for part in alias.name.split(".")]
        else:
            names = []
        yield from ((name, node.lineno) for name in names if re.fullmatch(r"_[^_].*", name))


def test_private_names_of_optuna_are_used_in_the_storage_package_only() -> None:
    faults = [
        f"{relative(path)}:{line}: {name}"
        for module, path in MODULES.items()
        if is_within(module, "hpo") and room(module) != "storage"
        for name, line in private_names(tree_of(path))
    ]
    assert not faults, f"use or add a helper in hpo.storage.optuna_access: {faults}"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("study._storage", ["_storage"]),
        ("study.optuna._thread_local.cached = 1", ["_thread_local"]),
        ("from optuna.storages._rdb import models", ["_rdb"]),
        ("import optuna.artifacts._protocol", ["_protocol"]),
        ("class A:\n    def __init__(self, other):\n        self._x = other._x", []),
        ("from __future__ import annotations\nself._storage.__name__", []),
    ],
)
def test_the_rule_on_private_names_finds_attributes_and_imports(source: str, names: list[str]) -> None:
    assert [name for name, _ in private_names(ast.parse(source))] == names


# Locked data and forbidden functions -----------------------------------------------------------------------------


def test_nothing_but_refit_opens_the_test_set() -> None:
    seen = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        # Who calls it, and who defines it.
        if relative(path) != "hpo/submission/refit.py" and room(module_name(path)) != "data"
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Attribute) and node.attr == "open_test")
        or (isinstance(node, ast.Name) and node.id == "open_test")
        or (isinstance(node, ast.Constant) and node.value == "open_test")
    ]
    assert not seen, f"the test set is locked until refit: {seen}"


def test_data_defines_the_way_to_the_test_set_and_does_not_take_it() -> None:
    calls = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        if module_name(path).startswith("core.data")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open_test"
    ]
    assert not calls


def test_nothing_reads_a_format_that_runs_code() -> None:
    faults = [
        f"{relative(MODULES[module])}:{line}: {target}"
        for module, found in IMPORTS.items()
        for target, line in found
        if target.split(".")[0] in NEVER_IMPORTED and not (target == "pickle" and uses_pickle_safely(MODULES[module]))
    ]
    assert not faults, "\n".join(faults)


def unsafe_yaml(tree: ast.Module) -> list[str]:
    """Names of PyYAML that load YAML 1.1 or any object; passed to `yaml.parse`, the safe loaders only parse."""
    used = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml"
    ]
    used += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and is_within(node.module or "", "yaml")
        for alias in node.names
    ]
    return [name for name in used if "load" in name.lower() and name not in ("SafeLoader", "CSafeLoader")]


def test_yaml_is_never_loaded_by_pyyaml_itself() -> None:
    faults = [f"{relative(path)}: {name}" for path in SOURCES for name in unsafe_yaml(tree_of(path))]
    assert not faults, f"hpo.space.load_yaml reads YAML 1.2: {faults}"


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("yaml.load(text, Loader=yaml.SafeLoader)", ["load"]),
        ("yaml.safe_load(text)", ["safe_load"]),
        ("yaml.parse(text, Loader=yaml.UnsafeLoader)", ["UnsafeLoader"]),
        ("from yaml import full_load", ["full_load"]),
        ("yaml.parse(text, Loader=yaml.CSafeLoader)", []),
    ],
)
def test_every_loader_of_pyyaml_but_the_safe_parser_is_caught(source: str, faults: list[str]) -> None:
    assert unsafe_yaml(ast.parse(source)) == faults


def uses_pickle_safely(path: Path) -> bool:
    """Whether the module only names pickle's errors, or derives an unpickler that refuses every name but its own.

    A checkpoint and a batch of CIFAR are pickles inside, read by torch and torchvision: what guards them needs both.
    """
    if is_within(module_name(path), "hpo"):
        return False
    tree = tree_of(path)
    guarded = {
        id(base)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if any(isinstance(method, ast.FunctionDef) and method.name == "find_class" for method in node.body)
        for base in node.bases
    }
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    plainly_imported = not re.search(r"from pickle|pickle as", path.read_text(encoding="utf-8"))
    return plainly_imported and all(use.attr.endswith("Error") or id(use) in guarded for use in uses)


def test_torch_and_numpy_load_data_and_never_code() -> None:
    faults = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                faults.append(f"{relative(path)}:{node.lineno}: torch.load without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False":
                faults.append(f"{relative(path)}:{node.lineno}: allow_pickle")
            if ast.unparse(node.func) == "np.load" and keywords.get("allow_pickle") != "False":
                faults.append(f"{relative(path)}:{node.lineno}: np.load without allow_pickle=False")
    assert not faults, "\n".join(faults)


def test_the_bundle_and_the_refit_never_save_with_torch() -> None:
    """A submission model holds no pickle, only safetensors and JSON. A run's own checkpoint may be torch's."""
    users = [
        relative(path)
        for path in SOURCES
        if is_within(module_name(path), "hpo")
        and any(ast.unparse(n.func) == "torch.save" for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call))
    ]
    assert not users


def test_paths_alone_knows_the_names_under_studies() -> None:
    faults = [
        f"{relative(path)}:{part.lineno}: {part.value}"
        for path in SOURCES
        if relative(path) != "hpo/paths.py"
        for node in ast.walk(tree_of(path))
        for part in path_parts(node)
        if isinstance(part, ast.Constant) and part.value in STUDY_NAMES
    ]
    assert not faults, f"take them from hpo.paths: {faults}"


def path_parts(node: ast.AST) -> list[ast.expr]:
    """What becomes a path by `/`, `Path(...)` or `joinpath(...)`: a plain key of the same spelling is none."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Path", "joinpath")):
        return list(node.args)
    return []


def test_no_function_is_longer_than_sixty_lines() -> None:
    long = [
        f"{relative(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


# Importing does nothing ---------------------------------------------------------------------------------------------


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_importing_the_packages_has_no_side_effect_and_needs_no_module_of_unix(tmp_path: Path) -> None:
    """One process for both, since it takes five seconds to import the libraries. Its fork does without Unix."""
    theirs = sorted({t for found in IMPORTS.values() for t, _ in found if t.split(".")[0] not in ("core", "hpo")})
    code = f"""
import importlib, contextlib, json, logging, os, random, sys, warnings
import numpy, psutil, torch  # psutil has a module for each system
for name in {HEAVY!r}:
    importlib.import_module(name)
if os.fork() == 0:
    sys.modules["fcntl"] = sys.modules["resource"] = None
    for name in {sorted(MODULES)!r}:
        importlib.import_module(name)
    os._exit(0)
assert os.wait()[1] == 0, "a module of Unix is needed"
def state():
    return {{
        "torch threads": torch.get_num_threads(), "torch seed": torch.initial_seed(),
        "torch draws": torch.get_rng_state().tolist()[:64], "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": hash(random.getstate()), "numpy": numpy.random.get_state()[1][:8].tolist(),
        "handlers": len(logging.getLogger().handlers), "level": logging.getLogger().level,
        "environment": dict(os.environ), "folder": os.getcwd(), "filters of warnings": len(warnings.filters),
    }}
for name in {theirs!r}:  # what a library does when it is imported is not ours to answer for
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
before = state()
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == [], "importing wrote files"


# The repository ------------------------------------------------------------------------------------------


def tracked_files() -> list[Path]:
    """What git tracks, and what it would track once added."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_names_a_package_registry() -> None:
    registry = re.compile(r"//[\w.-]*(pypi|pythonhosted|anaconda|download[.]pytorch|npmjs|debian)[.](org|com)")
    pip_option = re.compile(r"--(extra-)?index-url")
    faults = [
        relative(path)
        for path in tracked_files()
        if path.suffix not in {".png", ".jpg"}
        for text in [path.read_bytes().decode("utf-8", errors="replace")]
        if registry.search(text) or (pip_option.search(text) and path != Path(__file__).resolve())
    ]
    assert not faults, f"where packages come from is the user's own setting: {faults}"


def test_the_project_pins_no_index_and_no_lock_file() -> None:
    uv = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"].get("uv", {})
    assert not uv.keys() & {"index", "index-url", "extra-index-url", "find-links", "sources"}
    assert "uv.lock" not in {path.name for path in tracked_files()}


def test_the_gate_runs_the_readmes_test_command() -> None:
    command = "pip install -q uv && uv run pytest -n auto"
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith(f"\n{command}")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


# The linters --------------------------------------------------------------------------------------------------------


def run_tool(*command: str) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", "--output-format=concise", ".")


def test_everything_is_formatted() -> None:
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy_finds_nothing() -> None:
    run_tool("mypy")  # strict, and over core and hpo, by pyproject.toml
