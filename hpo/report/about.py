"""The section with everything needed to repeat the study: data, space, sampler, pruner, versions."""

from __future__ import annotations

from core.text import count
from hpo.analysis.study_data import StudyData
from hpo.report.page import Section, code, folded, section, table
from hpo.space import space_to_yaml
from hpo.text import data_facts


def about(data: StudyData) -> Section:
    """A table of the study's metadata, and the whole space."""
    study, metadata, images, space = data.study, data.study.metadata, data.study.metadata["data"], data.space
    split = metadata["base"]["data"]
    folds = f"{data.folds} folds" if data.folds > 1 else f"{split['val_fraction']:g} of the images for validation"
    if images.get("given_val"):
        folds = "validation images given by the data, so a confirmation varies the seeds only"
    rows = {
        "data": f"{images['name']}, fingerprint {images['fingerprint'][:12]}; {folds}",
        **data_facts(images.get("content", {})),
        "objective": f"{study.metric} on the validation images, to {study.direction}",
        "space": f"{study.space_name}, hash {metadata['hash'][:12]}",
        "seed": study.seed,
        "a full trial": count(data.steps, "epoch"),
        "sampler": space and space.sampler.name,
        "pruner": space and space.pruner.name,
        "storage": study.storage_shown,
        "created": metadata["created"],
        "command": study.settings.command and f"`{study.settings.command}`",
        "versions": ", ".join(f"{name} {version}" for name, version in metadata["versions"].items()),
    }
    title = "The search space as YAML, with every field of its baseline"
    yaml = "" if space is None else folded(title, code(space_to_yaml(space)))
    lead = "The settings fixed when the study began: the same settings give the same trials."
    return section(
        "about", "The study", lead, table(["", ""], [row for row in rows.items() if row[1] is not None]), yaml
    )
