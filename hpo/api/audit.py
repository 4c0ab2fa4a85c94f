"""`hpo data audit`: the images whose labels are probably wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.analysis.labels import LabelAudit, audit_labels
from hpo.api.common import open_dataset
from hpo.api.options import AuditOptions
from hpo.errors import StudyError
from hpo.storage.atomic import write_output
from hpo.study import Study, find_study

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class AuditResult:
    """The suspects of a study's data set."""

    study: Study
    audit: LabelAudit

    def frame(self) -> pandas.DataFrame:
        """Return a row for each suspect, most suspicious first."""
        import pandas

        columns = ["id", "label", "suggested", "label_probability", "suggested_probability", "networks"]
        frame = pandas.DataFrame([vars(suspect) for suspect in self.audit.suspects], columns=columns)
        return frame.rename(columns={"id": "image"})


def audit(options: AuditOptions) -> AuditResult:
    """Find probably wrong labels by the stored outputs of a study and its confirmation, and write them as CSV.

    Raises:
        HpoError: There is no such study, it has stored no outputs, or the file cannot be written.
        CoreError: The images are missing, or are not the study's.
    """
    study = find_study(options.study, storage_url=options.storage)
    if study.confirms is not None:
        raise StudyError(f"study {study.name} confirms {study.confirms}; give hpo data audit {study.confirms}")
    best = study.best_trial()
    if best is None:
        raise StudyError(f"study {study.name} has no complete trial yet, and so no predictions to judge labels by")
    dataset = open_dataset(study.config_of(best).data, options.data or study.data_path, skip_broken=study.skip_broken)
    study.check_data(dataset)
    found = audit_labels(study, dataset.labels.numpy(), dataset.ids, dataset.classes)
    if not found.networks:
        raise StudyError(
            f"study {study.name} has no stored outputs here: they stay on the machine that trained its best trials; "
            f"run this there, or hpo confirm {study.name}"
        )
    result = AuditResult(study, found)
    if options.output is not None:
        write_output(options.output, result.frame().to_csv(index=False))
    return result
