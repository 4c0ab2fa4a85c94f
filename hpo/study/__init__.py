"""A study: its metadata, its trials and their queue; create, find, resume and list studies."""

from hpo.storage.lease import Held
from hpo.study.open import check_search_name, find_study, join_study, list_studies, open_study
from hpo.study.queue import TrialQueue
from hpo.study.study import Study, Trained
from hpo.trials import Counts

__all__ = [
    "Counts",
    "Held",
    "Study",
    "Trained",
    "TrialQueue",
    "check_search_name",
    "find_study",
    "join_study",
    "list_studies",
    "open_study",
]
