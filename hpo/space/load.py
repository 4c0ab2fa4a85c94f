"""Builds checked `SearchSpace`s and `Recipe`s from files and `--set`. All faults are collected before any is raised.

A space has three layers: its baseline (a recipe's file, or a configuration in place), its own `data`, then `--set`. A
field in `--set` is pinned: it is no longer searched, and recipes get its value too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from core.config import TrainConfig
from hpo.errors import Fault, SpaceError
from hpo.paths import search_space_dirs
from hpo.space import parameters
from hpo.space.catalogue import find, kind_of, list_spaces
from hpo.space.confirmation import ConfirmationSpace
from hpo.space.document import Document, dump_yaml, parse_yaml, read
from hpo.space.fields import config_fields, did_you_mean, nearest, nearest_field, no_such_field
from hpo.space.grammar import ConfirmationText, RecipeNotes, SpaceFile, explain, location, quoted, siblings
from hpo.space.space import RATES, Parameter, Recipe, SearchSpace, in_rate_of

Overrides = Mapping[str, Any] | Iterable[str]
"""`{"epochs": 3}`, or `["epochs=3"]` as given to `--set`."""

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result", SearchSpace, Recipe)

logger = logging.getLogger(__name__)

SETTINGS = ("objective", "sampler", "pruner", "confirm")
"""The sections of a space, beside those of `TrainConfig`, that `--set` can change."""


def load_space(name_or_path: str | Path, overrides: Overrides = ()) -> SearchSpace:
    """Read and check a search space.

    Args:
        name_or_path: a name in `search_spaces/`, or a path.
        overrides: fields to pin, and settings of objective, sampler, pruner, confirm and trials to change.

    Raises:
        SpaceError: all faults of the file, of its recipes, and of the overrides.
    """
    path = find(str(name_or_path), "space")
    loader = _Loader(_parsed(overrides))
    document = loader.read(path)
    return loader.checked(None if document is None else loader.space(document, path))


def load_recipe(name_or_path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a name in `search_spaces/recipes/`, or a path, such as a trial's `config.yaml`.
        overrides: fields to change.

    Raises:
        SpaceError: all faults of the file and of the overrides.
    """
    path = find(str(name_or_path), "recipe")
    loader = _Loader(_parsed(overrides), settings=False)
    document = loader.read(path)
    recipe = None if document is None else loader.recipe(document, path)
    return loader.checked(None if recipe is None else loader.overridden(recipe))


def override_config(config: TrainConfig, overrides: Overrides) -> TrainConfig:
    """Apply overrides to a configuration, checked as those of a recipe are.

    Raises:
        SpaceError: All faults of the overrides.
    """
    loader = _Loader(_parsed(overrides), settings=False)
    return loader.checked(loader.overridden(Recipe("trial", Path("trial.yaml"), "", "", "", "", config))).config


def recipe_from_yaml(text: str, name: str = "config.yaml") -> Recipe:
    """Read a recipe from text written by `to_yaml`.

    Args:
        text: the YAML.
        name: the file's name in messages.

    Raises:
        SpaceError: all its faults.
    """
    loader = _Loader({})
    document = loader.mapping(*parse_yaml(text, name))
    return loader.checked(None if document is None else loader.recipe(document, Path(name)))


def space_from_yaml(text: str, name: str) -> SearchSpace:
    """Read a space from text written by `space_to_yaml`.

    Args:
        text: the YAML.
        name: the space's name.

    Raises:
        SpaceError: all its faults.
    """
    loader = _Loader({})
    document = loader.mapping(*parse_yaml(text, name))
    return loader.checked(None if document is None else loader.written_space(document, Path(f"{name}.yaml")))


def to_yaml(config: TrainConfig) -> str:
    """Write a complete configuration as a recipe that `load_recipe` reads back exactly."""
    return dump_yaml(_tree(config))


def _tree(config: TrainConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for rate in ("lr", "lr_scale"):  # exactly one of the two may be given
        if tree["optim"][rate] is None:
            del tree["optim"][rate]
    return tree


def space_to_yaml(space: SearchSpace) -> str:
    """Write a space without its recipes, for workers that do not have its file."""
    if isinstance(space, ConfirmationSpace):
        return dump_yaml({**space.described(), "base": _tree(space.baseline)})
    return dump_yaml(
        {
            "description": space.description,
            "objective": space.objective.model_dump(mode="json"),
            "trials": space.trials,
            "sampler": space.sampler.model_dump(mode="json"),
            "pruner": space.pruner.model_dump(mode="json"),
            "confirm": space.confirm.model_dump(mode="json"),
            "base": _tree(space.baseline),
            "search": {path: parameter.describe() for path, parameter in space.search.items()},
        }
    )


def check_file(name_or_path: str | Path) -> list[Fault]:
    """Return all faults of a search space or recipe, given by path or by name."""
    path = Path(name_or_path)
    if not path.is_file():
        known = {entry.name: entry.path for entry in reversed(list_spaces())}  # a space before a recipe of its name
        path = known.get(str(name_or_path), path)
    loader = _Loader({})
    document = loader.read(path)
    if document is not None:
        (loader.space if kind_of(document) == "space" else loader.recipe)(document, path)
    return loader.sorted_faults()


def _parsed(overrides: Overrides) -> dict[str, Any]:
    """Parse `--set key=value`. Values are YAML, but the text itself for a field of text.

    Raises:
        SpaceError: an item is not `key=value`, is given twice, or its value is not YAML.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    found: dict[str, Any] = {}
    faults: list[Fault] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        where = f"--set {key}"
        if not equals:
            faults.append(Fault(f"--set {item}", "must be key=value"))
            continue
        if key in found:
            faults.append(Fault(where, "given twice"))
            continue
        field = config_fields().get(key)
        document, wrong = parse_yaml(text, where)
        found[key] = document.plain() if document is not None and text.strip() else None
        if field is not None and field.kind == "str":
            found[key] = found[key] if isinstance(found[key], str) else text
        else:
            faults += [Fault(where, fault.message) for fault in wrong]
    if faults:
        raise SpaceError(faults)
    return found


class _Loader:
    """Reads files with one set of overrides and collects their faults."""

    def __init__(self, overrides: Mapping[str, Any], settings: bool = True) -> None:
        self.faults: list[Fault] = []
        self.settings = {key: value for key, value in overrides.items() if settings and _is_setting(key)}
        self.fields = self._field_values({key: value for key, value in overrides.items() if key not in self.settings})

    def checked(self, result: Result | None) -> Result:
        """Return the result; raise SpaceError if there are faults."""
        if self.faults or result is None:
            raise SpaceError(self.sorted_faults())
        return result

    def sorted_faults(self) -> list[Fault]:
        """The faults without repetitions, by file and line."""

        def place(fault: Fault) -> tuple[str, int]:
            name, _, line = fault.where.rpartition(":")
            return (name, int(line)) if line.isdigit() else (fault.where, 0)

        return sorted(dict.fromkeys(self.faults), key=place)

    def read(self, path: Path) -> Document | None:
        """Read a file that must contain a mapping."""
        return self.mapping(*read(path))

    def mapping(self, document: Document | None, faults: list[Fault]) -> Document | None:
        """Collect a document's faults; None unless it is a mapping."""
        self.faults += faults
        if document is not None and not isinstance(document.root.value, dict):
            self._fault(document.at(), "must be a mapping of keys to values")
            return None
        return document

    # Recipes

    def recipe(self, document: Document, path: Path) -> Recipe | None:
        """The recipe in a file, without overrides."""
        if kind_of(document) == "space":
            self._fault(document.at(), f"a search space, where a recipe is wanted: hpo run {path.stem}")
            return None
        tree = document.plain()
        given_notes = {key: tree.pop(key) for key in list(tree) if key in RecipeNotes.model_fields}
        notes = self._validated(RecipeNotes, given_notes, document)
        config = self._validated(TrainConfig, tree, document, more=RecipeNotes.model_fields)
        if not path.stem.strip("."):  # `...yaml`: the name becomes a folder, which would be the parent folder
            self._fault(document.at(), f"a file named {path.name} gives the recipe no name; rename it")
            return None
        if notes is None or config is None:
            return None
        return Recipe(path.stem, path, notes.description, notes.source, notes.result, notes.guesses, config)

    def overridden(self, recipe: Recipe) -> Recipe:
        """The recipe with the overrides applied."""
        config = self._override(recipe.config, f"{recipe.name}: ")
        return recipe if config is None else replace(recipe, config=config)

    def _to_beat(self, recipe: Recipe, baseline: TrainConfig) -> Recipe | None:
        """A space's recipe with the overrides applied, on the baseline's data and epochs.

        None, with a warning, if an override does not exist for the recipe's network and the baseline has another kind
        of network: that must not prevent the search.
        """
        same = {path: value for path, value in baseline.flat().items() if path.startswith("data.") or path == "epochs"}
        try:
            return replace(recipe, config=recipe.config.override({**self.fields, **same}))
        except ValidationError as error:
            if _family(recipe.config) != _family(baseline):
                logger.warning("recipe %s is left out: %s", recipe.name, explain(error.errors()[0]))
            else:
                self.overridden(recipe)  # collects the fault
            return None

    def _recipe_at(self, name: str, document: Document, space: Path, *place: str | int) -> Recipe | None:
        """A recipe named in a space: relative to the space, or to a folder of spaces."""
        folders = [space.parent, *search_space_dirs()]
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            there = {path.stem: f"recipes/{path.name}" for folder in folders for path in folder.glob("recipes/*.yaml")}
            meant = did_you_mean(Path(name).stem, there, lambda stem, names: there.get(nearest(stem, names) or ""))
            self._fault(document.at(*place), _with_path(place, f"no such file: {name}{meant}"))
            return None
        recipe = self.read(found)
        return None if recipe is None else self.recipe(recipe, found)

    # Spaces

    def space(self, document: Document, path: Path) -> SearchSpace | None:
        """The search space in a file; None if there is a fault."""
        if kind_of(document) == "recipe":
            message = f"a recipe, where a search space is wanted: hpo train {path.stem}"
            self._fault(document.at(), message if document.root.value else "an empty file")
            return None
        if "seed" in self.fields:
            self._fault("--set seed", parameters.FIXED["seed"])
        tree = document.plain()
        head = self._head(tree, document)
        baseline = self._baseline(tree, document, path)
        if baseline is not None and head is not None:
            data = {f"data.{key}": getattr(head.data, key) for key in head.data.model_fields_set}
            baseline = baseline.override(data)
        search = self._search(tree, document, baseline)
        recipes = self._recipes(tree, document, path)
        pinned = None if baseline is None else self._override(baseline)
        if self.faults or head is None or pinned is None:
            return None
        searched = self._not_pinned(search, pinned, document)
        return SearchSpace(
            name=path.stem,
            path=path,
            description=head.description,
            objective=head.objective,
            trials=head.trials,
            sampler=head.sampler,
            pruner=head.pruner,
            baseline=in_rate_of(pinned, searched),
            recipes=tuple(found for recipe in recipes if (found := self._to_beat(recipe, pinned))),
            search=searched,
            confirm=head.confirm,
        )

    def written_space(self, document: Document, path: Path) -> SearchSpace | None:
        """The space in a text of `space_to_yaml`, which may be a confirmation's."""
        tree = document.plain()
        if "confirms" not in tree:
            return self.space(document, path)
        text = self._validated(ConfirmationText, tree, document)
        baseline = None if text is None else self._validated(TrainConfig, text.base, document, "base")
        if text is None or baseline is None:
            return None
        return ConfirmationSpace.of(
            text.confirms, text.objective, baseline, path, train_images=text.train_images, val_images=text.val_images
        )

    def _head(self, tree: Mapping[str, Any], document: Document) -> SpaceFile | None:
        """Everything but base and search, with the overridden settings."""
        given = {key: value for key, value in tree.items() if key not in ("base", "search")}
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            if not name:
                given[section] = value
                continue
            default = SpaceFile.model_fields[section].default.model_dump(include={"name"})
            old = given[section] if isinstance(given.get(section), dict) else default
            # The other settings in the file belong to the sampler or pruner that the file names.
            if name == "name" and old.get("name") != value:
                old = {k: v for k, v in old.items() if f"{section}.{k}" in self.settings}
            given[section] = {**old, name: value}
        return self._validated(SpaceFile, {**given, "search": {"": {}}}, document)

    def _baseline(self, tree: Mapping[str, Any], document: Document, path: Path) -> TrainConfig | None:
        given = tree.get("base", {})
        if isinstance(given, str):
            recipe = self._recipe_at(given, document, path, "base")
            return None if recipe is None else recipe.config
        if isinstance(given, dict):
            return self._validated(TrainConfig, given, document, "base")
        self._fault(document.at("base"), f"base: must be a recipe's path or a configuration, not {quoted(given)}")
        return None

    def _recipes(self, tree: Mapping[str, Any], document: Document, path: Path) -> list[Recipe]:
        named = tree["recipes"] if isinstance(tree.get("recipes"), list) else []
        found = [
            self._recipe_at(name, document, path, "recipes", index)
            for index, name in enumerate(named)
            if isinstance(name, str)
        ]
        return [recipe for recipe in found if recipe is not None]

    def _search(
        self, tree: Mapping[str, Any], document: Document, baseline: TrainConfig | None
    ) -> dict[str, Parameter]:
        """The file's parameters without the faulty ones, checked one by one and together."""
        given = tree.get("search")
        if not isinstance(given, dict) or not given:
            message = "search: must name at least one field, with choices or with low and high"
            self._fault(document.at("search"), message)
            return {}
        report = self._reporter(document)
        found = {path: parameters.parameter(path, entry, report) for path, entry in given.items()}
        sound = {path: one for path, one in found.items() if one is not None}
        # The fields that faulty or misspelt entries were meant for must not be reported as unsearched as well.
        broken = {nearest_field(path, config_fields()) or path for path, one in found.items() if one is None}
        if parameters.clashing_rates(given, report):
            sound.pop("optim.lr", None)
        sound = parameters.ordered(sound, report)
        if baseline is None:
            return sound
        baseline = in_rate_of(baseline, sound)
        sound = parameters.without_unreachable(sound, baseline, report, broken)
        parameters.check_values(sound, baseline, report, broken)
        parameters.check_baseline(sound, baseline, report)
        return sound

    def _not_pinned(
        self, search: dict[str, Parameter], baseline: TrainConfig, document: Document
    ) -> dict[str, Parameter]:
        """The parameters that the overrides do not pin, checked against the overridden baseline."""
        if not self.fields:
            return search
        left = {path: one for path, one in search.items() if not {path, RATES.get(path)} & set(self.fields)}
        baseline = in_rate_of(baseline, left)
        left = parameters.without_unreachable(left, baseline, None)
        parameters.check_values(left, baseline, self._reporter(document))
        parameters.check_baseline(left, baseline, self._reporter(document))
        if not left:
            self._fault("--set", "leaves nothing to search; one configuration is trained by: hpo train")
        return left

    # Overrides

    def _field_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides of `TrainConfig`, each checked on its own."""
        values: dict[str, Any] = {}
        for key, value in given.items():
            field = config_fields().get(key)
            if field is None:
                self._fault(f"--set {key}", no_such_field(key, _setting_names()))
                continue
            try:
                values[key] = field.validate(value)
            except ValidationError as error:
                self._fault(f"--set {key}", explain(error.errors()[0]))
        return values

    def _override(self, config: TrainConfig, prefix: str = "") -> TrainConfig | None:
        """The configuration with the overrides applied; None if its fields then contradict each other."""
        try:
            return config.override(self.fields)
        except ValidationError as error:
            for detail in error.errors():
                section = ".".join(map(str, detail["loc"]))
                keys = [key for key in self.fields if key.startswith(section)] or list(self.fields)
                self._fault(f"--set {', '.join(keys)}", f"{prefix}{explain(detail)}")
        return None

    # Reporting

    def _validated(
        self,
        model: type[Model],
        given: Mapping[str, Any],
        document: Document,
        *prefix: str,
        more: Iterable[str] = (),
    ) -> Model | None:
        """Validate the mapping at `prefix` of a document; `more` are names to suggest for an unknown field."""
        try:
            return model.model_validate(given)
        except ValidationError as error:
            for detail in error.errors():
                loc = (*prefix, *location(detail))
                if detail["type"] == "extra_forbidden" and model is TrainConfig:
                    text = _unknown_field(detail["loc"], more)
                else:
                    text = explain(detail, [".".join((*prefix, name)) for name in siblings(model, detail["loc"])])
                path = ".".join(map(str, loc))
                cause = [key for key in self.settings if key == path or key.startswith(f"{path}.")]
                if cause:
                    self._fault(f"--set {', '.join(cause)}", text)
                else:
                    self._fault(document.at(*loc), _with_path(loc, text))
        return None

    def _reporter(self, document: Document) -> parameters.Report:
        return lambda path, message: self._fault(document.at(*path), _with_path(path, message))

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(Fault(where, message))


def _with_path(path: Sequence[str | int], message: str) -> str:
    """`search.optim.lr: …`; a fault of a whole file has no path."""
    return f"{'.'.join(map(str, path))}: {message}" if path else message


def _unknown_field(loc: Sequence[str | int], more: Iterable[str]) -> str:
    """The message for an unknown key in a configuration."""
    path = ".".join(map(str, loc))
    if path in config_fields():
        return f"must be written nested: {path.replace('.', ': {')}: …{'}' * path.count('.')}"
    return no_such_field(path, more)


def _family(config: TrainConfig) -> str:
    return config.model.name.partition("/")[0]


def _is_setting(key: str) -> bool:
    return key == "trials" or key.partition(".")[0] in SETTINGS


def _setting_names() -> list[str]:
    return ["trials", *(f"{section}.name" for section in ("sampler", "pruner")), "objective.metric", "confirm.budget"]
