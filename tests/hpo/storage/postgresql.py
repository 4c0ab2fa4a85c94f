"""A PostgreSQL server that tests stop and start, and a connection to it that they can cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _programs() -> Path | None:
    """The folder of initdb and pg_ctl: the newest version's, which Debian keeps off the path."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    return max((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)


class Server:
    """A cluster in a folder of its own, on a free port of this machine, without any syncing.

    Args:
        folder: an empty one, which the user `postgres` may reach; the server refuses to run as root.
    """

    def __init__(self, folder: Path) -> None:
        programs = _programs()
        assert programs is not None
        self._programs, self._folder = programs, folder
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "--pgdata", str(folder / "data"), "--auth=trust", "--username=hpo", "--no-sync")
        self.port = free_port()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "--wait", "--pgdata", str(self._folder / "data"), "--log", log, "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` closes its connections, `immediate` is a crash."""
        self._run("pg_ctl", "stop", "--wait", "--pgdata", str(self._folder / "data"), "--mode", mode)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://hpo@127.0.0.1:{self.port}/postgres"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments],
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            check=True,
            timeout=60,
        )


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server that is gone afterwards; skips the test where there is no PostgreSQL."""
    pytest.importorskip("psycopg")
    if _programs() is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not here")
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parent folder other users cannot enter
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # it may be stopped already
                server.stop("immediate")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Wire:
    """A port in front of the server's that drops the answer to a chosen query, which the server still runs."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._cut_at: bytes | None = None
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, words: bytes) -> None:
        """Lets the next message with these words through, and not its answer."""
        self._cut_at = words

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, asking: bool) -> None:
        with contextlib.suppress(OSError), source, sink:
            while message := source.recv(1 << 16):
                words = self._cut_at if asking else None
                if words is not None and words in message:
                    self._cut_at = None
                    source.shutdown(socket.SHUT_RDWR)  # before its answer can be there
                    sink.sendall(message)
                    self.cuts += 1
                    threading.Event().wait(0.2)  # the server shall have done it before it is asked again
                    return
                sink.sendall(message)
