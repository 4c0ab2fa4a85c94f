"""Serves optuna-dashboard on a study, with its artifacts.

The dashboard is Optuna's own, as a WSGI application on the standard library's threaded server. In this process rather
than as a command: any storage that a study may live in is opened the way the study opens it, the port is known to be
free before anything is promised, and Ctrl-C ends it quietly. It asks for no password, so it listens to this machine
alone unless told otherwise, and then says so.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import socketserver
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from optuna.storages import BaseStorage

from hpo.cli.console import say
from hpo.errors import StudyError
from hpo.storage import is_journal, mask, open_storage

if TYPE_CHECKING:
    from hpo.storage.optuna_access import OptunaArtifactStore

logger = logging.getLogger(__name__)


def command(storage_url: str, artifacts: Path) -> list[str]:
    """The plain `optuna-dashboard …` command that shows the same; a password in the URL is masked."""
    return ["optuna-dashboard", mask(storage_url), "--artifact-dir", str(artifacts)]


def serve(storage_url: str, artifacts: OptunaArtifactStore, *, study_name: str, host: str, port: int) -> None:
    """Serves the dashboard until Ctrl-C, having said where the study's page is.

    Args:
        artifacts: `Study.artifact_store`.
        port: 0 takes any free one.

    Raises:
        StudyError: the storage has no such study, or the address cannot be listened on.
    """
    with make_server(storage_url, artifacts, study_name=study_name, host=host, port=port) as server:
        say(f"study {study_name}: {server.study_url}")
        if not _is_loopback(server):
            say(f"others can reach {host}, and whoever does can change the study: the dashboard asks for no password")
        say("Ctrl-C stops the dashboard")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.debug("the dashboard was stopped")


class DashboardServer(socketserver.ThreadingMixIn, WSGIServer):
    """A server that is bound to its address. As a context it is closed at the end."""

    daemon_threads = True  # a browser's idle connection must not hold up the end
    study_url = ""
    """The page of the study."""

    def server_bind(self) -> None:
        """Binds without asking a name server who we are, which can take long and is needed by nobody."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _DashboardServer6(DashboardServer):
    address_family = socket.AF_INET6


def make_server(
    storage_url: str, artifacts: OptunaArtifactStore, *, study_name: str, host: str, port: int
) -> DashboardServer:
    """Opens the study's storage and listens on the address, without answering yet.

    Raises:
        StudyError: the storage has no such study, or the address cannot be listened on.
    """
    if is_journal(storage_url) and not Path(storage_url).is_file():
        raise StudyError(f"{storage_url}: no such journal, so there is no study to show")
    storage = open_storage(storage_url)
    try:
        study_id = storage.get_study_id_from_name(study_name)
    except KeyError as error:
        raise StudyError(f"study {study_name}: not in {mask(storage_url)}; hpo study list shows those here") from error
    server = _listen(host, port)
    server.set_app(_application(storage, artifacts))
    shown = f"[{host}]" if ":" in host else host
    server.study_url = f"http://{shown}:{server.server_port}/dashboard/studies/{study_id}"
    return server


def _is_loopback(server: DashboardServer) -> bool:
    """Whether only this machine reaches the address that the server is bound to, whatever name it was given by."""
    return ipaddress.ip_address(server.server_name).is_loopback


def _application(storage: BaseStorage, artifacts: OptunaArtifactStore) -> Callable[..., Any]:
    import optuna_dashboard  # takes a second

    application: Callable[..., Any] = optuna_dashboard.wsgi(storage, artifacts)  # type: ignore[attr-defined]
    return application


def _listen(host: str, port: int) -> DashboardServer:
    kind = _DashboardServer6 if ":" in host else DashboardServer
    try:
        return kind((host, port), _QuietHandler)
    except OSError as error:
        where = f"port {port} of {host}"
        if error.errno == errno.EADDRINUSE:
            raise StudyError(f"{where} is taken; give another: --port {port % 65535 + 1}") from error
        if error.errno == errno.EACCES:
            raise StudyError(f"{where} is not yours to take; give one above 1023: --port 8080") from error
        raise StudyError(f"{where} cannot be listened on ({error.strerror}); check --host") from error


class _QuietHandler(WSGIRequestHandler):
    """Answers without a line on the terminal for every request."""

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
