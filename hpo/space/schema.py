"""The JSON Schema of spaces and recipes, for editors: they complete field names, show what they mean, and check bounds.

One schema serves both kinds of file: what has a `search` is a space, everything else a recipe.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from core.config import TrainConfig
from hpo.space.fields import ConfigField, config_fields
from hpo.space.grammar import Choices, Range, RecipeNotes, SpaceFile
from hpo.space.parameters import FIXED

DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft that editors' YAML servers know best
TEMPLATE = "#/definitions/{model}"


def json_schema() -> dict[str, Any]:
    """The schema of any YAML under `search_spaces/`."""
    space = _schema_of(SpaceFile)
    config = _schema_of(TrainConfig)
    notes = _schema_of(RecipeNotes)
    definitions: dict[str, Any] = {}
    for schema in (space, config, notes):
        definitions |= schema.pop("definitions", {})
    definitions["TrainConfig"] = config
    definitions["When"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"enum": list(config_fields())},
        "description": "Field: value, or list of values. Searched only while all of these hold.",
    }
    properties = space["properties"]
    properties["data"] = {**_reference("DataConfig"), "description": properties["data"]["description"]}
    properties["base"] = {
        "anyOf": [{"type": "string"}, _reference("TrainConfig")],
        "description": properties["base"]["description"],
    }
    properties["search"] = {
        "type": "object",
        "description": properties["search"]["description"],
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {path: _entry(field) for path, field in config_fields().items() if _searchable(path)},
    }
    definitions["SearchSpace"] = space
    definitions["Recipe"] = {
        **config,
        "title": "Recipe",
        "description": "A complete configuration, with what is known of it.",
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
    """Pydantic describes unions by name with OpenAPI's `discriminator`, which JSON Schema does not know."""
    if isinstance(schema, dict):
        return {key: _for_draft_7(value) for key, value in schema.items() if key != "discriminator"}
    return [_for_draft_7(item) for item in schema] if isinstance(schema, list) else schema


def _reference(name: str) -> dict[str, str]:
    return {"$ref": TEMPLATE.format(model=name)}


def _searchable(path: str) -> bool:
    return path not in FIXED and not path.startswith("data.")


def _entry(field: ConfigField) -> dict[str, Any]:
    """What may stand behind one field's path in `search`."""
    value = TypeAdapter(field.annotated).json_schema()
    forms = [_form(Choices, choices=value)]
    if field.kind in ("int", "float"):
        number = next((arm for arm in value.get("anyOf", []) if arm.get("type") != "null"), value)
        step = {"type": number["type"], "exclusiveMinimum": 0}
        forms.append(_form(Range, low=number, high=number, step=step))
    return {"description": field.info.description, "anyOf": forms}


def _form(model: type[Choices] | type[Range], **parts: dict[str, Any]) -> dict[str, Any]:
    """The schema of choices or of a range, its values described by the field's own type and bounds."""
    schema = model.model_json_schema()
    for name, part in parts.items():
        described = schema["properties"][name]
        if name == "choices":
            described["items"] = part
        else:
            schema["properties"][name] = part
    schema["properties"]["when"] = _reference("When")
    return schema
