"""The JSON Schema of spaces and recipes, with which editors complete field names and check values.

A file with a `search` key is a space, any other is a recipe.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from core.config import OWN_PARTS, Kwarg, TrainConfig
from hpo.space.fields import ConfigField, config_fields
from hpo.space.grammar import Choices, Range, RecipeNotes, SpaceFile
from hpo.space.parameters import FIXED

DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft that editors' YAML servers support best
TEMPLATE = "#/definitions/{model}"
ARGUMENT = rf"^({'|'.join(OWN_PARTS)})\.kwargs\.[A-Za-z_]\w*$"


def json_schema() -> dict[str, Any]:
    """Build the schema of all YAML files under `search_spaces/`."""
    space, config, notes = (_schema_of(model) for model in (SpaceFile, TrainConfig, RecipeNotes))
    definitions: dict[str, Any] = {}
    for schema in (space, config, notes):
        definitions |= schema.pop("definitions", {})
    definitions["TrainConfig"] = config
    definitions["When"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"anyOf": [{"enum": list(config_fields())}, {"pattern": ARGUMENT}]},
        "description": "Field: value, or list of values. Searched only if all of these hold.",
    }
    properties = space["properties"]
    properties["base"] = {
        "anyOf": [{"type": "string"}, _reference("TrainConfig")],
        "description": properties["base"]["description"],
    }
    properties["search"] = {
        "type": "object",
        "description": properties["search"]["description"],
        "minProperties": 1,
        "additionalProperties": False,
        "patternProperties": {ARGUMENT: _entry(ConfigField("kwargs", FieldInfo.from_annotation(Kwarg)))},
        "properties": {path: _entry(field) for path, field in config_fields().items() if path not in FIXED},
    }
    definitions["SearchSpace"] = space
    definitions["Recipe"] = {
        **config,
        "title": "Recipe",
        "description": "A complete configuration, with notes on its source and result.",
        "properties": {**notes["properties"], **config["properties"]},
    }
    return {
        "$schema": DRAFT,
        "title": "hpo: search spaces and recipes",
        "if": {"required": ["search"]},
        "then": _reference("SearchSpace"),
        "else": _reference("Recipe"),
        "definitions": definitions,
    }


def _schema_of(model: type[Any]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=TEMPLATE)
    if "$defs" in schema:
        schema["definitions"] = schema.pop("$defs")
    described: dict[str, Any] = _for_draft_7(schema)
    return described


def _for_draft_7(schema: Any) -> Any:
    """Drop OpenAPI's `discriminator`, which pydantic adds to tagged unions and JSON Schema does not have."""
    if isinstance(schema, dict):
        return {key: _for_draft_7(value) for key, value in schema.items() if key != "discriminator"}
    return [_for_draft_7(item) for item in schema] if isinstance(schema, list) else schema


def _reference(name: str) -> dict[str, str]:
    return {"$ref": TEMPLATE.format(model=name)}


def _entry(field: ConfigField) -> dict[str, Any]:
    """The schema of one field's entry in `search`, its values described by the field's own type and bounds."""
    value = TypeAdapter(field.annotated).json_schema()
    choices, number = (model.model_json_schema() for model in (Choices, Range))
    choices["properties"]["choices"]["items"] = value
    forms = [choices]
    if field.kind in ("int", "float", "any"):
        bound = next((arm for arm in value.get("anyOf", []) if arm.get("type") != "null"), value) or {"type": "number"}
        step = {"type": bound["type"], "exclusiveMinimum": 0}
        number["properties"] |= {"low": bound, "high": bound, "step": step}
        forms.append(number)
    for form in forms:
        form["properties"]["when"] = _reference("When")
    return {"description": field.info.description, "anyOf": forms}
