"""Search-space files: the YAML, the message of every fault, and the meaning of a space for Optuna."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from pydantic import ValidationError

from core.config import TrainConfig
from hpo.errors import SpaceError
from hpo.space import (
    SearchSpace,
    check_file,
    diff,
    dump_yaml,
    json_schema,
    list_spaces,
    load_recipe,
    load_space,
    parse_yaml,
    recipe_from_yaml,
    space_from_yaml,
    space_to_yaml,
    to_yaml,
)
from hpo.space.fields import config_fields, nearest_field

SPACES = Path(__file__).resolve().parents[3] / "search_spaces"
FILES = sorted([*SPACES.glob("*.yaml"), *SPACES.glob("recipes/*.yaml")])

Write = Callable[..., Path]
SpaceOf = Callable[..., SearchSpace]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a YAML file into the working directory, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "x.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def space_of(write: Write) -> SpaceOf:
    """Read a space from YAML."""
    return lambda text, name="x.yaml": load_space(write(text, name))


@pytest.mark.parametrize("step", ["1.0e-30", "1.0e-320"])
def test_a_step_that_is_too_small_for_the_range_is_a_fault(space_of: SpaceOf, step: str) -> None:
    with pytest.raises(SpaceError, match=r"search\.loss\.smoothing\.step: .* is too small for the range"):
        space_of(f"search: {{loss.smoothing: {{low: 0.0, high: 0.2, step: {step}}}}}")


def test_many_misspelt_fields_are_reported_quickly_and_the_first_with_suggestions(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    entries = "".join(f"  optim.weight_decay_{number}: {{low: 1, high: 2}}\n" for number in range(3000))
    file.write_text(f"search:\n{entries}")
    began = time.process_time()
    with pytest.raises(SpaceError) as raised:
        load_space(file)
    assert time.process_time() - began < 5
    meant = ["did you mean optim.weight_decay?" in str(fault) for fault in raised.value.faults]
    assert len(meant) == 3000
    assert all(meant[:20])
    assert not any(meant[1000:])


def test_the_name_of_the_data_is_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    space = "data: {name: photos}\nbase: base.yaml\nsearch:\n  model.width: {choices: [1.0, 2.0]}\n"
    write("{}", "spaces/base.yaml")
    path = write(space, "spaces/x.yaml")
    assert load_space(path).baseline.data.name == "photos"
    (tmp_path / "photos").mkdir()
    assert load_space(path).baseline.data.name == "photos", "of the working directory"
    (tmp_path / "spaces" / "photos").mkdir()
    assert load_space(path).baseline.data.name == str(tmp_path / "spaces" / "photos")
    recipe = write("data: {name: photos}\n", "spaces/recipe.yaml")
    assert load_recipe(recipe).config.data.name == str(tmp_path / "spaces" / "photos")
    (tmp_path / "spaces" / "digits").mkdir()
    assert load_recipe(write("data: {name: digits}\n", "spaces/recipe.yaml")).config.data.name == "digits"
    assert recipe_from_yaml("data: {name: photos}\n").config.data.name == "photos", "text is in no folder"


def test_how_the_data_are_read_is_not_part_of_the_identity() -> None:
    plain = load_space("digits")
    read = load_space("digits", ["data.class_depth=2", "data.label_column=x", "data.val=drawn", "data.images=y"])
    assert read.hash == plain.hash
    assert "data.images" not in plain.identity()
    assert load_space("digits", ["data.split_seed=3"]).hash != plain.hash


def test_a_space_written_by_version_0_1_0_draws_its_validation_images() -> None:
    text = space_to_yaml(load_space("digits"))
    assert space_from_yaml(text, "x").baseline.data.val == "given"
    tree = load_yaml_text(text)
    del tree["base"]["data"]["val"]
    assert space_from_yaml(dump_yaml(tree), "x").baseline.data.val == "drawn"


def load_yaml_text(text: str) -> Any:
    document, faults = parse_yaml(text, "x")
    assert document is not None
    assert not faults
    return document.content


def faults_of(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(SpaceError) as caught:
        load_space(path, overrides)
    assert str(caught.value) == "\n".join(map(str, caught.value.faults))
    return [str(fault) for fault in caught.value.faults]


def trials(space: SearchSpace, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The parameters of random trials, as Optuna recorded them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    rows = []
    for _ in range(count):
        trial = study.ask()
        assert space.suggest(trial) == trial.params
        assert trial.distributions == {path: space.distributions[path] for path in trial.params}
        rows.append(trial.params)
    return rows


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.e3", 5000.0),
        (".5e3", 500.0),
        ("-.5", -0.5),
        ("+12", 12),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("1:30", "1:30"),
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("false", False),
        ("", None),
        ("~", None),
        ("Null", None),
        ("2026-01-30", "2026-01-30"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("=", "="),
        ("[1, 2.0, a]", [1, 2.0, "a"]),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    document, faults = parse_yaml(f"key: {text}", "x")
    assert document is not None
    assert not faults
    read = document.content["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [1,", "x:1: not YAML: did not find expected node content"),
        ("a: 1\n b: 2", "x:2: not YAML: mapping values are not allowed in this context"),
        ("a: 1\n---\nb: 2", "x:3: a second document; one file holds one"),
        ("a: 1\n\nb: !!python/object:os.system x", "x:3: the tag tag:yaml.org,2002:python/object:os.system is not"),
        ("a: !own {b: 1}", "x:1: the tag !own is not allowed: plain data only"),
        ("a: *b", "x:1: *b has no complete &b before it"),
        ("a: &b {c: *b}", "x:1: *b has no complete &b before it"),
        ("a: 1\nb: .inf", "x:2: .inf is not a finite number"),
        ("a: -.NaN", None),
        ("a: .nan", "x:1: .nan is not a finite number"),
        ("a: 1e999", "x:1: 1e999 is not a finite number"),
        ("a: " + "9" * 5000, "x:1: a number of 5000 characters is too long"),
        ("a: " + "[" * 100 + "]" * 100, "x:1: nested more than 32 deep"),
        ("? [a]\n: 1", "x:1: a key must be a word"),
        ("a: \udcff", "x:1: not YAML: 'utf-8' codec can't encode character"),
        ("a: \x00", "x:1: not YAML: unacceptable character #x0000: control characters are not allowed"),
    ],
)
def test_anything_but_plain_yaml_is_refused_with_its_line(text: str, fault: str | None) -> None:
    _, faults = parse_yaml(text, "x")
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert str(faults[0]).startswith(fault)


def test_the_expansion_of_aliases_is_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    document, faults = parse_yaml("\n".join(lines), "x")
    assert document is None
    assert [fault.message for fault in faults] == ["more than 100000 values"]


def test_an_alias_is_a_copy() -> None:
    document, faults = parse_yaml("a: &w [64, 128]\nb: *w", "x")
    assert document is not None
    assert not faults
    assert document.content == {"a": [64, 128], "b": [64, 128]}


def test_every_duplicate_key_is_reported() -> None:
    _, faults = parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\na: 4\n", "x")
    assert list(map(str, faults)) == [
        "x:2: c: given twice; first on line 2",
        "x:3: a: given twice; first on line 1",
        "x:4: a: given twice; first on line 1",
    ]


VALUES = [
    None, True, 0, -7, 0.1, 1e-05, 1e22, 1e300, 5e-324, 1 / 3, [1, 2], [], ["a", None], "x", "off", "no", "Null",
    "1e-4", ".5e3", "1_000", "", " ", "a: b", "# x", "a\nb", "tab\t", "ü × 日 𝛼", '"', "'", "\\", "-", "[", "1:30",
    "2026-01-30", "<<", "/data/a b.zip", "*a", "&a", "!a", "%", "@", "a #b",
    "\x00\x07\x7f\x85\xa0\u2028\ufeff\uffff",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_written_values_are_read_back_exactly_also_by_a_yaml_1_1_reader(value: Any) -> None:
    document, faults = parse_yaml(dump_yaml({"key": value, "nested": {"deep": {"key": value}}}), "x")
    assert document is not None
    assert not faults
    assert document.content == {"key": value, "nested": {"deep": {"key": value}}}
    assert type(document.content["key"]) is type(value)
    assert yaml.safe_load(dump_yaml({"key": value, "in": [value]})) == {"key": value, "in": [value]}


def test_written_yaml_keeps_the_order_of_keys_and_lists_on_one_line() -> None:
    tree = {"b": 1e-05, "a": {"off": [64, [1, "off"]], "empty": {}}, "long": "word " * 60}
    assert dump_yaml(tree).splitlines() == [
        "b: 1.0e-05", "a:", '  "off": [64, [1, "off"]]', "  empty: {}", f'long: "{"word " * 60}"',
    ]  # fmt: skip


HASHES = {
    "digits": "106c6a0f0c398575bfe375470b0b0300a5be77d1b1cb5f9c8a70bb850a06734d",
    "stl10_small": "abb5bce829b70cfb4d935fdd03645b38c34dce72b152efef3f100c9b08a1ac2f",
    "cifar100": "1c7be14cc9a92389a4286387933a50562a5adbb4b33f92680ccfc5c539b3cc21",
    "imbalanced": "c264e7e6c51ff78a10fb082398044b955eedec738ad103854c55f48023a55f5e",
    "intel_scenes": "99e047d3c8f92301ff89856122b47c453008c88fb7b19e4ddc5e6cbf99731b7b",
}


@pytest.mark.parametrize("name", HASHES)
def test_a_shipped_space_keeps_its_hash_so_that_studies_on_it_continue(name: str) -> None:
    assert load_space(name).hash == HASHES[name]


# Faults


BASE = "base: {epochs: 20}\nsearch:\n"

# (the first entry of search, on line 3; the fault: without its place if that is `x.yaml:3: search.`)
SEARCH_FAULTS = [
    ("optim.lrr: {low: 1, high: 2}", "optim.lrr: no such field; did you mean optim.lr?"),
    ("drop_path: {low: 0, high: 0.5}", "drop_path: no such field; did you mean model.drop_path?"),
    ("zzzzzzzz: {low: 0, high: 0.5}", "zzzzzzzz: no such field"),
    (
        "loss: {choices: [1]}",
        "loss: is a group of fields; name one of them: loss.name, loss.gamma, loss.smoothing, "
        "loss.smoothing_final, loss.smoothing_final_from, loss.smoothing_patience_fraction, loss.logit_adjustment, "
        "loss.class_weights, "
        "loss.class_weights_from_fraction",
    ),
    ("loss.smoothing: 0.1", "loss.smoothing: must be {choices: […]} or {low: …, high: …}, not 0.1"),
    ("loss.smoothing: {log: true}", "loss.smoothing: needs choices, or low and high"),
    ("loss.smoothing: {low: 0.0}", "loss.smoothing.high: is missing"),
    ("loss.smoothing: {choices: [0.0, 0.1], low: 0}", "loss.smoothing.low: no such field"),
    ("loss.smoothing: {low: 0, high: 0.2, stpe: 0.1}", "loss.smoothing.stpe: no such field; did you mean step?"),
    ("loss.smoothing: {low: none, high: 0.2}", "loss.smoothing.low: must be a number, not 'none'"),
    ("loss.smoothing: {low: 0, high: true}", "loss.smoothing.high: must be a number, not true"),
    ("loss.smoothing: {low: 0, high: 1.5}", "loss.smoothing.high: must be less than or equal to 0.9, not 1.5"),
    ("optim.lr_scale: {low: 0, high: 10}", "optim.lr_scale.low: must be greater than 0, not 0"),
    ("optim.lr_scale: {low: 10, high: 0.1}", "optim.lr_scale.high: must be greater than low, 10, not 0.1"),
    ("optim.lr_scale: {low: 1, high: 1}", "optim.lr_scale.high: must be greater than low, 1, not 1"),
    (
        "loss.smoothing: {low: 0, high: 0.2, log: true}",
        "loss.smoothing.low: must be greater than 0 where log is true, not 0",
    ),
    (
        "optim.lr_scale: {low: 0.1, high: 10, log: true, step: 0.1}",
        "optim.lr_scale.step: a logarithmic range has no steps; leave out step or log",
    ),
    (
        "loss.smoothing: {low: 0, high: 0.2, step: 0.15}",
        "loss.smoothing.step: 0.15 does not divide the range: it would end at 0.15, not 0.2",
    ),
    ("loss.smoothing: {low: 0, high: 0.2, step: 0}", "loss.smoothing.step: must be greater than 0, not 0"),
    ("augment.ops: {low: 0, high: 2.5}", "augment.ops.high: must be a whole number, not 2.5"),
    ("augment.ops: {low: 0, high: 2, step: 0.5}", "augment.ops.step: must be a whole number, not 0.5"),
    ("optim.name: {low: 0, high: 1}", "optim.name: has no order, so low and high mean nothing here; give choices"),
    (
        "optim.name:\n    choices:\n      - adamw\n      - sdg",
        "x.yaml:6: search.optim.name.choices.1: must be 'sgd', 'adamw', 'nadam', 'swats', 'muon' or 'logistic', not "
        "'sdg'; did you mean sgd?",
    ),
    ("model.se: {choices: [false, off]}", "model.se.choices.1: must be true or false, not 'off'"),
    ("loss.smoothing: {choices: [0.0, null]}", "loss.smoothing.choices.1: must be a number, not null"),
    ("loss.smoothing: {choices: [0, 0.1, 0.0]}", "loss.smoothing.choices.2: 0.0 is given twice"),
    ("loss.smoothing: {choices: []}", "loss.smoothing.choices: must have at least 1 item, not 0"),
    (
        "optim.lr_scale: {low: 0.1, high: 10}\n  optim.lr: {low: 1e-4, high: 1}",
        "x.yaml:4: search.optim.lr: optim.lr and optim.lr_scale are one knob under two names: search one of them",
    ),
    ("seed: {low: 0, high: 9}", "seed: cannot be searched: a study seeds every trial itself; --seed sets the study's"),
    (
        "epochs: {low: 10, high: 90}",
        "epochs: cannot be searched: trials of different lengths cannot be compared at their rungs; set "
        "it in base, or with --set",
    ),
    (
        "data.normalize: {choices: [half, train]}",
        "data.normalize: cannot be searched: trials on different images cannot be compared; set it under data",
    ),
    (
        "optim.lr_scale: {low: 2, high: 10}",
        "optim.lr_scale: must contain the baseline's 1.0, because trial 0 is the baseline; it has low 2.0, high 10.0",
    ),
    (
        "augment.flip: {low: 0.0, high: 0.8, step: 0.2}",
        "augment.flip: must contain the baseline's 0.5, because trial 0 is the baseline; it has low 0.0, "
        "high 0.8, step 0.2",
    ),
    (
        "batch_size: {choices: [32, 64]}",
        "batch_size: must contain the baseline's 128, because trial 0 is the baseline; it has choices [32, 64]",
    ),
    (
        "optim.beta1: {low: 0.8, high: 0.95, when: {optim.nam: adamw}}",
        "optim.beta1.when.optim.nam: no such field; did you mean optim.name?",
    ),
    (
        "optim.beta1: {low: 0.8, high: 0.95, when: {optim.name: [adamw, admw]}}",
        "optim.beta1.when.optim.name: must be 'sgd', 'adamw', 'nadam', 'swats', 'muon' or 'logistic', not 'admw'; "
        "did you mean adamw?",
    ),
    ("optim.beta1: {low: 0.8, high: 0.95, when: {optim.name: []}}", "optim.beta1.when.optim.name: names no value"),
    (
        "optim.momentum: {low: 0.8, high: 0.95, when: {optim.name: sgd}}",
        "optim.momentum.when.optim.name: can never be met: optim.name is not searched, and the baseline's is 'adamw'",
    ),
    (
        "optim.name: {choices: [adamw, sgd]}\n  optim.momentum:\n    low: 0.8\n    high: 0.95\n    when:\n    "
        "  optim.name: swats",
        "x.yaml:8: search.optim.momentum.when.optim.name: 'swats' can never be met: search.optim.name does not draw it",
    ),
    (
        "augment.strength: {low: 0, high: 1}\n  augment.ops: {low: 0, high: 2, when: {augment.strength: 0.5}}",
        "x.yaml:4: search.augment.ops.when.augment.strength: 0.5 can never be met: "
        "search.augment.strength does not draw it",
    ),
    (
        "optim.name: {choices: [adamw, swats]}\n  optim.swats.switch: {choices: [fraction, criterion], "
        "when: {optim.name: swats}}\n  optim.beta1: {low: 0.8, high: 0.95, when: {optim.swats.switch: "
        "criterion, optim.name: adamw}}",
        "x.yaml:5: search.optim.beta1.when.optim.name: can never be met: all conditions together want "
        "optim.name to have two values at once",
    ),
    (
        "model.widths: {choices: [[64, 128, 256, 512], [64, 128, 256]]}",
        "model.widths.choices.1: model.widths names 3 stages and model.blocks 4: give one number a stage in both",
    ),
]


@pytest.mark.parametrize(("search", "fault"), SEARCH_FAULTS)
def test_a_fault_in_the_search_has_its_line_and_a_suggestion(search: str, fault: str, write: Write) -> None:
    path = write(f"{BASE}  {search}\n")
    expected = [fault if fault.startswith("x.yaml") else f"x.yaml:3: search.{fault}"]
    assert faults_of(path) == expected
    assert [str(found) for found in check_file(path)] == expected


SEARCH = "search:\n  model.se: {choices: [false, true]}\n"

# (the lines before a valid search; the fault: without its place if that is `x.yaml:1: `)
HEAD_FAULTS = [
    ("trails: 3", "trails: no such field; did you mean trials?"),
    ("model: {name: vgg}", "model: no such field; did you mean base.model?"),
    ("epochs: 3", "epochs: no such field; did you mean base.epochs?"),
    ("trials: 0", "trials: must be greater than or equal to 1, not 0"),
    ("trials: many", "trials: must be a whole number, not 'many'"),
    ("description: 3", "description: must be text, not 3"),
    (
        "objective: {metric: acuracy}",
        "objective.metric: must be 'accuracy', 'macro_f1', 'balanced_accuracy' or 'nll', not 'acuracy'; "
        "did you mean accuracy?",
    ),
    (
        "sampler: {name: tpee}",
        "sampler: name must be one of tpe, gp, cmaes, random, qmc, or PACKAGE.MODULE:NAME of your own code, not tpee; "
        "did you mean tpe?",
    ),
    ("sampler: {startup_trials: 3}", "sampler: name is missing"),
    ("sampler: {name: random, startup_trials: 3}", "sampler.startup_trials: no such field"),
    ("pruner:\n  name: rungs\n  keeep: 0.5", "x.yaml:3: pruner.keeep: no such field; did you mean pruner.keep?"),
    ("pruner: {name: rungs, rungs: [0.3, 0.1]}", "pruner: rungs must increase, not [0.3, 0.1]"),
    ("pruner: {name: rungs, rungs: [0.3, 1.0]}", "pruner.rungs.1: must be less than 1, not 1.0"),
    ("pruner: {name: rungs, rungs: []}", "pruner.rungs: must have at least 1 item, not 0"),
    ("data: {val_fractoin: 0.1}", "data.val_fractoin: no such field; did you mean data.val_fraction?"),
    ("data: {val_fraction: 1}", "data.val_fraction: must be less than 1, not 1"),
    ("data: digits", "data: must be a group of fields, not 'digits'"),
    ("base:\n  optim:\n    lrr: 3", "x.yaml:3: base.optim.lrr: no such field; did you mean optim.lr?"),
    (
        "base: {optim.swats.switch: fraction}",
        "base.optim.swats.switch: must be written nested: optim: {swats: {switch: …}}",
    ),
    (
        "base:\n  model: {widths: [8, 16]}",
        "x.yaml:2: base.model: model.widths names 2 stages and model.blocks 4: give one number a stage in both",
    ),
    (
        "base: {optim: {lr: 0.1, lr_scale: 1}}",
        "base.optim: optim.lr and optim.lr_scale exclude each other: give one of them",
    ),
    ("base: 3", "base: must be a recipe's path or a configuration, not 3"),
    (
        "base: recipes/digits_bse.yaml",
        "base: no such file: recipes/digits_bse.yaml; did you mean recipes/digits_base.yaml?",
    ),
    (
        "recipes:\n  - recipes/digits_base.yaml\n  - recipes/none_such.yaml",
        "x.yaml:3: recipes.1: no such file: recipes/none_such.yaml",
    ),
    ("recipes: [3]", "recipes.0: must be text, not 3"),
]


@pytest.mark.parametrize(("head", "fault"), HEAD_FAULTS)
def test_a_fault_outside_the_search_has_its_line_and_a_suggestion(head: str, fault: str, write: Write) -> None:
    expected = fault if fault.startswith("x.yaml") else f"x.yaml:1: {fault}"
    assert faults_of(write(f"{head}\n{SEARCH}")) == [expected]


def test_only_the_members_of_a_circle_of_conditions_are_faults(write: Write) -> None:
    path = write(
        BASE + "  model.se: {choices: [false, true], when: {model.max_pool: false}}\n"
        "  model.max_pool: {choices: [false, true], when: {model.se: false}}\n"
        "  model.dropout: {low: 0, high: 0.5, when: {model.se: true}}\n"
    )
    assert faults_of(path) == [
        "x.yaml:3: search.model.se.when: conditions in a circle: model.se waits for model.max_pool",
        "x.yaml:4: search.model.max_pool.when: conditions in a circle: model.max_pool waits for model.se",
    ]


def test_a_parameter_that_depends_on_an_unreachable_one_is_unreachable(write: Write) -> None:
    path = write(
        BASE + "  optim.swats.tolerance: {low: 1e-9, high: 1e-3, log: true, when: {optim.swats.switch: criterion}}\n"
        "  optim.swats.switch: {choices: [fraction, criterion], when: {optim.name: swats}}\n"
    )
    assert faults_of(path) == [
        "x.yaml:3: search.optim.swats.tolerance.when.optim.swats.switch: can never be met: optim.swats.switch itself "
        "is never searched",
        "x.yaml:4: search.optim.swats.switch.when.optim.name: can never be met: optim.name is not searched, "
        "and the baseline's is 'adamw'",
    ]


def test_parameters_that_depend_on_a_faulty_entry_are_not_reported(write: Write) -> None:
    path = write(
        BASE + "  optim.nmae: {choices: [adamw, swats]}\n"
        "  optim.swats.switch_fraction: {low: 0.1, high: 0.5, when: {optim.name: swats}}\n"
    )
    assert faults_of(path) == ["x.yaml:3: search.optim.nmae: no such field; did you mean optim.name?"]


def test_a_value_is_allowed_if_it_is_valid_with_some_value_of_another_parameter(write: Write) -> None:
    path = write(
        BASE + "  model.widths: {choices: [[64, 128, 256, 512], [64, 128, 256]]}\n"
        "  model.blocks: {choices: [[2, 2, 2, 2], [2, 2, 2]]}\n"
    )
    assert load_space(path).baseline_params() == {"model.widths": "[64, 128, 256, 512]", "model.blocks": "[2, 2, 2, 2]"}


def test_another_family_of_networks_drops_the_fields_of_the_baselines(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(
        "base: {model: {widths: [32, 64], blocks: [1, 1], drop_path: 0.1, dropout: 0.2}}\nsearch:\n"
        "  model.name: {choices: [resnet, vgg, timm/resnet18]}\n"
        "  model.se: {choices: [false, true], when: {model.name: resnet}}\n"
        "  model.hidden: {choices: [null, 64], when: {model.name: vgg}}\n"
    )
    space = load_space(path)
    assert space.baseline_params() == {"model.name": "resnet", "model.se": False}
    vgg, timm = (space.config({"model.name": name}).model for name in ("vgg", "timm/resnet18"))
    assert (vgg.widths, vgg.drop_path, vgg.dropout) == ((32, 64), 0, 0.2)
    assert (timm.widths, timm.drop_path, timm.dropout) == ((64, 128, 256, 512), 0.1, 0.2)
    assert caplog.text == ""
    pinned = load_space(path, ["model.name=vgg"])
    assert list(pinned.search) == ["model.hidden"]
    assert pinned.baseline.model == vgg
    assert "--set model.name=vgg: dropped model.drop_path, which does not apply" in caplog.text


def test_a_pinned_network_leaves_out_searched_fields_that_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    assert not {"model.drop_path", "model.se"} & set(load_space("stl10_small", ["model.name=vgg"]).search)
    assert "--set model.name=vgg: model.drop_path, model.se not searched" in caplog.text
    assert "dropped model.se, model.drop_path, which do not apply" in caplog.text


def test_the_imbalanced_space_searches_both_networks_with_fields_of_their_own() -> None:
    space = load_space("imbalanced")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: dict[str, set[str]] = {"resnet": set(), "vgg": set()}
    for _ in range(40):
        params = space.suggest(study.ask())
        assert space.config(params).model.name == params["model.name"]
        drawn[params["model.name"]] |= params.keys()
    assert drawn["resnet"] - drawn["vgg"] == {"model.drop_path"}
    assert drawn["vgg"] - drawn["resnet"] == {"model.hidden", "model.dropout"}
    assert load_space("imbalanced", ["model.name=vgg"]).baseline.model.drop_path == 0


def test_all_faults_are_reported_at_once_in_the_order_of_their_lines(write: Write) -> None:
    write("description: 7\noptim: {nmae: sgd}\n", "recipes/mine.yaml")
    path = write(
        "trails: 10\n"
        "pruner: {name: rungs, keep: 2}\n"
        "base: recipes/mine.yaml\n"
        "search:\n"
        "  optim.lrr: {low: 1, high: 2}\n"
        "  batch_size: {low: 64, high: 32}\n"
        "  model.se: {choices: [maybe, 1]}\n"
        "  model.se: {choices: [false]}\n"
        "  loss.smoothing: {low: 0, high: 0.2, when: {model.sse: true}}\n"
        "recipes: [recipes/gone.yaml]\n"
    )
    assert faults_of(path, "epochs=few") == [
        "--set epochs: must be a whole number, not 'few'",
        "recipes/mine.yaml:1: description: must be text, not 7",
        "recipes/mine.yaml:2: optim.nmae: no such field; did you mean optim.name?",
        "x.yaml:1: trails: no such field; did you mean trials?",
        "x.yaml:2: pruner.keep: must be less than 1, not 2",
        "x.yaml:5: search.optim.lrr: no such field; did you mean optim.lr?",
        "x.yaml:6: search.batch_size.high: must be greater than low, 64, not 32",
        "x.yaml:7: search.model.se.choices.0: must be true or false, not 'maybe'",
        "x.yaml:7: search.model.se.choices.1: must be true or false, not 1",
        "x.yaml:8: model.se: given twice; first on line 7",
        "x.yaml:9: search.loss.smoothing.when.model.sse: no such field; did you mean model.se?",
        "x.yaml:10: recipes.0: no such file: recipes/gone.yaml",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "x.yaml:1: an empty file"),
        ("[1]", "x.yaml:1: must be a mapping of keys to values"),
        ("epochs: 3", "x.yaml:1: a recipe, where a search space is wanted: hpo train x"),
        ("base: {}", "x.yaml:1: search: must name at least one field, with choices or with low and high"),
        ("base: {}\nsearch: {}", "x.yaml:2: search: must name at least one field, with choices or with low and high"),
        ("a: [", "x.yaml:1: not YAML: did not find expected node content"),
    ],
)
def test_a_file_that_is_not_a_space_is_refused(text: str, fault: str, write: Write) -> None:
    assert faults_of(write(text)) == [fault]


def test_a_file_that_is_not_text_is_refused(write: Write) -> None:
    path = write("")
    path.write_bytes(b"a: \xff\xfe")
    assert faults_of(path) == ["x.yaml:1: not UTF-8 text: invalid start byte at byte 3"]


def test_the_nearest_name_is_suggested_for_an_unknown_one() -> None:
    assert faults_of("digts")[0].endswith("did you mean digits?")
    assert faults_of("digits_base")[0].endswith("digits_base is a recipe: hpo train digits_base")
    assert faults_of("folder/none.yaml") == ["folder/none.yaml: no such file"]
    with pytest.raises(SpaceError, match="digits is a space: hpo run digits"):
        load_recipe("digits")
    with pytest.raises(SpaceError, match="a search space, where a recipe is wanted"):
        load_recipe(SPACES / "digits.yaml")


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz", "photos.npz", "labels.csv", "my photos"])
def test_images_given_as_a_space_or_recipe_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "." in name:
        Path(name).write_bytes(b"PK")
    else:
        Path(name).mkdir()
    data = shlex.quote(name)
    for load, noun, command in (
        (load_space, "search space", f"hpo run SPACE --data {data}, with a SPACE"),
        (load_recipe, "recipe", f"hpo train RECIPE --data {data}, with a RECIPE"),
    ):
        with pytest.raises(SpaceError, match=re.escape(f"of images, not a {noun}: {command} from hpo space list")):
            load(name)


def test_a_space_is_found_before_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_space("digits").name == "digits"


@pytest.mark.parametrize(
    ("meant", "found"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("weight_decay", "optim.weight_decay"),
        ("weigth_decay", "optim.weight_decay"),
        ("model.smoothing", "loss.smoothing"),
        ("augment.strenght", "augment.strength"),
        ("qqqq", None),
    ],
)
def test_the_nearest_field_is_found_by_its_last_part_or_its_spelling(meant: str, found: str | None) -> None:
    assert nearest_field(meant, config_fields()) == found


# Shipped files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_has_no_fault_and_names_the_schema(path: Path) -> None:
    assert check_file(path) == []
    schema = "schema.json" if path.parent == SPACES else "../schema.json"
    assert path.read_text().startswith(f"# yaml-language-server: $schema={schema}\n")


def test_the_stl10_space_covers_the_experiments_of_its_recipes() -> None:
    space = load_space("stl10_small")
    assert space.trials == 200
    assert space.baseline.epochs == 60
    assert space.search["optim.name"].describe()["choices"] == ["sgd", "adamw", "nadam", "swats", "muon"]
    assert space.search["averaging.name"].describe()["choices"] == ["none", "ema", "swa"]
    assert set(space.search) >= {
        "optim.lr_scale", "optim.weight_decay", "batch_size", "augment.strength", "augment.ops", "augment.mixup",
        "augment.cutmix", "augment.rotation_degrees", "augment.color_jitter", "augment.erase", "loss.smoothing",
        "loss.smoothing_final", "model.width", "model.depth", "model.drop_path", "model.dropout", "model.norm",
        "model.se", "schedule.name",
    }  # fmt: skip
    assert [recipe.name for recipe in space.recipes] == [
        "stl10_jan30_ema", "stl10_jan29_sgd", "stl10_jan28_swats", "stl10_jan25_resnet18",
    ]  # fmt: skip


def test_the_imbalanced_space_maximizes_macro_f1_and_searches_sampling_and_loss() -> None:
    space = load_space("imbalanced")
    assert (space.metric, space.trials) == ("macro_f1", 100)
    assert space.baseline.loss.logit_adjustment == 0, (
        "trial 0 does nothing about imbalance, so that the search can prove it"
    )
    assert {"sampling.name", "sampling.oversample", "loss.logit_adjustment", "loss.class_weights"} <= set(space.search)
    assert space.search["loss.class_weights_from_fraction"].when == {"loss.class_weights": ("inverse", "effective")}


def test_the_space_of_scenes_fine_tunes_pretrained_networks() -> None:
    space = load_space("intel_scenes")
    assert space.baseline.model.pretrained
    assert space.baseline.data.normalize == "imagenet"
    assert {"model.name", "optim.backbone_lr_scale", "optim.head_only_fraction"} <= set(space.search)


def test_a_field_of_residual_networks_can_be_set_in_every_space_of_them() -> None:
    """Overrides apply to a space's recipes too, so a recipe of another family would refuse it."""
    for name in ("digits", "stl10_small", "cifar100", "imbalanced"):
        assert load_space(name, ["model.stem_stride=2"]).baseline.model.stem_stride == 2


def test_digits_are_never_flipped() -> None:
    space = load_space("digits")
    assert space.baseline.augment.flip == space.baseline.augment.vertical_flip == 0
    assert not {"augment.flip", "augment.vertical_flip"} & set(space.search)


@pytest.mark.parametrize("name", HASHES)
def test_every_random_trial_of_a_shipped_space_is_a_valid_configuration_that_it_can_express(name: str) -> None:
    space = load_space(name)
    for params in trials(space, 100):
        config = space.config(params)
        assert space.express(config) == params


def test_the_users_folder_takes_precedence_over_the_installed_one(write: Write) -> None:
    write("description: mine\n" + SEARCH, "search_spaces/digits.yaml")
    write("description: my recipe\nepochs: 3\n", "search_spaces/recipes/quick.yaml")
    write("a: [", "search_spaces/broken.yaml")
    assert load_space("digits").description == "mine"
    assert load_space("stl10_small").path.parent == SPACES
    assert load_recipe("quick").config.epochs == 3
    listed = {(entry.kind, entry.name): entry for entry in list_spaces()}
    assert listed["space", "digits"].description == "mine"
    assert listed["recipe", "quick"].description == "my recipe"
    assert listed["recipe", "digits_base"].path.parent == SPACES / "recipes"
    assert listed["space", "broken"].description == "cannot be read: hpo space check"
    assert check_file("digits") == []
    assert check_file("broken") != []


@pytest.mark.parametrize(
    ("result", "figure"),
    [
        ("92 % on their validation set (10 %); 89.4 % on the test set", "92 %"),
        ("81.45 % as their best accuracy, after 4 h", "81.45 %"),
        ("none published; the README says what it reaches here", "none published"),
        ("curves only, as pictures", "curves only"),
        ("", ""),
    ],
)
def test_a_result_is_listed_as_its_figure(result: str, figure: str, write: Write) -> None:
    write(f'result: "{result}"\nepochs: 3\n', "search_spaces/recipes/quick.yaml")
    assert {entry.name: entry.result for entry in list_spaces()}["quick"] == figure


def test_a_baseline_recipe_is_looked_up_relative_to_the_space_first(write: Write, space_of: SpaceOf) -> None:
    write("epochs: 7\n", "mine/recipes/digits_base.yaml")
    path = write("base: recipes/digits_base.yaml\n" + SEARCH, "mine/x.yaml")
    assert load_space(path).baseline.epochs == 7
    assert space_of("base: recipes/digits_base.yaml\n" + SEARCH).baseline.epochs != 7


# Parameters and configurations


def test_a_range_has_the_type_of_its_field(space_of: SpaceOf) -> None:
    space = space_of(
        BASE + "  augment.ops: {low: 0, high: 4, step: 2}\n  batch_size: {low: 16, high: 256, log: true}\n"
        "  model.width: {low: 1, high: 2, step: 0.25}\n  optim.lr_scale: {low: 0.1, high: 10, log: true}\n"
        "  optim.grad_clip: {choices: [null, 1]}\n  model.se: {choices: [true, false]}\n"
    )
    assert space.distributions == {
        "augment.ops": optuna.distributions.IntDistribution(0, 4, step=2),
        "batch_size": optuna.distributions.IntDistribution(16, 256, log=True),
        "model.width": optuna.distributions.FloatDistribution(1.0, 2.0, step=0.25),
        "optim.lr_scale": optuna.distributions.FloatDistribution(0.1, 10, log=True),
        "optim.grad_clip": optuna.distributions.CategoricalDistribution([None, 1.0]),
        "model.se": optuna.distributions.CategoricalDistribution([True, False]),
    }
    config = space.config(trials(space, 1)[0])
    assert type(config.model.width) is float


@pytest.mark.filterwarnings("error")
def test_lists_survive_a_storage_exactly(space_of: SpaceOf, tmp_path: Path) -> None:
    space = space_of(
        "base: {model: {blocks: [1, 1], widths: [32, 64]}}\nsearch:\n  model.widths: {choices: [[32, 64], [16, 32]]}\n"
    )
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(8):
        space.suggest(study.ask())
    seen = {space.config(trial.params).model.widths for trial in study.get_trials()}
    assert seen == {(32, 64), (16, 32)}
    assert space.baseline_params() == {"model.widths": "[32, 64]"}


CONDITIONAL = (
    "base: {optim: {swats: {switch: fraction, switch_fraction: 0.4}}}\nsearch:\n"
    "  optim.swats.switch_fraction: {low: 0.1, high: 0.5, when: {optim.swats.switch: fraction}}\n"
    "  optim.swats.switch: {choices: [fraction, criterion], when: {optim.name: [swats]}}\n"
    "  optim.name: {choices: [adamw, swats]}\n"
)


def test_an_inactive_parameter_is_not_suggested_and_keeps_the_baselines_value(space_of: SpaceOf) -> None:
    space = space_of(CONDITIONAL)
    assert list(space.search) == ["optim.name", "optim.swats.switch", "optim.swats.switch_fraction"]
    seen = set()
    for params in trials(space, 40):
        seen.add(tuple(params))
        swats = params["optim.name"] == "swats"
        assert ("optim.swats.switch" in params) == swats
        # The baseline's switch is `fraction`, but an inactive parameter meets no condition.
        assert ("optim.swats.switch_fraction" in params) == (swats and params["optim.swats.switch"] == "fraction")
        config = space.config(params)
        if "optim.swats.switch_fraction" not in params:
            assert config.optim.swats.switch_fraction == 0.4
        assert space.express(config) == params
    assert len(seen) == 3
    assert space.baseline_params() == {"optim.name": "adamw"}


def test_a_condition_can_name_a_field_that_is_not_searched(space_of: SpaceOf) -> None:
    space = space_of(BASE + "  optim.beta1: {low: 0.8, high: 0.95, when: {optim.name: adamw}}\n")
    assert space.baseline_params() == {"optim.beta1": 0.9}


def test_trial_0_is_the_baseline() -> None:
    for name in HASHES:
        space = load_space(name)
        assert space.config(space.baseline_params()) == space.baseline
        for path, value in space.baseline_params().items():
            distribution = space.distributions[path]
            assert distribution._contains(distribution.to_internal_repr(value))


@pytest.mark.parametrize(("low", "high"), [(4.0, 10), (0.1, 4.0)])
def test_a_baseline_with_lr_can_be_searched_by_lr_scale_and_vice_versa(
    low: float, high: float, space_of: SpaceOf
) -> None:
    # 2e-3 at batch 64 is 4 × AdamW's reference of 1e-3 × (64 / 256) ** 0.5, here right on a bound.
    base = "base: {batch_size: 64, optim: {name: adamw, lr: 0.002}}\nsearch:\n"
    space = space_of(f"{base}  optim.lr_scale: {{low: {low}, high: {high}}}\n")
    assert space.baseline_params() == {"optim.lr_scale": 4.0}
    assert space.baseline.optim.lr is None
    assert space.baseline.optim.peak_lr(64) == pytest.approx(0.002, rel=1e-12)
    base = "base: {batch_size: 64, optim: {name: adamw, lr_scale: 4}}\nsearch:\n"
    space = space_of(f"{base}  optim.lr: {{low: 1e-4, high: 1e-2, log: true}}\n")
    assert space.baseline_params() == {"optim.lr": pytest.approx(0.002, rel=1e-12)}


def test_the_baselines_lr_is_kept_if_the_learning_rate_is_not_searched(space_of: SpaceOf) -> None:
    space = space_of("base: {optim: {lr: 0.002}}\n" + SEARCH)
    assert space.baseline.optim.lr == 0.002


def test_only_configurations_that_a_space_can_draw_exactly_are_expressed(space_of: SpaceOf) -> None:
    space = space_of(BASE + "  optim.lr_scale: {low: 0.5, high: 2}\n  model.width: {low: 0.5, high: 1.5, step: 0.5}\n")
    base = space.baseline
    assert space.express(base) == {"optim.lr_scale": 1.0, "model.width": 1.0}
    assert space.express(base.override({"seed": 5, "data.name": "elsewhere"})) == space.baseline_params()
    assert space.express(base.override({"optim.lr": base.optim.peak_lr(128) * 2})) == {
        "optim.lr_scale": 2.0,
        "model.width": 1.0,
    }
    for values in (
        {"optim.lr_scale": 2.1},
        {"model.width": 0.75},
        {"model.se": True},
        {"epochs": 21},
        {"data.val_fraction": 0.1},
        {"data.split_seed": 1},
        {"optim.grad_clip": 1.0},
    ):
        assert space.express(base.override(values)) is None, values


def test_contradicting_values_are_refused_by_the_configuration(space_of: SpaceOf) -> None:
    space = space_of(
        BASE + "  model.widths: {choices: [[64, 128, 256, 512], [64, 128, 256]]}\n"
        "  model.blocks: {choices: [[2, 2, 2, 2], [2, 2, 2]]}\n"
    )
    with pytest.raises(ValidationError, match="one number a stage in both"):
        space.config({"model.widths": "[64, 128, 256]", "model.blocks": "[2, 2, 2, 2]"})
    with pytest.raises(KeyError):
        space.config({"model.se": True})


def test_a_recipe_whose_network_refuses_an_override_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    named = [recipe.name for recipe in load_space("imbalanced").recipes]
    assert any("vgg" in name for name in named)
    assert any("resnet" in name for name in named)
    left = [recipe.name for recipe in load_space("imbalanced", {"model.se": True}).recipes]
    assert left == [name for name in named if "vgg" not in name]
    assert "recipe imbalanced_vgg16_12 is left out: model.se shapes resnet only" in caplog.text


def test_recipes_get_the_spaces_data_and_epochs(write: Write, space_of: SpaceOf) -> None:
    write(
        "epochs: 200\ndata: {name: stl10, val_fraction: 0.08, normalize: half}\nmodel: {se: true}\n", "recipes/a.yaml"
    )
    space = space_of(
        "data: {val_fraction: 0.2}\nbase: {epochs: 20, data: {normalize: imagenet}}\nrecipes: [recipes/a.yaml]\n"
        + SEARCH
    )
    (recipe,) = space.recipes
    assert recipe.config.epochs == 20
    assert recipe.config.data == space.baseline.data
    assert (space.baseline.data.val_fraction, space.baseline.data.normalize) == (0.2, "imagenet")
    assert space.express(recipe.config) == {"model.se": True}
    assert load_recipe("recipes/a.yaml").config.epochs == 200


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("accuracy", "maximize"), ("macro_f1", "maximize"), ("balanced_accuracy", "maximize"), ("nll", "minimize")],
)
def test_each_metric_has_a_direction(metric: str, direction: str, space_of: SpaceOf) -> None:
    space = space_of(f"objective: {{metric: {metric}}}\n{SEARCH}")
    assert (space.metric, space.direction) == (metric, direction)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        *(("sampler", {"name": name}) for name in ("tpe", "gp", "cmaes", "random", "qmc")),
        *(("pruner", {"name": name}) for name in ("rungs", "none", "successive_halving")),
        ("pruner", {"name": "median", "warmup_fraction": 0.1}),
        ("pruner", {"name": "percentile", "keep": 0.25}),
        ("pruner", {"name": "hyperband", "reduction_factor": 3}),
    ],
)
def test_every_sampler_and_pruner_can_be_named(section: str, settings: dict[str, Any], space_of: SpaceOf) -> None:
    found = getattr(space_of(dump_yaml({section: settings}) + SEARCH), section)
    assert settings.items() <= found.model_dump().items()


def test_a_space_can_be_sent_to_another_process() -> None:
    space = load_space("stl10_small")
    assert space.distributions
    again = pickle.loads(pickle.dumps(space))
    assert again == space
    assert again.hash == space.hash


# --set


def test_set_pins_a_searched_field_and_changes_other_fields() -> None:
    space = load_space("stl10_small", ["batch_size=48", "epochs=3", "data.val_fraction=0.3", "optim.grad_clip=null"])
    assert "batch_size" not in space.search
    assert (space.baseline.batch_size, space.baseline.epochs, space.baseline.data.val_fraction) == (48, 3, 0.3)
    for recipe in space.recipes:
        assert (recipe.config.batch_size, recipe.config.epochs, recipe.config.data.val_fraction) == (48, 3, 0.3)


def test_overrides_can_be_python_values() -> None:
    as_text = load_space("digits", ["epochs=3", "model.widths=[8, 16]", "augment.flip=0"])
    assert load_space("digits", {"epochs": 3, "model.widths": (8, 16), "augment.flip": 0.0}) == as_text
    assert as_text.baseline.model.widths == (8, 16)


def test_text_fields_take_the_text_of_set_unparsed() -> None:
    assert load_space("digits", ["data.name=2024"]).baseline.data.name == "2024"
    assert load_space("digits", ["data.name=a: b=c"]).baseline.data.name == "a: b=c"
    assert load_space("digits", ["data.name='quoted'"]).baseline.data.name == "quoted"


def test_pinning_one_name_of_the_rate_pins_the_other() -> None:
    space = load_space("digits", ["optim.lr=0.01"])
    assert "optim.lr_scale" not in space.search
    assert space.baseline.optim.lr == 0.01
    assert space.baseline.optim.lr_scale is None


def test_pinning_the_field_of_a_condition_decides_it(write: Write) -> None:
    path = write(CONDITIONAL)
    assert list(load_space(path, ["optim.name=swats"]).search) == ["optim.swats.switch", "optim.swats.switch_fraction"]
    assert load_space(path, ["optim.name=swats"]).baseline_params() == {
        "optim.swats.switch": "fraction",
        "optim.swats.switch_fraction": 0.4,
    }
    assert faults_of(path, "optim.name=adamw") == [
        "--set: leaves nothing to search; one configuration is trained by: hpo train"
    ]


def test_set_changes_the_settings_of_the_search() -> None:
    space = load_space("digits", ["pruner.keep=0.5", "sampler.startup_trials=3", "objective.metric=nll", "trials=7"])
    assert space.pruner.name == "rungs"
    assert space.pruner.keep == 0.5
    assert space.sampler.name == "tpe"
    assert space.sampler.startup_trials == 3
    assert (space.metric, space.trials) == ("nll", 7)


def test_another_pruner_or_sampler_does_not_inherit_the_files_settings() -> None:
    space = load_space("digits", ["sampler.name=random", "pruner.name=median", "pruner.startup_trials=9"])
    assert space.sampler.model_dump() == {"name": "random"}
    assert space.pruner.model_dump() == {"name": "median", "startup_trials": 9, "warmup_fraction": 0.0}
    assert load_space("digits", ["pruner.name=none"]).pruner.model_dump() == {"name": "none"}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("optim.nmae=sgd", "--set optim.nmae: no such field; did you mean optim.name?"),
        ("trails=3", "--set trails: no such field; did you mean trials?"),
        ("pruner.kep=0.5", "--set pruner.kep: no such field; did you mean pruner.keep?"),
        ("pruner.keep=5", "--set pruner.keep: must be less than 1, not 5"),
        ("sampler.name=tp", "--set sampler.name: name must be one of tpe, gp, cmaes, random, qmc, or "
         "PACKAGE.MODULE:NAME of your own code, not tp; did you mean tpe?"),
        ("objective.metric=nl", "--set objective.metric: must be 'accuracy', 'macro_f1', 'balanced_accuracy' or 'nll', "
         "not 'nl'; did you mean nll?"),
        ("epochs=0", "--set epochs: must be greater than or equal to 1, not 0"),
        ("epochs=3.0", "--set epochs: must be a whole number, not 3.0"),
        ("epochs=[", "--set epochs: not YAML: did not find expected node content"),
        ("epochs", "--set epochs: must be key=value"),
        ("optim=sgd", "--set optim: is a group of fields; name one of them: optim.name, "),
        ("seed=3", "--set seed: a study seeds every trial itself; --seed sets the study's"),
        ("model.widths=[8, 16, 32]", "--set model.widths: model.widths names 3 stages and model.blocks 2: "),
    ],
)  # fmt: skip
def test_a_fault_in_set_names_its_key(override: str, fault: str) -> None:
    (found,) = faults_of("digits", override)
    assert found.startswith(fault)


def test_a_key_set_twice_is_a_fault() -> None:
    assert faults_of("digits", "epochs=3", "epochs=4") == ["--set epochs: given twice"]


def test_an_override_that_a_recipe_or_the_search_contradicts_is_refused(write: Write) -> None:
    write("model: {blocks: [1, 1], widths: [8, 16]}\n", "recipes/a.yaml")
    path = write("base: {}\nrecipes: [recipes/a.yaml]\n" + SEARCH)
    assert faults_of(path, "model.widths=[8, 8, 8, 8]") == [
        "--set model.widths: a: model.widths names 4 stages and model.blocks 2: give one number a stage in both"
    ]
    path = write(BASE + "  model.width: {low: 0.5, high: 1}\n")
    assert faults_of(path, "model.name=timm/resnet18") == [
        "--set: leaves nothing to search; one configuration is trained by: hpo train"
    ]


def test_set_changes_a_recipe_including_its_seed() -> None:
    recipe = load_recipe("digits_base", ["epochs=3", "seed=5", "optim.lr=0.01"])
    assert (recipe.config.epochs, recipe.config.seed, recipe.config.optim.lr) == (3, 5, 0.01)
    with pytest.raises(SpaceError, match=r"^--set pruner.keep: no such field"):
        load_recipe("digits_base", ["pruner.keep=0.5"])


# Recipes as text


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optim.lr": 1 / 3, "seed": 2**63 - 1},
        {"data.name": "/a b/c: d.zip", "data.image_size": 96, "optim.grad_clip": 1e-05, "loss.smoothing_final": 0.0},
        {"data.name": "null"},
        {"data.name": ".5e3"},
        {"model.widths": (8, 16), "model.blocks": (1, 3), "model.se": True},
    ],
)
def test_a_written_configuration_is_read_back_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig().override(values)
    assert recipe_from_yaml(to_yaml(config)).config == config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_recipe(tmp_path / "config.yaml").config == config


def test_a_written_configuration_has_all_fields_but_the_unused_learning_rate() -> None:
    document, _ = parse_yaml(to_yaml(TrainConfig()), "x")
    assert document is not None
    written = TrainConfig.model_validate(document.content).flat()
    assert set(written) == set(config_fields())
    assert "lr" not in document.content["optim"]
    assert document.content["optim"]["lr_scale"] == 1.0


def test_the_faults_of_a_recipe_text_have_the_given_name() -> None:
    with pytest.raises(SpaceError) as caught:
        recipe_from_yaml("sorce: me\noptim: {lrr: 1}\nepochs: many\n", "trials/00003/config.yaml")
    assert list(map(str, caught.value.faults)) == [
        "trials/00003/config.yaml:1: sorce: no such field; did you mean source?",
        "trials/00003/config.yaml:2: optim.lrr: no such field; did you mean optim.lr?",
        "trials/00003/config.yaml:3: epochs: must be a whole number, not 'many'",
    ]


# Identity


SPACE = (
    "description: a\ntrials: 5\nsampler: {name: tpe}\npruner: {name: rungs, rungs: [0.1, 0.3], keep: 0.3}\n"
    "data: {name: digits, val_fraction: 0.25}\nobjective: {metric: accuracy}\nbase: {epochs: 20, model: {se: true}}\n"
    "search:\n  optim.lr_scale: {low: 0.1, high: 10, log: true}\n  batch_size: {choices: [64, 128]}\n"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("description: a", "description: b"),
        ("trials: 5", "trials: 6"),
        ("{name: tpe}", "{name: random}"),
        ("keep: 0.3", "keep: 0.4"),
        ("name: digits", "name: /copy/of/digits"),
        ("high: 10,", "high: 10.0,"),
        ("epochs: 20,", "epochs: 20, seed: 3,"),
        ("objective:", "# a comment\nobjective:"),
        (
            "  optim.lr_scale: {low: 0.1, high: 10, log: true}\n  batch_size: {choices: [64, 128]}\n",
            "  batch_size:\n    choices: [64, 128]\n  optim.lr_scale: {high: 10, low: 0.1, log: true}\n",
        ),
    ],
)
def test_the_hash_ignores_settings_that_do_not_change_trials(old: str, new: str, space_of: SpaceOf) -> None:
    assert old in SPACE
    before = space_of(SPACE)
    after = space_of(SPACE.replace(old, new), "other.yaml")
    assert before.hash == after.hash
    assert diff(before.identity(), after.identity()) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("high: 10,", "high: 20,", "search.optim.lr_scale: high 10 → 20"),
        (
            "low: 0.1, high: 10, log: true",
            "low: 0.2, high: 10",
            "search.optim.lr_scale: low 0.1 → 0.2, log true → none",
        ),
        ("[64, 128]", "[128, 64]", "search.batch_size: choices [64, 128] → [128, 64]"),
        ("  batch_size: {choices: [64, 128]}\n", "", "search.batch_size: removed (was choices [64, 128])"),
        ("search:\n", "search:\n  augment.ops: {low: 0, high: 2}\n", "search.augment.ops: added (low 0, high 2)"),
        ("se: true", "se: false", "base.model.se: true → false"),
        ("epochs: 20", "epochs: 30", "epochs: 20 → 30"),
        ("val_fraction: 0.25", "val_fraction: 0.2", "data.val_fraction: 0.25 → 0.2"),
        ("rungs: [0.1, 0.3]", "rungs: [0.1]", "pruner.rungs: [0.1, 0.3] → [0.1]"),
        ("{name: rungs, rungs: [0.1, 0.3], keep: 0.3}", "{name: none}", "pruner.rungs: [0.1, 0.3] → null"),
        ("metric: accuracy", "metric: nll", "objective.metric: accuracy → nll"),
    ],
)
def test_the_hash_changes_with_settings_that_change_trials_and_diff_shows_them(
    old: str, new: str, difference: str, space_of: SpaceOf
) -> None:
    assert old in SPACE
    before = space_of(SPACE)
    after = space_of(SPACE.replace(old, new), "other.yaml")
    assert before.hash != after.hash
    assert diff(before.identity(), after.identity()) == [difference]
    # As stored in a study.
    assert diff(json.loads(json.dumps(before.identity())), after.identity()) == [difference]


def test_overrides_change_the_identity() -> None:
    lines = diff(load_space("digits").identity(), load_space("digits", ["epochs=3", "optim.name=sgd"]).identity())
    assert lines == [
        "epochs: 20 → 3",
        "base.optim.name: adamw → sgd",
        "search.optim.name: removed (was choices [sgd, adamw, nadam, swats])",
    ]


# Schema and imports


def test_the_schema_has_every_field_with_its_bounds() -> None:
    schema = json_schema()
    assert schema == json.loads(json.dumps(schema))
    search = schema["definitions"]["SearchSpace"]["properties"]["search"]
    assert search["additionalProperties"] is False
    searchable = {path for path in config_fields() if path not in ("seed", "epochs") and not path.startswith("data.")}
    assert set(search["properties"]) == searchable
    for path, entry in search["properties"].items():
        assert entry["description"] == config_fields()[path].info.description, path
    choices, numbers = search["properties"]["loss.smoothing"]["anyOf"]
    assert choices["properties"]["choices"]["items"] == {"type": "number", "minimum": 0, "maximum": 0.9}
    assert numbers["properties"]["low"] == {"type": "number", "minimum": 0, "maximum": 0.9}
    (choices,) = search["properties"]["optim.name"]["anyOf"]
    optimizers = ["sgd", "adamw", "nadam", "swats", "muon", "logistic"]
    named, own = choices["properties"]["choices"]["items"]["anyOf"]
    assert named["enum"] == optimizers
    assert ":" in own["pattern"]


def test_every_reference_in_the_schema_resolves() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    for part in text.split('"$ref": "')[1:]:
        name = part.split('"')[0].removeprefix("#/definitions/")
        assert name in schema["definitions"], name


def test_reading_spaces_imports_neither_torch_nor_optuna() -> None:
    code = (
        "import sys; from hpo.space import list_spaces, load_space; list_spaces(); load_space('digits');"
        "assert not {'torch', 'optuna', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SPACES.parent)
