"""README and docs: they build offline, and their commands, snippets and links exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from core.config import TrainConfig
from hpo.cli.app import app
from hpo.space import load_space

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("s*/README.md")])
PAGES += [ROOT / "tests" / "benchmarks" / "README.md"]


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1300


# The site -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the dependency group docs is not installed",
)
def test_the_site_builds_offline_without_a_warning_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **unreachable, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*", page.read_text())
        assert loaded == [], page


def test_the_api_reference_lists_every_section_of_the_configuration() -> None:
    listed = set(re.findall(r"^::: core\.config\.(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M))
    sections = {TrainConfig.__name__}
    for name, field in TrainConfig.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            assert field.annotation is not None, name
            sections.add(field.annotation.__name__)
    assert listed >= sections


# Links --------------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link


# Commands -----------------------------------------------------------------------------------------------------------


def code(text: str) -> Iterator[str]:
    """Lines of code blocks without a language or in bash, and code spans."""
    for block in [*blocks(text, ""), *blocks(text, "bash"), *re.findall(r"(?:^    \S.*\n)+", text, re.MULTILINE)]:
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The words after `hpo` of every command."""
    found = []
    for line in code(text):
        for part in line.split(" && "):
            match = re.match(r"\s*(?:\$ |exec |time )?(?:uv run )?hpo ([a-z].*)", part)
            if match:
                found.append(shlex.split(match[1].replace("[", "").replace("]", ""), comments=True))
    return found


def subcommands(command: Any) -> dict[str, Any]:
    """The commands of a group, by name; none of a command."""
    return getattr(command, "commands", {})


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and its arguments."""
    command: Any = typer.main.get_command(app)
    while subcommands(command) and words:
        assert words[0] in subcommands(command), f"hpo {' '.join(words)}"
        command, words = subcommands(command)[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_every_command_and_option_exists(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        command, arguments = resolve(words)
        known = {name for param in command.params for name in [*param.opts, *param.secondary_opts]} | {"--help", "-h"}
        options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        assert options <= known, f"hpo {' '.join(words)}"


def test_the_command_pages_list_every_command_and_run_option() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = subcommands(typer.main.get_command(app))
    for name, command in commands.items():
        for full in [f"{name} {sub}" for sub in subcommands(command)] or [name]:
            assert re.search(rf"`hpo {full}\b", text), full
    run = [opt for param in commands["run"].params for opt in param.opts if opt.startswith("--")]
    assert [opt for opt in run if not re.search(rf"`[^`]*{opt}\b", text)] == []


# Snippets -----------------------------------------------------------------------------------------------------------


def snippets(language: str) -> list[Any]:
    """The blocks of all pages in a language, as parameters."""
    return [
        pytest.param(block, id=f"{page_id(path)}:{number}")
        for path in PAGES
        for number, block in enumerate(blocks(path.read_text(encoding="utf-8"), language))
    ]


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_snippets_compile_and_import_names_that_exist(snippet: str) -> None:
    imports = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_search_spaces_in_the_docs_are_valid(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "search_spaces" / "recipes")
    path = tmp_path / "space.yaml"
    path.write_text(snippet, encoding="utf-8")
    assert load_space(str(path)).search
