"""A study: its metadata, its trials and their queue; create, find, resume and list studies.

A wrong name is reported before Optuna is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.study.open import check_search_name, find_study, join_study, last_search, list_studies, open_study, study_files

if TYPE_CHECKING:
    from hpo.study.study import Study

__all__ = [
    "Study",
    "check_search_name",
    "find_study",
    "join_study",
    "last_search",
    "list_studies",
    "open_study",
    "study_files",
]


def __getattr__(name: str) -> object:
    if name == "Study":
        from hpo.study.study import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
