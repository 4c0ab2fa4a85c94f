"""From files and `--set` to a checked `SearchSpace` or `Recipe`. Faults are collected, never stopped at.

A space is read in layers: its base (a recipe's file, or a configuration in place), its own `data`, then `--set`. What
`--set` names is pinned: it is no longer searched, and the recipes get it too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from core.config import DataConfig, TrainConfig
from hpo.errors import Fault, SpaceError
from hpo.paths import search_space_dirs
from hpo.space import parameters
from hpo.space.catalogue import find, kind_of, list_spaces
from hpo.space.confirmation import ConfirmationSpace
from hpo.space.document import Document, dump, parse, read
from hpo.space.fields import config_fields, did_you_mean, nearest, nearest_field, no_such_field
from hpo.space.grammar import (
    ConfirmationText,
    RecipeNotes,
    SpaceFile,
    explain,
    location,
    quoted,
    siblings,
)
from hpo.space.space import RATES, Parameter, Recipe, SearchSpace, in_rate_of

Overrides = Mapping[str, Any] | Iterable[str]
"""`{"epochs": 3}`, or `["epochs=3"]` as `--set` has them."""

Model = TypeVar("Model", bound=BaseModel)

logger = logging.getLogger(__name__)

SETTINGS = (
    "objective",
    "sampler",
    "pruner",
    "confirm",
)  # the sections of a space, beside TrainConfig's, that --set may reach


def load_space(name_or_path: str | Path, overrides: Overrides = ()) -> SearchSpace:
    """Reads and checks a search space: a name in `search_spaces/`, or a path.

    Args:
        overrides: fields to pin, and settings of objective, sampler, pruner and trials to change.

    Raises:
        SpaceError: all faults of the file, of its recipes, and of the overrides.
    """
    path = find(str(name_or_path), "space")
    loader = _Loader(_parsed(overrides))
    document = loader.read(path)
    space = None if document is None else loader.space(document, path)
    if loader.faults or space is None:
        raise SpaceError(loader.sorted_faults())
    return space


def load_recipe(name_or_path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Reads and checks a recipe: a name in `search_spaces/recipes/`, or a path, a trial's `config.yaml` for one.

    Raises:
        SpaceError: all its faults.
    """
    path = find(str(name_or_path), "recipe")
    loader = _Loader(_parsed(overrides), settings=False)
    document = loader.read(path)
    recipe = None if document is None else loader.recipe(document, path)
    if recipe is not None:
        recipe = loader.overridden(recipe)
    if loader.faults or recipe is None:
        raise SpaceError(loader.sorted_faults())
    return recipe


def recipe_from_yaml(text: str, name: str = "config.yaml") -> Recipe:
    """A recipe from its text: the inverse of `to_yaml`. `name` is how messages call it.

    Raises:
        SpaceError: all its faults.
    """
    loader = _Loader({})
    document, loader.faults = parse(text, name)
    recipe = None if document is None else loader.recipe(document, Path(name))
    if loader.faults or recipe is None:
        raise SpaceError(loader.sorted_faults())
    return recipe


def to_yaml(config: TrainConfig) -> str:
    """A configuration, whole, as a recipe that `load_recipe` reads back exactly."""
    return dump(_tree(config))


def _tree(config: TrainConfig) -> dict[str, Any]:
    """A configuration as a recipe has it."""
    tree = config.model_dump(mode="json")
    for rate in ("lr", "lr_scale"):  # exactly one is given; the other would only invite to fill it in as well
        if tree["optim"][rate] is None:
            del tree["optim"][rate]
    return tree


def space_to_yaml(space: SearchSpace) -> str:
    """A checked space, whole, without its recipes: what a worker needs that has not the file."""
    if isinstance(space, ConfirmationSpace):
        return dump({**space.described(), "base": _tree(space.baseline)})
    return dump(
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


def space_from_yaml(text: str, name: str) -> SearchSpace:
    """A space from its text: the inverse of `space_to_yaml`.

    Raises:
        SpaceError: all its faults.
    """
    loader = _Loader({})
    document, loader.faults = parse(text, name)
    space = None if document is None else loader.space_of_text(document, Path(f"{name}.yaml"))
    if loader.faults or space is None:
        raise SpaceError(loader.sorted_faults())
    return space


def check_file(name_or_path: str | Path) -> list[Fault]:
    """Every fault of a search space or recipe, by path or by name; none where it is fine."""
    path = Path(name_or_path)
    if not path.is_file():
        known = {entry.name: entry.path for entry in reversed(list_spaces())}  # of one name, the space
        path = known.get(str(name_or_path), path)
    loader = _Loader({})
    document = loader.read(path)
    if document is not None:
        if kind_of(document) == "space":
            loader.space(document, path)
        else:
            loader.recipe(document, path)
    return loader.sorted_faults()


# --set


def _parsed(overrides: Overrides) -> dict[str, Any]:
    """`--set key=value` by key, values read as YAML; the text itself where the field is one of text.

    Raises:
        SpaceError: something is not `key=value`, is given twice, or its value is not YAML.
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
        document, wrong = parse(text, where)
        value = document.plain() if document is not None and text.strip() else None
        if field is not None and field.kind == "str":
            found[key] = value if isinstance(value, str) else text
        elif wrong:
            faults += [Fault(where, fault.message) for fault in wrong]
        else:
            found[key] = value
    if faults:
        raise SpaceError(faults)
    return found


# Building


class _Loader:
    """Reads files with one set of overrides, and collects what is wrong."""

    def __init__(self, overrides: Mapping[str, Any], settings: bool = True) -> None:
        self.faults: list[Fault] = []
        self.settings = {key: value for key, value in overrides.items() if settings and _is_setting(key)}
        self.fields = self._field_values({key: value for key, value in overrides.items() if key not in self.settings})

    def sorted_faults(self) -> list[Fault]:
        """Each once, in the order of the lines of each file."""

        def place(fault: Fault) -> tuple[str, int]:
            name, _, line = fault.where.rpartition(":")
            return (name, int(line)) if line.isdigit() else (fault.where, 0)

        return sorted(dict.fromkeys(self.faults), key=place)

    def read(self, path: Path) -> Document | None:
        """The file's mapping; None where it has none."""
        document, faults = read(path)
        self.faults += faults
        if document is not None and not isinstance(document.root.value, dict):
            self._fault(document.at(), "must be a mapping of keys to values")
            return None
        return document

    # Recipes

    def recipe(self, document: Document, path: Path) -> Recipe | None:
        """The recipe in a file, nothing overridden."""
        if kind_of(document) == "space":
            self._fault(document.at(), f"a search space, where a recipe is wanted: hpo run {path.stem}")
            return None
        tree = document.plain()
        said = {key: tree.pop(key) for key in list(tree) if key in RecipeNotes.model_fields}
        notes = self._validated(RecipeNotes, said, document)
        config = self._config(tree, document, more=RecipeNotes.model_fields)
        if not path.stem.strip("."):  # `...yaml`: a recipe's name becomes a folder, and that would be the one above
            self._fault(document.at(), f"a file of the name {path.name} gives the recipe no name; rename it")
            return None
        if notes is None or config is None:
            return None
        return Recipe(path.stem, path, notes.description, notes.source, notes.result, notes.guesses, config)

    def overridden(self, recipe: Recipe) -> Recipe:
        """The recipe with --set applied."""
        config = self._override(recipe.config, f"{recipe.name}: ")
        return recipe if config is None else replace(recipe, config=config)

    def _to_beat(self, recipe: Recipe, base: TrainConfig) -> Recipe | None:
        """A recipe that a space names, with --set applied, on the base's data and as long as the base.

        None, with a warning, where it is of another family than the base, and its network has no such field as --set
        gives: that is no reason not to search.
        """
        same = {path: value for path, value in base.flat().items() if path.startswith("data.") or path == "epochs"}
        try:
            return replace(recipe, config=recipe.config.override({**self.fields, **same}))
        except ValidationError as error:
            if _family(recipe.config) != _family(base):
                logger.warning("recipe %s is left out: %s", recipe.name, explain(error.errors()[0]))
            else:
                self.overridden(recipe)  # which tells the fault
            return None

    def _config(
        self, tree: Mapping[str, Any], document: Document, *prefix: str, more: Iterable[str] = ()
    ) -> TrainConfig | None:
        """A configuration that stands in a file below `prefix`; `more` are other keys allowed beside its fields."""
        try:
            return TrainConfig.model_validate(tree)
        except ValidationError as error:
            for detail in error.errors():
                loc = detail["loc"]
                text = _unknown(loc, more) if detail["type"] == "extra_forbidden" else explain(detail)
                self._fault(document.at(*prefix, *loc), _said(prefix + loc, text))
        return None

    def _recipe_at(self, name: str, document: Document, space: Path, *place: str | int) -> Recipe | None:
        """A recipe that a space names: beside the space, or in one of the folders of spaces."""
        folders = [space.parent, *search_space_dirs()]
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            there = {path.stem: f"recipes/{path.name}" for folder in folders for path in folder.glob("recipes/*.yaml")}
            near = there.get(nearest(Path(name).stem, there) or "")
            self._fault(document.at(*place), _said(place, f"no such file: {name}{did_you_mean(near)}"))
            return None
        recipe = self.read(found)
        return None if recipe is None else self.recipe(recipe, found)

    # Spaces

    def space(self, document: Document, path: Path) -> SearchSpace | None:
        """The search space in a file; None where anything is wrong with it."""
        if kind_of(document) == "recipe":
            recipe = f"a recipe, where a search space is wanted: hpo train {path.stem}"
            self._fault(document.at(), recipe if document.root.value else "an empty file")
            return None
        if "seed" in self.fields:
            self._fault("--set seed", parameters.FIXED["seed"])
        tree = document.plain()
        head = self._head(tree, document)
        data = self._data(tree, document)
        base = self._base(tree, document, path)
        if base is not None and data is not None:
            base = base.override({f"data.{key}": value for key, value in data.items()})
        search = self._search(tree, document, base)
        named = tree["recipes"] if isinstance(tree.get("recipes"), list) else []
        recipes = [
            self._recipe_at(name, document, path, "recipes", index)
            for index, name in enumerate(named)
            if isinstance(name, str)
        ]
        pinned = None if base is None else self._override(base)
        if self.faults or head is None or pinned is None:
            return None
        left = self._left(search, pinned, document)
        space = SearchSpace(
            name=path.stem,
            path=path,
            description=head.description,
            objective=head.objective,
            trials=head.trials,
            sampler=head.sampler,
            pruner=head.pruner,
            baseline=in_rate_of(pinned, left),
            recipes=tuple(found for one in recipes if one is not None and (found := self._to_beat(one, pinned))),
            search=left,
            confirm=head.confirm,
        )
        return None if self.faults else space

    def space_of_text(self, document: Document, path: Path) -> SearchSpace | None:
        """What `space_to_yaml` has written: a space, or what a confirmation trains."""
        if not isinstance(document.root.value, dict) or "confirms" not in document.root.value:
            return self.space(document, path)
        tree = document.plain()
        text = self._validated(ConfirmationText, tree, document)
        base = self._config(tree["base"], document, "base") if text is not None else None
        if text is None or base is None:
            return None
        return ConfirmationSpace.of(
            text.confirms, text.objective, base, path, train_images=text.train_images, val_images=text.val_images
        )

    def _head(self, tree: Mapping[str, Any], document: Document) -> SpaceFile | None:
        """Everything but data, base and search, with the settings of --set in it."""
        given = {key: value for key, value in tree.items() if key not in ("data", "base", "search")}
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            if not name:
                given[section] = value
                continue
            default = SpaceFile.model_fields[section].default.model_dump(include={"name"})
            old = given[section] if isinstance(given.get(section), dict) else default
            # Another sampler or pruner has other settings: the file's belong to the one that the file names.
            if name == "name" and old.get("name") != value:
                old = {k: v for k, v in old.items() if f"{section}.{k}" in self.settings}
            given[section] = {**old, name: value}
        return self._validated(SpaceFile, {**given, "search": {"": {}}}, document)

    def _data(self, tree: Mapping[str, Any], document: Document) -> dict[str, Any] | None:
        given = tree.get("data", {})
        if not isinstance(given, dict):
            self._fault(document.at("data"), f"data: must be a group of fields, not {quoted(given)}")
            return None
        config = self._validated(DataConfig, given, document, "data")
        return None if config is None else {key: getattr(config, key) for key in given}

    def _base(self, tree: Mapping[str, Any], document: Document, path: Path) -> TrainConfig | None:
        given = tree.get("base", {})
        if isinstance(given, str):
            recipe = self._recipe_at(given, document, path, "base")
            return None if recipe is None else recipe.config
        if isinstance(given, dict):
            return self._config(given, document, "base")
        self._fault(document.at("base"), f"base: must be a recipe's path or a configuration, not {quoted(given)}")
        return None

    def _search(self, tree: Mapping[str, Any], document: Document, base: TrainConfig | None) -> dict[str, Parameter]:
        """The parameters as the file has them, checked one by one and together; the faulty ones left out."""
        given = tree.get("search")
        if not isinstance(given, dict) or not given:
            self._fault(
                document.at("search"), "search: must name at least one field, with choices or with low and high"
            )
            return {}
        report = self._reporter(document)
        found = {path: parameters.parameter(path, entry, report) for path, entry in given.items()}
        sound = {path: one for path, one in found.items() if one is not None}
        # What a faulty entry, or a misspelt one, was meant to search must not be called unsearched on top.
        broken = {nearest_field(path, config_fields()) or path for path, one in found.items() if one is None}
        if parameters.clashing_rates(given, report):
            sound.pop("optim.lr", None)
        sound = parameters.ordered(sound, report)
        if base is None:
            return sound
        base = in_rate_of(base, sound)
        sound = parameters.without_unreachable(sound, base, report, broken)
        parameters.check_values(sound, base, report, broken)
        parameters.check_base(sound, base, report)
        return sound

    def _left(self, search: dict[str, Parameter], base: TrainConfig, document: Document) -> dict[str, Parameter]:
        """What --set leaves to be searched, checked against what it made of the base."""
        if not self.fields:
            return search
        left = {path: one for path, one in search.items() if not {path, RATES.get(path)} & set(self.fields)}
        base = in_rate_of(base, left)
        left = parameters.without_unreachable(left, base, None)
        parameters.check_values(left, base, self._reporter(document))
        parameters.check_base(left, base, self._reporter(document))
        if not left:
            self._fault("--set", "leaves nothing to search; one configuration is trained by: hpo train")
        return left

    # --set

    def _field_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides of `TrainConfig`, each checked alone."""
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

    def _override(self, config: TrainConfig, whose: str = "") -> TrainConfig | None:
        """A configuration with --set applied; None where its fields do not go together then."""
        try:
            return config.override(self.fields)
        except ValidationError as error:
            for detail in error.errors():
                section = ".".join(map(str, detail["loc"]))
                keys = [key for key in self.fields if key.startswith(section)] or list(self.fields)
                self._fault(f"--set {', '.join(keys)}", f"{whose}{explain(detail)}")
        return None

    # Reporting

    def _validated(
        self, model: type[Model], given: Mapping[str, Any], document: Document, *prefix: str
    ) -> Model | None:
        try:
            return model.model_validate(given)
        except ValidationError as error:
            for detail in error.errors():
                loc = (*prefix, *location(detail))
                path = ".".join(map(str, loc))
                names = [".".join((*prefix, name)) for name in siblings(model, detail["loc"])]
                text = explain(detail, names)
                cause = [key for key in self.settings if key == path or key.startswith(f"{path}.")]
                where = f"--set {', '.join(cause)}" if cause else document.at(*loc)
                self._fault(where, text if cause else _said(loc, text))
        return None

    def _reporter(self, document: Document) -> parameters.Report:
        return lambda path, message: self._fault(document.at(*path), _said(path, message))

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(Fault(where, message))


def _said(path: Sequence[str | int], message: str) -> str:
    """`search.optim.lr: …`; what is wrong with a whole file has no path."""
    return f"{'.'.join(map(str, path))}: {message}" if path else message


def _unknown(loc: Sequence[str | int], more: Iterable[str]) -> str:
    """What is wrong with a key in a configuration's tree that is no field there."""
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
