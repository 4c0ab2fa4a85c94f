"""A study: its metadata, its trials and their queue, opened, found, resumed and listed."""

from hpo.study.study import (
    CONFIRMATION,
    Counts,
    Held,
    Study,
    Trained,
    check_search_name,
    find_study,
    join_study,
    list_studies,
    open_study,
)

__all__ = [
    "CONFIRMATION",
    "Counts",
    "Held",
    "Study",
    "Trained",
    "check_search_name",
    "find_study",
    "join_study",
    "list_studies",
    "open_study",
]
