"""Several trials of one study at once, each in a process of its own: on one device, on several, or on a cluster.

Processes, never threads: Python runs one thread at a time, torch's generators and its count of threads are the
process's, and what kills one trial must not kill its neighbours. A worker is spawned, since CUDA does not survive a
fork. All of them claim trials by the storage's compare-and-set, as one process alone does, so nothing has to be handed
out and the total stays exact. What a worker has to tell goes to the parent over a pipe of its own: a queue that all
share has a lock, which a killed worker would take with it.
"""

from hpo.workers.capacity import free_capacity
from hpo.workers.engine import Engine
from hpo.workers.local import LocalProcesses
from hpo.workers.messages import Job
from hpo.workers.pool import Crew, Lane, run_workers
from hpo.workers.tuning import not_found_out

__all__ = ["Crew", "Engine", "Job", "Lane", "LocalProcesses", "free_capacity", "not_found_out", "run_workers"]
