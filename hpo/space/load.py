"""Builds checked `SearchSpace`s and `Recipe`s from files and `--set`. All faults are collected before any is raised.

A field in `--set` is pinned: it is no longer searched, and recipes get its value too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from core.config import BUILTIN_DATA, SPLITS_OF_0_1_0, TrainConfig, lacking_fields
from hpo.errors import Fault, SpaceError
from hpo.paths import search_space_dirs
from hpo.space import parameters
from hpo.space.catalogue import find, is_space, list_spaces
from hpo.space.confirmation import ConfirmationSpace
from hpo.space.document import Document, Place, dump_yaml, parse_yaml, read
from hpo.space.fields import (
    begin_suggestions,
    config_fields,
    did_you_mean,
    field_at,
    nearest,
    nearest_field,
    no_such_field,
)
from hpo.space.grammar import ConfirmationText, RecipeNotes, SpaceFile, explain, location, quoted, siblings
from hpo.space.space import RATES, Parameter, Recipe, SearchSpace, in_rate_of

Overrides = Mapping[str, Any] | Iterable[str]
"""`{"epochs": 3}`, or `["epochs=3"]` as given to `--set`."""

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

SETTINGS = ("trials", "objective", "sampler", "pruner", "confirm")
"""Keys of a space, beside those of `TrainConfig`, that `--set` can change."""
SUGGESTED = ("trials", "sampler.name", "pruner.name", "objective.metric", "confirm.budget")
_NORMALIZE = "data.normalize"
HEAD = ("description", *SETTINGS)
"""Fields of `SpaceFile` that a `SearchSpace` takes as they are."""


def load_space(name_or_path: str | Path, overrides: Overrides = ()) -> SearchSpace:
    """Read and check a search space; SpaceError with all faults.

    Overrides pin fields, and change settings of objective, sampler, pruner, confirm and trials.
    """
    path = find(str(name_or_path), "space")
    loader = _Loader(_parsed(overrides))
    return loader.checked(loader.built(_read(path), path, loader.space))


def load_recipe(name_or_path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read and check a recipe; SpaceError with all faults. A trial's `config.yaml` is one too."""
    path = find(str(name_or_path), "recipe")
    loader = _Loader(_parsed(overrides), settings=False)
    recipe = loader.built(_read(path), path, loader.recipe)
    return loader.checked(None if recipe is None else loader.overridden(recipe))


def override_config(config: TrainConfig, overrides: Overrides) -> TrainConfig:
    """Apply overrides, checked as those of a recipe are; SpaceError with all faults."""
    loader = _Loader(_parsed(overrides), settings=False)
    return loader.checked(loader.override(config, "trial: "))


def recipe_from_yaml(text: str, name: str = "config.yaml") -> Recipe:
    """Read text written by `to_yaml`; SpaceError with all its faults."""
    loader = _Loader({})
    return loader.checked(loader.built(parse_yaml(text, name), Path(name), loader.recipe))


def space_from_yaml(text: str, name: str) -> SearchSpace:
    """Read text written by `space_to_yaml`; SpaceError with all its faults."""
    loader, parsed = _Loader({}), parse_yaml(text, name)
    space = loader.checked(loader.built(parsed, Path(f"{name}.yaml"), loader.written_space))
    base = None if parsed[0] is None else parsed[0].content.get("base")
    written = base.get("data", {}) if isinstance(base, dict) else {}
    if "split_seed" not in written:  # not a complete baseline, as a study stores it
        return space
    lacking = {f"data.{name}": value for name, value in SPLITS_OF_0_1_0.items() if name not in written}
    return replace(space, baseline=space.baseline.override(lacking))


def to_yaml(config: TrainConfig) -> str:
    """Write a recipe that `load_recipe` reads back exactly."""
    return dump_yaml(_tree(config))


def _tree(config: TrainConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for rate in ("lr", "lr_scale"):  # exactly one of the two may be given
        if tree["optim"][rate] is None:
            del tree["optim"][rate]
    return tree


def space_to_yaml(space: SearchSpace) -> str:
    """Write a space without its recipes, for workers that do not have its file."""
    baseline = _tree(space.baseline)
    if isinstance(space, ConfirmationSpace):
        counts = {"train_images": space.train_images, "val_images": space.val_images}
        text = ConfirmationText(confirms=space.confirms, **counts, objective=space.objective, base=baseline)
        return dump_yaml(text.model_dump(mode="json"))
    search = {path: parameter.describe() for path, parameter in space.search.items()}
    file = SpaceFile.model_construct(**{name: getattr(space, name) for name in HEAD})
    return dump_yaml({**file.model_dump(mode="json", include={*HEAD}), "base": baseline, "search": search})


def check_file(name_or_path: str | Path) -> list[Fault]:
    """Return all faults of a search space or recipe."""
    try:
        load_file(name_or_path)
    except SpaceError as error:
        return error.faults
    return []


def load_file(name_or_path: str | Path) -> SearchSpace | Recipe:
    """Read and check a search space or recipe; SpaceError with all faults."""
    path = Path(name_or_path)
    if not path.is_file():
        known = {entry.name: entry.path for entry in reversed(list_spaces())}  # a space before a recipe of its name
        path = known.get(str(name_or_path), path)
    loader = _Loader({})

    def build(document: Document, at: Path) -> Any:
        return loader.space(document, at) if is_space(document) else loader.recipe(document, at)

    found: SearchSpace | Recipe = loader.checked(loader.built(_read(path), path, build))
    return found


def _read(path: Path) -> tuple[Document | None, list[Fault]]:
    """Read a file; `data.name` becomes the path of data beside the file, if there are some, as `base` does."""
    document, faults = read(path)
    content = None if document is None else document.content
    for tree in (content, content.get("base") if isinstance(content, dict) else None):
        data = tree.get("data") if isinstance(tree, dict) else None
        name = data.get("name") if isinstance(data, dict) else None
        if isinstance(data, dict) and isinstance(name, str) and name not in (*BUILTIN_DATA, ""):
            beside = path.parent / Path(name).expanduser()
            if beside.exists():
                data["name"] = str(beside.resolve())
    return document, faults


def _parsed(overrides: Overrides) -> dict[str, Any]:
    """Parse `--set key=value`. Values are YAML, but the text itself for a field of text."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    found: dict[str, Any] = {}
    faults: list[Fault] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        where = f"--set {key}"
        if not equals or key in found:
            faults.append(Fault(where, "given twice" if equals else "must be key=value"))
            continue
        field = field_at(key)
        document, wrong = parse_yaml(text, where)
        found[key] = document.content if document is not None and text.strip() else None
        if field is None or field.kind != "str":
            faults += [Fault(where, fault.message) for fault in wrong]
        elif not isinstance(found[key], str):
            found[key] = text
    if faults:
        raise SpaceError(faults)
    return found


class _Loader:
    """Reads files with one set of overrides, and collects faults; faulty parts become None."""

    def __init__(self, overrides: Mapping[str, Any], settings: bool = True) -> None:
        begin_suggestions()
        self.faults: list[Fault] = []
        self.settings = {
            key: value for key, value in overrides.items() if settings and key.partition(".")[0] in SETTINGS
        }
        self.fields = self._field_values({key: value for key, value in overrides.items() if key not in self.settings})

    def built(
        self,
        parsed: tuple[Document | None, list[Fault]],
        path: Path,
        build: Callable[[Document, Path], Result | None],
    ) -> Result | None:
        document, faults = parsed
        self.faults += faults
        if document is None:
            return None
        if not isinstance(document.content, dict):
            self._fault(document.at(), "must be a mapping of keys to values")
            return None
        return build(document, path)

    def checked(self, result: Result | None) -> Result:
        if self.faults or result is None:
            raise SpaceError(self.sorted_faults())
        return result

    def sorted_faults(self) -> list[Fault]:
        """The faults by file and line."""

        def place(fault: Fault) -> tuple[str, int]:
            name, _, line = fault.where.rpartition(":")
            return (name, int(line)) if line.isdigit() else (fault.where, 0)

        return sorted(dict.fromkeys(self.faults), key=place)

    # Recipes

    def recipe(self, document: Document, path: Path) -> Recipe | None:
        if is_space(document):
            self._fault(document.at(), f"a search space, where a recipe is wanted: hpo run {path.stem}")
            return None
        fields = dict(document.content)
        notes = {key: fields.pop(key) for key in RecipeNotes.model_fields if key in fields}
        checked = self._validated(RecipeNotes, notes, document)
        config = self._validated(TrainConfig, fields, document, more=RecipeNotes.model_fields)
        if not path.stem.strip("."):  # `...yaml`: the name becomes a folder, which would be the parent folder
            self._fault(document.at(), f"a file named {path.name} gives the recipe no name; rename it")
            return None
        return None if checked is None or config is None else Recipe(path.stem, path, config, **dict(checked))

    def overridden(self, recipe: Recipe) -> Recipe | None:
        config = self.override(recipe.config, f"{recipe.name}: ")
        return None if config is None else replace(recipe, config=config)

    def _to_beat(self, recipe: Recipe, baseline: TrainConfig) -> Recipe | None:
        """A space's recipe with the overrides applied, on the baseline's data and epochs.

        Pretrained networks keep the normalization that they were trained with, unless it is overridden. None, with a
        warning, if an override does not exist for the recipe's network, but for the baseline's, or takes the weights
        from a probe.
        """
        same = {path: value for path, value in baseline.flat().items() if path.startswith("data.") or path == "epochs"}
        if recipe.config.model.pretrained and _NORMALIZE not in self.fields:
            del same[_NORMALIZE]
        self._report_dropped(recipe.config, f"recipe {recipe.name}: ")
        try:
            return replace(recipe, config=recipe.config.override({**self.fields, **same}))
        except ValidationError as error:
            if _family(recipe.config) != _family(baseline) or recipe.config.is_probe:
                logger.warning("recipe %s is left out: %s", recipe.name, explain(error.errors()[0]))
            else:
                self.overridden(recipe)  # collects the fault
            return None

    def _recipe_at(self, name: str, document: Document, space: Path, *place: str | int) -> Recipe | None:
        """A recipe named in a space: relative to the space, or to a folder of spaces."""
        folders = [space.parent, *search_space_dirs()]
        # Unlike Path.is_file, this answers for names that the system does not allow.
        found = next((folder / name for folder in folders if os.path.isfile(folder / name)), None)  # noqa: PTH113
        if found is None:
            there = {path.stem: f"recipes/{path.name}" for folder in folders for path in folder.glob("recipes/*.yaml")}
            meant = did_you_mean(Path(name).stem, there, lambda stem, names: there.get(nearest(stem, names) or ""))
            self._fault_at(document, place, f"no such file: {name}{meant}")
            return None
        return self.built(_read(found), found, self.recipe)

    # Spaces

    def space(self, document: Document, path: Path) -> SearchSpace | None:
        """The search space in a file."""
        if not is_space(document):
            message = f"a recipe, where a search space is wanted: hpo train {path.stem}"
            self._fault(document.at(), message if document.content else "an empty file")
            return None
        if "seed" in self.fields:
            self._fault("--set seed", parameters.FIXED["seed"])
        head = self._head(document)
        baseline = self._baseline(document, path)
        if baseline is not None and head is not None:
            baseline = baseline.override({f"data.{key}": getattr(head.data, key) for key in head.data.model_fields_set})
        search = self._search(document, baseline)
        named = document.content.get("recipes")
        recipes = [
            self._recipe_at(name, document, path, "recipes", index)
            for index, name in enumerate(named if isinstance(named, list) else [])
            if isinstance(name, str)
        ]
        pinned = None if baseline is None else self.override(baseline)
        if self.faults or head is None or pinned is None:
            return None
        searched = self._not_pinned(search, pinned, document)
        return SearchSpace(
            name=path.stem,
            path=path,
            **{name: getattr(head, name) for name in HEAD},
            baseline=in_rate_of(pinned, searched),
            recipes=tuple(left for one in recipes if one and (left := self._to_beat(one, pinned))),
            search=searched,
        )

    def written_space(self, document: Document, path: Path) -> SearchSpace | None:
        """The space in a text of `space_to_yaml`, which may be a confirmation's."""
        if "confirms" not in document.content:
            return self.space(document, path)
        text = self._validated(ConfirmationText, document.content, document)
        baseline = None if text is None else self._validated(TrainConfig, text.base, document, "base")
        if text is None or baseline is None:
            return None
        given = {name: value for name, value in text if name != "base"}
        return ConfirmationSpace(name=path.stem, path=path, baseline=baseline, **given)

    def _head(self, document: Document) -> SpaceFile | None:
        given = {key: value for key, value in document.content.items() if key not in ("base", "search")}
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

    def _baseline(self, document: Document, path: Path) -> TrainConfig | None:
        given = document.content.get("base", {})
        if isinstance(given, str):
            recipe = self._recipe_at(given, document, path, "base")
            return None if recipe is None else recipe.config
        if isinstance(given, dict):
            return self._validated(TrainConfig, given, document, "base")
        self._fault_at(document, ("base",), f"must be a recipe's path or a configuration, not {quoted(given)}")
        return None

    def _search(self, document: Document, baseline: TrainConfig | None) -> dict[str, Parameter]:
        """The file's sound parameters."""
        given = document.content.get("search")
        if not isinstance(given, dict) or not given:
            message = "must name at least one field, with choices or with low and high"
            self._fault_at(document, ("search",), message)
            return {}
        report = self._reporter(document)
        found = {path: parameters.parameter(path, entry, report) for path, entry in given.items()}
        sound = {path: one for path, one in found.items() if one is not None}
        # The fields that faulty or misspelt entries were meant for must not be reported as unsearched as well.
        broken = {nearest_field(path, config_fields()) or path for path, one in found.items() if one is None}
        if parameters.clashing_rates(given, report):
            sound.pop("optim.lr", None)
        sound = parameters.ordered(sound, report)
        return sound if baseline is None else parameters.fitting(sound, baseline, report, broken)

    def _not_pinned(
        self, search: dict[str, Parameter], baseline: TrainConfig, document: Document
    ) -> dict[str, Parameter]:
        """The parameters that the overrides do not pin, checked against the overridden baseline."""
        if not self.fields:
            return search
        left = {path: one for path, one in search.items() if not {path, RATES.get(path)} & set(self.fields)}
        if "model.name" in self.fields:
            lacking = lacking_fields(baseline.model.name)
            if unfit := [path for path in left if path in lacking]:
                logger.warning("--set model.name=%s: %s not searched", baseline.model.name, ", ".join(unfit))
            left = {path: one for path, one in left.items() if path not in lacking}
        # `--set optim.name=sgd` is meant to remove the parameters of the other optimizers.
        left = parameters.fitting(left, baseline, self._reporter(document), may_drop=True)
        if not left:
            self._fault("--set", "leaves nothing to search; one configuration is trained by: hpo train")
        return left

    # Overrides

    def _field_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in given.items():
            field = field_at(key)
            if field is None:
                self._fault(f"--set {key}", no_such_field(key, SUGGESTED))
                continue
            try:
                values[key] = field.validate(value)
            except ValidationError as error:
                self._fault(f"--set {key}", explain(error.errors()[0]))
        return values

    def override(self, config: TrainConfig, prefix: str = "") -> TrainConfig | None:
        """The configuration with the overrides applied."""
        self._report_dropped(config, prefix)
        try:
            return config.override(self.fields)
        except ValidationError as error:
            for detail in error.errors():
                section = ".".join(map(str, detail["loc"]))
                keys = [key for key in self.fields if key.startswith(section)] or list(self.fields)
                self._fault(f"--set {', '.join(keys)}", f"{prefix}{explain(detail)}")
        return None

    def _report_dropped(self, config: TrainConfig, prefix: str = "") -> None:
        if dropped := config.dropped_by(self.fields):
            names = [f"{part}.name" for part in dict.fromkeys(path.partition(".")[0] for path in dropped)]
            given = " ".join(f"{name}={self.fields[name]}" for name in names)
            do = "does" if len(dropped) == 1 else "do"
            logger.warning("%s--set %s: dropped %s, which %s not apply", prefix, given, ", ".join(dropped), do)

    # Reporting

    def _validated(
        self,
        model: type[Model],
        given: Mapping[str, Any],
        document: Document,
        *prefix: str,
        more: Iterable[str] = (),
    ) -> Model | None:
        """`more` are names to suggest for an unknown field."""
        try:
            return model.model_validate(given)
        except ValidationError as error:
            for detail in error.errors():
                place = (*prefix, *location(detail))
                if detail["type"] == "extra_forbidden" and model is TrainConfig:
                    text = _unknown_field(detail["loc"], more)
                else:
                    text = explain(detail, [".".join((*prefix, name)) for name in siblings(model, detail["loc"])])
                path = ".".join(map(str, place))
                cause = [key for key in self.settings if key == path or key.startswith(f"{path}.")]
                if cause:
                    self._fault(f"--set {', '.join(cause)}", text)
                else:
                    self._fault_at(document, place, text)
        return None

    def _reporter(self, document: Document) -> parameters.Report:
        return lambda place, message: self._fault_at(document, place, message)

    def _fault_at(self, document: Document, place: Place, message: str) -> None:
        """Add a fault of a key or item, as `search.optim.lr: …`."""
        path = ".".join(map(str, place))
        self._fault(document.at(*place), f"{path}: {message}" if path else message)

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(Fault(where, message))


def _unknown_field(loc: Place, more: Iterable[str]) -> str:
    path = ".".join(map(str, loc))
    if path in config_fields():
        return f"must be written nested: {path.replace('.', ': {')}: …{'}' * path.count('.')}"
    return no_such_field(path, more)


def _family(config: TrainConfig) -> str:
    return config.model.name.partition("/")[0]
