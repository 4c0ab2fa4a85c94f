"""One thread of torch in every process of the suite, unless OMP_NUM_THREADS says otherwise.

Two threads that share two cores with another busy process wait for each other: up to ten times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
