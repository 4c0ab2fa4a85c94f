"""Start `hpo` commands as processes of their own, forked from a server that has imported torch, timm and Optuna.

A command that a test starts, interrupts and kills is a real process with its own group, pipes and exit status, but
spends no five seconds of processor time on imports. Its workers are forked from a server of its own, in its process
group. Tests of imports, start-up and command lines run `python -m hpo.cli` themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import arbitrary_address
from pathlib import Path
from typing import Any

from hpo.search.interrupts import SIGNALS

IMPORTED = "HPO_TESTS_IMPORT"
"""Environment variable with the name of a module that a command imports first."""
_STREAMS = 3
_PRELOADED = (
    *("matplotlib.figure", "optuna", "pandas", "scipy.stats", "sklearn.datasets", "sqlalchemy", "timm", "typer"),
    *("hpo.workers.worker", "hpo.submission.refit"),  # not hpo.cli, whose console keeps the width of its first terminal
)


class Hpo(subprocess.Popen[str]):
    """`subprocess.Popen` of `python -m hpo.cli ARGUMENTS`, forked instead of executed.

    Args:
        preload: a library that the command is linked with before all others.
    """

    def __init__(self, arguments: Sequence[str], *, preload: Path | None = None, **options: Any) -> None:
        self._status: socket.socket | None = None
        self._preload = preload
        super().__init__([sys.executable, "-m", "hpo.cli", *arguments], text=True, **options)

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
        errread: int, errwrite: int, restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: Any,
        start_new_session: bool, *rest: Any,
    ) -> None:  # fmt: skip
        """Request a fork from the server, in place of fork and exec. Called by `subprocess.Popen`."""
        assert preexec_fn is None
        request = {
            "arguments": args[3:],
            "cwd": os.fspath(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        theirs = (p2cread, c2pwrite, errwrite)
        text = json.dumps(request).encode()
        self._status = socket.socket(socket.AF_UNIX)
        self._status.connect(_server(self._preload))
        streams = [number if stream == -1 else stream for number, stream in enumerate(theirs)]
        socket.send_fds(self._status, [len(text).to_bytes(8, "little")], streams)
        self._status.sendall(text)
        self.pid = int.from_bytes(self._status.recv(8), "little")
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        assert self._status is not None
        if wait_flags == os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        with self._status:
            answer = self._status.recv(8)
        return self.pid, int.from_bytes(answer, "little") if answer else signal.SIGKILL

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and self._status is not None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self._handle_exitstatus(status)
        return self.returncode


@functools.cache
def _server(preload: Path | None) -> str:
    """Return the address of this process's server with a library, which ends with this process."""
    address = f"{tempfile.mkdtemp(prefix='hpo-tests-')}/socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hpo.zygote", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(preload)} if preload else {})},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.kill)
    return address


# In the server


def serve(address: str) -> list[str]:
    """Fork a command for each request. Returns the arguments, in the command's process only."""
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    children: dict[int, socket.socket] = {}
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(32)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, woken, sys.stdin], [], [])
        if sys.stdin in ready:  # the tests' process is gone
            os._exit(0)
        if woken in ready:
            woken.recv(4096)
            _report_ended(children)
        if listener in ready:
            connection, _ = listener.accept()
            head, streams, _, _ = socket.recv_fds(connection, 8, _STREAMS)
            text = b""
            while len(text) < int.from_bytes(head, "little"):
                text += connection.recv(1 << 16)
            pid = os.fork()
            if pid == 0:
                for held in (listener, woken, waker, connection, *children.values()):
                    held.close()
                return _enter(json.loads(text), streams)
            for stream in streams:
                os.close(stream)
            children[pid] = connection
            connection.sendall(pid.to_bytes(8, "little"))


def _report_ended(children: dict[int, socket.socket]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in children:
            connection = children.pop(pid)
            with contextlib.suppress(OSError):  # of a test that does not wait for it
                connection.sendall(status.to_bytes(8, "little"))
            connection.close()


def _enter(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Turn this fork into the command's process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if "PYTHONUNBUFFERED" in os.environ else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    if IMPORTED in os.environ:
        importlib.import_module(os.environ[IMPORTED])
    _fork_server_of_workers()
    return list(request["arguments"])


def _fork_server_of_workers() -> None:
    """Start `multiprocessing`'s fork server as a fork of this process; `ensure_running` would execute one."""
    resource_tracker.ensure_running()
    server: Any = forkserver._forkserver
    alive, server._forkserver_alive_fd = os.pipe()
    server._forkserver_address = arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(server._forkserver_address)
        listener.listen()
        server._forkserver_pid = os.fork()
        if server._forkserver_pid == 0:
            os.close(server._forkserver_alive_fd)
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                forkserver.main(listener.fileno(), alive, [])  # type: ignore[attr-defined]
            finally:
                os._exit(0)
    os.close(alive)


def _run(arguments: list[str]) -> None:
    """Run the command and end its process."""
    from hpo.cli import main

    sys.argv = ["hpo", *arguments]
    try:
        main()
    except SystemExit as ended:
        # The interpreter's own end would write to every page shared by the fork: a second of processor time.
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _run(serve(sys.argv[1]))
