"""What the study is, for whoever wants to run it again: data, space, sampler, pruner, versions."""

from __future__ import annotations

from hpo.analysis.facts import Facts
from hpo.report.page import Section, code, folded, table
from hpo.space import space_to_yaml
from hpo.text import count


def about(facts: Facts) -> Section:
    """A table of what was fixed when the study began, and the whole space."""
    study, metadata = facts.study, facts.study.metadata
    data = metadata["data"]
    split = metadata["base"]["data"]
    divided = f"{facts.folds} folds" if facts.folds > 1 else f"{split['val_fraction']:g} of the images validate"
    rows: list[tuple[str, object]] = [
        ("data", f"{data['name']}, fingerprint {data['fingerprint'][:12]}; {divided}"),
        ("objective", f"{study.metric} on the validation images, to {study.direction}"),
        ("space", f"{study.space_name}, hash {metadata['hash'][:12]}"),
        ("seed", study.seed),
        ("a trial in full", count(facts.steps, "epoch")),
    ]
    if facts.space is not None:
        rows += [("sampler", facts.space.sampler.name), ("pruner", facts.space.pruner.name)]
    rows += [("storage", study.storage_shown), ("begun", metadata["created"])]
    if study.command is not None:
        rows.append(("run by", f"`{study.command}`"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())))
    body = table(["", ""], rows)
    if facts.space is not None:
        body += folded("The search space as YAML, with every field of its base", code(space_to_yaml(facts.space)))
    lead = "What was fixed when the study began: with these, its trials come out the same."
    return Section("about", "The study", lead, body)
