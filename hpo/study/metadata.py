"""The metadata of a study, in its storage and in study.yaml, and the checks of later runs against it."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CoreError
from hpo.errors import SpaceError, StudyError
from hpo.paths import StudyPaths, confirmed_by
from hpo.space.document import dump_yaml, hash_of, load_yaml, shown
from hpo.storage import is_masked, mask
from hpo.storage.atomic import replacing
from hpo.storage.urls import check_path
from hpo.study.code import changed_files, code_of
from hpo.study.images import changed_images
from hpo.study.versions import versions

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.data import Dataset
    from hpo.space import SearchSpace

logger = logging.getLogger(__name__)

_FILE = "model.pretrained_file"


def new_metadata(space: SearchSpace, dataset: Dataset, *, seed: int | None, data_path: Path | None) -> dict[str, Any]:
    """Build the metadata of a new study as plain JSON."""
    metadata = {
        "space": space.name,
        "hash": space.hash,
        "metric": space.metric,
        "direction": space.direction,
        "seed": seed or 0,
        "data": {
            "name": dataset.name,
            # Absolute, for commands that run in another folder.
            "path": None if data_path is None else str(data_path.resolve()),
            "fingerprint": dataset.fingerprint,
            "given_val": dataset.given_val(space.baseline.data),
            "content": dataset.report.plain(),
            "skip_broken": bool(dataset.report.broken),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "base": space.baseline.model_dump(mode="json"),
        "weights": {file: _weights_fingerprint(file) for file in _weight_files(space)},
        "code": code_of(space.own_code()),
        "identity": space.identity(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(metadata))
    return plain


def shown_attributes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat user attributes for the dashboard."""
    return {
        "data": metadata["data"]["name"],
        "data_fingerprint": metadata["data"]["fingerprint"],
        "space_name": metadata["space"],
        "space_hash": metadata["hash"],
        "objective": f"{metadata['metric']} ({metadata['direction']})",
        "seed": metadata["seed"],
        "begun": metadata["created"],
        "versions": ", ".join(f"{name} {version}" for name, version in metadata["versions"].items()),
    }


def config_of(metadata: Mapping[str, Any], params: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a trial's parameters."""
    from core.config import TrainConfig

    baseline = TrainConfig.model_validate_json(json.dumps(metadata["base"]))
    values = {}
    for path, value in params.items():
        # Optuna takes scalars only, so a list among the choices is stored as its JSON text.
        choices = metadata["identity"][f"search.{path}"].get("choices", [])
        values[path] = next((c for c in choices if isinstance(c, list) and json.dumps(c) == value), value)
    return baseline.override(values)


def check_same(
    name: str,
    stored: Mapping[str, Any],
    space: SearchSpace,
    dataset: Dataset,
    seed: int | None,
    *,
    command: str | None = None,
) -> None:
    """Raise StudyError unless a run has the space, images, weights and seed of the study.

    Args:
        command: The one that last ran the study, which would continue it.
    """
    known = f"continue it with\n  {command}\n" if command else "give what it was begun with, --set included, "
    advice = (
        f"{known}or begin another study: --study NAME, with --take-over {name} if its trials are to count where they "
        "fit"
    )
    if stored["hash"] != space.hash:
        from hpo.space import diff

        lines = "\n".join(f"  {line}" for line in diff(stored["identity"], space.identity()))
        raise StudyError(f"study {name} was begun with another space:\n{lines}\n{advice}")
    _check_near_duplicates(name, stored, space, dataset)
    check_fingerprint(name, stored, dataset)
    _check_validation(name, stored, dataset.given_val(space.baseline.data))
    check_weights(name, stored, _weight_files(space))
    check_code(name, stored, space.own_code())
    if seed is not None and seed != stored["seed"]:
        raise StudyError(
            f"study {name} was begun with --seed {stored['seed']}, not {seed}; "
            "leave --seed out, or choose another --study"
        )


def check_weights(name: str, metadata: Mapping[str, Any], files: Iterable[str | None]) -> None:
    """Raise StudyError if one of these files of weights has changed."""
    known = metadata.get("weights") or {}
    for file in files:
        if file is not None and file in known and _weights_fingerprint(file) != known[file]:
            raise StudyError(
                f"study {name} was begun with other weights: {file} has changed since; "
                "put the old file back, or choose another --study"
            )


def check_code(name: str, metadata: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Raise StudyError if the source of one of these import paths, each with its field, has changed."""
    stored = metadata.get("code") or {}
    for path, field in named.items():
        known = stored.get(path)
        if known is None:
            continue
        try:
            changed = changed_files(known, code_of({path: field})[path])
        except CoreError as error:
            raise StudyError(f"study {name} was begun with the code in {known['folder']}: {error}") from error
        if changed:
            raise StudyError(
                f"study {name} was begun with other code of {path}: {', '.join(changed)} has changed since; "
                "put the old code back, or choose another --study"
            )


def _weight_files(space: SearchSpace) -> list[str]:
    searched = space.search.get(_FILE)
    choices = searched.describe().get("choices", []) if searched else []
    return sorted({file for file in (space.baseline.model.pretrained_file, *choices) if file is not None})


def _weights_fingerprint(file: str) -> str:
    from core.models import weights_fingerprint  # imports torch

    return weights_fingerprint(file)


def check_fingerprint(name: str, metadata: Mapping[str, Any], dataset: Dataset) -> None:
    """Raise StudyError unless these are the study's images; it names those that changed."""
    known, found = metadata["data"]["fingerprint"], dataset.fingerprint
    if found == known:
        return
    changes = changed_images(StudyPaths.of(name), metadata, dataset)
    path = metadata["data"]["path"]
    raise StudyError(
        f"study {name} was begun with other images ({metadata['data']['name']}, fingerprint {known[:12]}, "
        f"not {found[:12]}): {changes}; give the same by --data{f' {path}' if path else ''}, or choose another --study"
    )


def _check_near_duplicates(name: str, stored: Mapping[str, Any], space: SearchSpace, dataset: Dataset) -> None:
    """Raise StudyError if only this run keeps near-duplicates together."""
    ignored = stored["base"]["data"]["near_duplicates"] == "ignored"
    if ignored and space.baseline.data.near_duplicates == "together" and dataset.report.near:
        raise StudyError(
            f"study {name} did not look for near-duplicates, and the data have {dataset.report.near:,}; continue with "
            "--set data.near_duplicates=ignored, or choose another --study to keep each on the side of its copies"
        )


def _check_validation(name: str, stored: Mapping[str, Any], given: str | None) -> None:
    """Raise StudyError unless validation images are given or drawn as in the study."""
    known = stored["data"].get("given_val")
    if given == known:
        return
    if known is None:
        raise StudyError(
            f"study {name} drew its validation images, and the data give some; continue with --set data.val=drawn, or "
            "choose another --study"
        )
    begun = "leave data.val=drawn out" if given is None else "put the images back"
    raise StudyError(
        f"study {name} was begun with other validation images, which the data gave; {begun}, or choose another --study"
    )


def upgraded(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata with the fields that version 0.1.0 did not have, as it split the images."""
    from core.config import SPLITS_OF_0_1_0

    base = metadata.get("base") or {}
    return {**metadata, "base": {**base, "data": {**SPLITS_OF_0_1_0, **base.get("data", {})}}}


_SHAPE = {
    **dict.fromkeys(("space", "hash", "metric", "direction"), str),
    "seed": int,
    **dict.fromkeys(("data", "identity"), dict),
    "storage": str | None,
}


def read_metadata(paths: StudyPaths, *, named: str | None = None) -> dict[str, Any] | None:
    """Return study.yaml, or None if it is missing.

    Args:
        named: Name of the study in the folder, if it differs from the folder's.

    Raises:
        StudyError: The file cannot be read, or is another study's, as after the folder was renamed.
    """
    if not paths.study_yaml.exists():
        return None
    try:
        metadata = load_yaml(paths.study_yaml)
    except (OSError, SpaceError) as error:
        raise StudyError(f"{paths.study_yaml} cannot be read ({error}); delete it and run the study again") from error
    if not (isinstance(metadata, dict) and all(isinstance(metadata.get(key), kind) for key, kind in _SHAPE.items())):
        raise StudyError(f"{paths.study_yaml} is no study of hpo's; delete it and run the study again")
    if metadata.get("name", paths.name) not in (paths.name, named):
        raise StudyError(_renamed(paths, str(metadata["name"])))
    data = metadata["data"]
    well_formed = all(isinstance(data.get(key), str) for key in ("name", "fingerprint"))
    base = metadata.get("base") or {}
    well_formed &= isinstance(base, dict) and isinstance(base.get("data", {}), dict)
    if not (well_formed and {"path", "skip_broken"} <= {*data}) or hash_of(metadata["identity"]) != metadata["hash"]:
        raise StudyError(f"{paths.study_yaml} is damaged; hpo study doctor {paths.name} --mend rebuilds it")
    return upgraded(metadata)


def _renamed(paths: StudyPaths, name: str) -> str:
    """The error of a folder that has the name of no study or of another one."""
    known = confirmed_by(name), confirmed_by(paths.name)
    if StudyPaths.of(name).study_yaml.exists():
        advice = f"delete this copy, and make one with: {shlex.join(['hpo', 'study', 'copy', *known])}"
    else:
        advice = f"name the folder {name} again, or finish with: {shlex.join(['hpo', 'study', 'rename', *known])}"
    return f"{paths.dir} has the study {name}, and was renamed by hand; {advice}"


def write_metadata(
    paths: StudyPaths, metadata: Mapping[str, Any], *, storage_url: str, space: SearchSpace, dataset: Dataset
) -> None:
    """Write study.yaml if it is missing, else set its time, by which `find_study` finds the last run."""
    file = paths.study_yaml
    if file.exists():
        os.utime(file)
        return
    if mask(storage_url) != storage_url:
        logger.warning(
            "study %s: the storage's password is not written down; give --storage again to continue", paths.name
        )
    # The path of the study's own journal changes with its folder.
    storage = None if storage_url == str(paths.journal) else mask(storage_url)
    written = {"storage": storage, "space_file": shown(space.path), **metadata, "classes": list(dataset.classes)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(paths, written)


def write_file(paths: StudyPaths, content: Mapping[str, Any]) -> None:
    """Write study.yaml with the name of its folder."""
    with replacing(paths.study_yaml, synced=True) as temporary:
        temporary.write_text(dump_yaml({"name": "", **content} | {"name": paths.name}), encoding="utf-8")


def storage_url_of(paths: StudyPaths, metadata: Mapping[str, Any] | None, given: str | None) -> str:
    """Return the URL of the study's storage: the given one, the stored one, or its own journal.

    Raises:
        StudyError: The given URL differs from the stored one, or the password is missing.
    """
    if given == "":
        raise StudyError("--storage is empty; give a URL, or leave it out for a journal file")
    if given is not None:
        check_path(given, "--storage")
    if metadata is None:
        return given or str(paths.journal)
    written = metadata.get("storage") or str(paths.journal)
    if given is not None and mask(given) != mask(written):
        raise StudyError(f"study {paths.name} lies in {mask(written)}; leave --storage out, or choose another --study")
    if given is None and is_masked(written):
        raise StudyError(f"study {paths.name}: give --storage {written} with the password, which is never written down")
    return given or written
