"""Checks of a study, and fixes for what can be fixed: `hpo study doctor`.

Each check is independent: one that cannot run is a finding itself, and does not stop the others. Checks change
nothing; a journal is read without its lock. Fixes use the storage's compare-and-set as every worker does, so they are
safe beside running workers, whose trials they do not touch. A finished trial is never changed, and only files that can
be made again or belong to no process are deleted.

To add a check, write a function from `StudyCheck` to findings, and list it in `FILE_CHECKS`, or in `TRIAL_CHECKS` if it
needs the storage.
"""

from hpo.analysis.doctor.check import Finding, Note, Result, StudyCheck, find_study_check, run_checks
from hpo.analysis.doctor.files import disk_use

__all__ = ["Finding", "Note", "Result", "StudyCheck", "disk_use", "find_study_check", "run_checks"]
