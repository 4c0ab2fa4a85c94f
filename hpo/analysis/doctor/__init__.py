"""Checks of a study, and fixes for what can be fixed: `hpo study doctor`.

Each check is independent: one that cannot run is a finding itself, and does not stop the others. Checks change
nothing; a journal is read without its lock. Fixes use the storage's compare-and-set as every worker does, so they are
safe beside running workers, whose trials they do not touch. A finished trial is never changed, and only files that can
be made again or belong to no process are deleted.

To add a check, write a function from `StudyCheck` to findings, and list it in `run.py`.
"""
