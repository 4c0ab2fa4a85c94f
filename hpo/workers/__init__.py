"""Several trials of one study at once, each in a process of its own: on one device, several, or a cluster.

All workers claim trials by compare-and-set in the storage, as a single process does, so the total is exact. Processes,
not threads: torch's generators and thread counts are per process, and a crash must not end the other trials.

`work.py` runs trials where `placement.py` puts them; `pool.py` supervises workers, started by an `Engine`: `local.py`
or `ray.py`. `worker.py` is the worker itself. `calibration.py` finds the best number of trials at once.
"""
