"""The surface of the command line: commands, options, start-up, and errors caused by user input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from core.data import Dataset
from hpo.cli.app import app
from hpo.paths import StudyPaths
from tests.hpo.commands import RunHpo
from tests.hpo.invented import SPACE, invented_study

LONG = ("fit", "run", "worker", "train", "confirm", "refit")
SURFACE = {
    "fit": """
        --device --hours:float[0.001..] --like:Path --minutes:float[0.05..] --output/-o:Path=submission.csv
        --predict:Path --set:list* --skip-broken:bool --space --study --weights:Path data!
    """,
    "run": """
        --address --artifacts --data:Path --device --devices --engine=local --hours:float[0.001..]
        --keep-gb:float[0..] --keep:int[1..]=3 --long-baseline:bool --minutes:float[0.05..] --patience:bool --per-device
        --recipes/--no-recipes:bool=True --reclaim:bool --retries:int[0..]
        --seed:int[0..] --set:list* --skip-broken:bool --storage --study --take-over
        --tensorboard:bool --trials:int[1..] --warm-start --weights:Path --workers:int[0..] --yes:bool space!
    """,
    "worker": """
        --artifacts --data:Path --device --devices --hours:float[0.001..] --keep-gb:float[0..] --keep:int[1..]=3
        --minutes:float[0.05..] --per-device --storage --tensorboard:bool --weights:Path --workers:int[1..] study!
    """,
    "train": """
        --data:Path --device --from --metric --profile:bool --set:list* --skip-broken:bool --storage --weights:Path
        recipe
    """,
    "confirm": """
        --budget:float[0..] --data:Path --device --devices --hours:float[0.001..] --minutes:float[0.05..] --per-device
        --storage --weights:Path --workers:int[1..] study
    """,
    "refit": """
        --average --confirm/--no-confirm:bool=True --data:Path --device --ensemble:int --epochs --folds:int --form
        --members:int --metric --onnx:bool --set:list* --single:bool --skip-broken:bool --storage --study --views
        --weights:Path --within:float[0..] trial!
    """,
    "predict": """
        --device --like:Path --output/-o:Path=submission.csv --probabilities:bool --skip-broken:bool bundle!
        images:Path!
    """,
    "report": """
        --compare:list* --data:Path --output/-o:Path --storage study
    """,
    "dashboard": """
        --host=127.0.0.1 --port:int[1..65535]=8080 --storage study
    """,
    "study list": """

    """,
    "study show": """
        --storage study
    """,
    "study top": """
        --every:float[0.1..]=2.0 --once:bool --storage study
    """,
    "study trials": """
        --csv:bool --output/-o:Path --storage study
    """,
    "study export": """
        --output/-o:Path --python:bool --storage --study trial!
    """,
    "study add": """
        --params:list* --storage study!
    """,
    "study delete": """
        --storage --yes:bool study!
    """,
    "study rename": """
        --storage new! study!
    """,
    "study copy": """
        --storage new! study!
    """,
    "study doctor": """
        --mend:bool --storage study
    """,
    "space list": """

    """,
    "space check": """
        file!
    """,
    "space suggest": """
        --output/-o:Path --storage study
    """,
    "space schema": """
        --output/-o:Path
    """,
    "data list": """

    """,
    "data audit": """
        --csv:bool --data:Path --output/-o:Path --storage study
    """,
}
"""Arguments and options of each command: `name:type[least..most]=default`, `!` required, `*` repeatable; `str` is left
out. Scripts depend on these; only help texts may change freely."""


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """All commands of a group by their full names."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = command
    return found


COMMANDS = commands(typer.main.get_command(app))


def spelled(parameter: Any) -> str:
    """A parameter as `SURFACE` spells it."""
    kind = parameter.type_descriptor.annotation.__name__
    least, most = ("" if bound is None else f"{bound:g}" for bound in (parameter.min, parameter.max))
    return "".join(
        [
            "/".join([*parameter.opts, *parameter.secondary_opts]),
            "" if kind == "str" else f":{kind}",
            f"[{least}..{most}]" if least or most else "",
            "" if parameter.default in (None, False) else f"={parameter.default}",
            "!" if parameter.required else "",
            "*" if parameter.multiple else "",
        ]
    )


def test_the_commands_are_exactly_these() -> None:
    assert COMMANDS.keys() == SURFACE.keys()


@pytest.mark.parametrize("name", SURFACE)
def test_a_command_has_exactly_these_parameters_and_describes_each(name: str) -> None:
    parameters = [parameter for parameter in COMMANDS[name].params if parameter.name != "help"]
    shown = [] if name in ("dashboard", "space schema") else ["--json:bool"]
    shown += ["--quiet/-q:bool", "--verbose:bool"] if name in LONG else []
    assert sorted(map(spelled, parameters)) == sorted(SURFACE[name].split() + shown)
    assert all(parameter.help for parameter in parameters)
    assert COMMANDS[name].help


@pytest.mark.parametrize("name", [*SURFACE, "study", "space", "data", ""])
def test_the_help_of_a_command_fits_80_columns_and_has_whole_sentences_and_words_for_values(
    name: str, run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_hpo(*name.split(), "--help").splitlines()
    options = lines.index("Options:")
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "[ARGS]" not in line], "typer cuts long texts"
    assert not [line for line in lines[options:] if re.search(r"<\w+( range)?>", line)], "not every value has a name"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "100001"], "100,001 trials, all queued at once, are over 100,000; give fewer .* or .* by --yes"),
        (["--trials", "1000001", "--yes"], r"are over 1,000,000; give fewer by --trials\n$"),
        (["--trials", f"{10**39}", "--yes"], r"are over 1,000,000; give fewer by --trials\n$"),
    ],
)
def test_a_total_that_would_fill_the_disk_is_refused_before_a_study_begins(
    run_hpo: RunHpo, words: list[str], said: str
) -> None:
    run_hpo("run", "digits", "--workers", "0", *words, code=2)
    assert re.search(said, run_hpo.error)
    assert not StudyPaths.of("digits").dir.exists()


def test_a_total_of_any_length_in_a_space_is_refused(run_hpo: RunHpo, tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text(f"trials: {10**39}\nsearch: {{epochs: {{low: 1, high: 2}}}}\n")
    run_hpo("space", "check", str(file), code=2)
    assert "large.yaml:1: trials: must be less than or equal to 1000000" in run_hpo.error


@pytest.mark.parametrize("output", ["/", ".", "x" * 5000, "/dev/full", "/proc/x"])
def test_an_output_that_cannot_be_written_is_one_line(run_hpo: RunHpo, output: str) -> None:
    """Also on a device, which was once replaced by a file."""
    line = run_hpo.fails("space", "schema", "-o", output)
    assert re.match(r"hpo: .*: cannot be written \(|hpo: .* is a folder; give -o the name of a file$", line)


def test_a_folder_that_cannot_be_written_is_one_line(run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_STUDIES", "/dev/null/studies")
    line = run_hpo.fails("train", "digits_base", "--set", "epochs=1")
    assert re.fullmatch(
        r"hpo: /dev/null/studies/.*: Not a directory; check the folder and the disk, and run .* again", line
    )


HOSTILE = "\x1b]0;pwn\x07\x1b[31mred\u202e"


@pytest.mark.parametrize(
    "words",
    [
        ["run", HOSTILE],
        ["run", "digits", "--set", f"{HOSTILE}=1"],
        ["run", "digits", "--set", f"optim.name={HOSTILE}"],
        ["run", "digits", "--data", f"/{HOSTILE}"],
        ["run", "digits", "--study", HOSTILE],
        ["run", "digits", "--trials", HOSTILE],
        ["run", "digits", "--storage", f"{HOSTILE}://x"],
        ["train", HOSTILE],
        ["train", "--from", f"{HOSTILE}/1"],
        ["refit", HOSTILE],
        ["predict", HOSTILE, "x"],
        ["study", "show", HOSTILE],
        ["study", HOSTILE],
        ["space", "check", f"{HOSTILE}.yaml"],
        ["space", "check", "keys.yaml"],
        ["space", "check", "values.yaml"],
    ],
)
def test_no_control_character_from_outside_reaches_the_terminal(
    run_hpo: RunHpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = json.dumps(HOSTILE)
    Path("keys.yaml").write_text(f'{named}: 1\n"new\\nline": 2\nsearch: {{{named}: {{low: 1, high: 2}}}}\n')
    Path("values.yaml").write_text(f"data: {{name: {named}}}\nsearch: {{optim.name: {{choices: [{named}]}}}}\n")
    shown = run_hpo(*words, code=2) + run_hpo.error
    assert shown.replace("\n", "").isprintable()


def test_a_study_with_control_characters_in_its_name_is_listed_without_them(run_hpo: RunHpo) -> None:
    folder = StudyPaths.of(HOSTILE.replace("/", ""))
    folder.dir.mkdir(parents=True)
    folder.study_yaml.write_text("hash: x\n")
    shown = run_hpo("study", "list") + run_hpo.error
    assert shown.replace("\n", "").isprintable()
    assert r"\x1b[31mred\u202e" in shown


# Start-up -----------------------------------------------------------------------------------------------------------

HEAVY = {"torch", "timm", "torchvision", "sklearn", "pandas", "matplotlib", "scipy", "optuna"}


@pytest.mark.parametrize(
    ("arguments", "allowed", "code"),
    [
        (["--help"], set(), 0),
        (["--version"], set(), 0),
        (["study", "delete", "nope"], set(), 2),
        (["predict", "nope", "x"], set(), 2),
        (["predict", "best", "x"], set(), 2),
        (["run", "nope"], set(), 2),
        (["data", "list"], set(), 0),
        (["space", "list"], set(), 0),
        (["study", "list"], {"optuna"}, 0),
        (["study", "show"], set(), 2),
        (["study", "show", "nope"], set(), 2),
        (["refit", "nope"], set(), 2),
        (["refit", "best", "--study", "nope"], set(), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_only_what_it_uses(
    arguments: list[str], allowed: set[str], code: int, tmp_path: Path
) -> None:
    _check_imports(arguments, HEAVY - allowed, code, tmp_path)


def test_looking_at_a_finished_study_imports_no_torch(digits: Dataset, tmp_path: Path) -> None:
    """Running it again says so, and names the command of a longer search."""
    (tmp_path / "s.yaml").write_text(SPACE)
    invented_study(SPACE, digits, "s", trials=3)
    run = ["run", str(tmp_path / "s.yaml"), "--trials", "3"]
    for arguments in (run, ["study", "show", "s"], ["study", "top", "s", "--once"]):
        said = _check_imports(arguments, {"torch", "timm", "matplotlib", "sklearn"}, 0, tmp_path)
        assert "study s" in said
    said = _check_imports(run, {"torch"}, 0, tmp_path)
    assert said.splitlines()[:2] == [
        "study s is finished: all 3 trials are done; continue it with",
        f"  hpo run {tmp_path / 's.yaml'} --trials 6",
    ]


def _check_imports(arguments: list[str], forbidden: set[str], code: int, tmp_path: Path) -> str:
    """Run a command in a process that must not import these packages, and return its output."""
    program = (
        "import sys\n"
        f"sys.argv = ['hpo', *{arguments!r}]\n"
        "from hpo.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        f"    assert ended.code == {code}, ended.code\n"
        f"print(*({forbidden!r} & sys.modules.keys()), file=sys.stderr)\n"
    )
    environment = {**os.environ, "HPO_STUDIES": str(tmp_path / "studies")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.splitlines()[-1] == ""
    return done.stdout


def test_ctrl_c_while_the_command_line_is_imported_prints_no_traceback() -> None:
    program = """
import sys
class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from hpo.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_and_its_help_need_no_file_locks_of_unix() -> None:
    program = "import sys; sys.modules['fcntl'] = None; sys.argv = ['hpo', '--help']; import hpo.cli; hpo.cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: hpo" in done.stdout


def test_the_version_names_what_results_depend_on(run_hpo: RunHpo) -> None:
    assert re.fullmatch(r"hpo \d\S* \(python \S+, torch \S+, .*optuna \S+, .*\)\n", run_hpo("--version"))


# User errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "did you mean digits?"),
        (["run", "digits", "--set", "optim.lrr=1"], "did you mean optim.lr?"),
        (["run", "digits", "--set", "epochs"], "--set epochs"),
        (["run", "digits", "--device", "gpu"], "--device gpu"),
        (["run", "digits", "--device", "cuda:99"], "--device cuda:99"),
        (["run", "digits", "--study", "a/b"], "a/b"),
        (["run", "digits", "--storage", "nonsense://x"], "nonsense"),
        (["run", "digits", "--data", "nowhere.zip"], "nowhere.zip"),
        (["run", "digits", "--per-device", "0"], "--per-device 0"),
        (["run", "digits", "--per-device", "many"], "--per-device many"),
        (["run", "digits", "--devices", "cpu,cpu"], "--devices cpu,cpu: cpu is there twice"),
        (["run", "digits", "--devices", "cpu,"], "--devices cpu,: a name is missing"),
        (["run", "digits", "--devices", "cuda:99"], "--devices cuda:99: this machine has"),
        (["run", "digits", "--engine", "ray", "--device", "cpu", "--per-device", "2"], "--per-device: on CPUs Ray"),
        (["run", "digits", "--engine", "ray", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: no Ray cluster"),
        (["train", "digits_base", "--storage", "x.log"], "--storage: a recipe has no storage"),
        (["run", "digits", "--device", "cpu", "--devices", "cpu"], "--device and --devices"),
        (["run", "digits", "--workers", "3", "--per-device", "2"], "--workers 3"),
        (["run", "digits", "--engine", "slurm"], "--engine slurm: give local or ray"),
        (["run", "digits", "--address", "auto"], "--address auto is a Ray cluster's"),
        (["run", "digits", "--engine", "ray", "--devices", "cuda:0"], "--devices names GPUs of one machine"),
        (["run", "digits", "--engine", "ray", "--device", "cuda:1"], "--device cuda:1: with --engine ray"),
        (["run", "digits", "--engine", "ray", "--per-device", "auto"], "--per-device auto: with --engine ray"),
        (["run", "digits", "--artifacts", "nothing://x"], "--artifacts nothing://x: nothing:// is nothing that fsspec"),
        (["train", "digits_bas"], "did you mean"),
        (["train", "digits_base", "--metric", "f1"], "--metric f1"),
        (["train", "digits_base", "--set", "data.folds=1"], "data.folds"),
        (["refit", "best"], "no stud"),
        (["refit", "best", "--folds", "1"], "--folds 1"),
        (["refit", "best", "--folds", "21"], "--folds 21"),
        (["refit", "best", "--study", "nosuch"], "nosuch"),
        (["study", "show"], "no stud"),
        (["dashboard", "nosuch"], "nosuch"),
        (["predict", "nowhere", "images"], "nowhere"),
        (["space", "check", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line_with_exit_code_2(arguments: list[str], message: str, run_hpo: RunHpo) -> None:
    assert message in run_hpo.fails(*arguments)


def test_a_mistyped_option_exits_with_2(run_hpo: RunHpo) -> None:
    run_hpo("run", "digits", "--trails", "3", code=2)
    assert "--trials" in run_hpo.error


def test_the_list_of_no_studies_shows_how_to_start(run_hpo: RunHpo) -> None:
    assert "hpo run digits" in run_hpo("study", "list")


def test_all_built_in_data_sets_are_listed(run_hpo: RunHpo) -> None:
    out = run_hpo("data", "list")
    for name in ("digits", "stl10", "cifar10", "cifar100", "fashion_mnist"):
        assert name in out


def test_the_committed_schema_is_what_the_command_writes(tmp_path: Path, run_hpo: RunHpo) -> None:
    """If this fails, run `hpo space schema -o search_spaces/schema.json`."""
    run_hpo("space", "schema", "-o", str(tmp_path / "schema.json"))
    committed = Path(__file__).resolve().parents[3] / "search_spaces" / "schema.json"
    assert (tmp_path / "schema.json").read_text() == committed.read_text()


def test_running_out_of_memory_is_a_user_error(monkeypatch: pytest.MonkeyPatch, run_hpo: RunHpo) -> None:
    def train_recorded(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("hpo.api.train.train_recorded", train_recorded)
    assert run_hpo.fails("train", "digits_base").startswith(
        "hpo: out of memory: not even a small part of a batch fits the device"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits", "--data", "nosuch"],
        ["run", "imbalanced"],
        ["fit", "nosuch"],
        ["worker", "nosuch"],
        ["train", "nosuch"],
        ["train", "--from", "nosuch/1"],
        ["confirm", "nosuch"],
        ["refit", "nosuch"],
        ["predict", "nosuch", "images"],
    ],
)
def test_a_wrong_name_is_reported_before_torch_is_imported(
    run_hpo: RunHpo, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    for module in ("confirm", "run", "train", "worker", "common"):  # these import torch, which takes seconds
        monkeypatch.setitem(sys.modules, f"hpo.api.{module}", None)  # to import it is an error
    monkeypatch.setitem(sys.modules, "core.data.dataset", None)
    assert "nosuch" in (line := run_hpo.fails(*words)) or "path/to/images" in line
