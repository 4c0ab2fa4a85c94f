"""Checks of a study, and fixes: `hpo study doctor`.

A check that cannot run is a finding itself. Checks change nothing; a journal is read without its lock. Fixes are safe
beside running workers, change no finished trial, and delete only files that can be made again or belong to no process.

To add a check, write a function from `StudyCheck` to findings, and list it in `run.py`.
"""
