"""Several trials of one study at once, each in a process of its own: on one device, several, or a cluster.

Workers claim trials from the storage, as a single process does, so the total is exact. They are processes because
torch's generators and thread counts are per process, and a crash must not end other trials.

`work.py` runs trials where `placement.py` puts them; `pool.py` supervises workers (`worker.py`), started by an `Engine`
(`local.py` or `ray.py`). `calibration.py` finds the best number of trials at once.
"""
