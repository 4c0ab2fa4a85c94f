"""A command imports this first, to fail the operation that $SIEGE chooses: `FOLDER:FILE:N:MODE`; see shim.c."""

from __future__ import annotations

import ctypes
import os

_folder, _file, _n, _mode = os.environ["SIEGE"].split(":")
assert ctypes.CDLL(None).siege_arm(_folder.encode(), _file.encode(), ctypes.c_long(int(_n)), int(_mode)) == 0
