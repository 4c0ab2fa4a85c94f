"""Serve optuna-dashboard for a study, with its artifacts.

It runs in this process, and not as a command: so it opens the storage as the study does, draws pictures on demand, and
reports a taken port at once. It has no password, so by default it listens to this machine only.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import socketserver
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from hpo.dashboard.artifacts import PicturesOnDemand
from hpo.errors import StudyError
from hpo.storage import mask, open_storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from hpo.study import Study

logger = logging.getLogger(__name__)


def command(storage_url: str, artifacts: Path) -> list[str]:
    """Return the `optuna-dashboard …` command for a study; a password in the URL is masked."""
    return ["optuna-dashboard", mask(storage_url), "--artifact-dir", str(artifacts)]


def serve(study: Study, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the dashboard until Ctrl-C; `say` is called with each line for the user, the first with the URL.

    Raises:
        StudyError: The server cannot listen on the address.
    """
    with make_server(study, host=host, port=port) as server:
        say(f"study {study.name}: {server.study_url}")
        if not ipaddress.ip_address(server.server_name).is_loopback:
            say(f"others can reach {host} and change the study: the dashboard asks for no password")
        say("Ctrl-C stops the dashboard")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.debug("the dashboard was stopped")


class DashboardServer(socketserver.ThreadingMixIn, WSGIServer):
    """A threaded server that is bound to its address, as a context manager that closes it."""

    daemon_threads = True  # an idle connection of a browser must not delay the end
    study_url = ""
    """URL of the study's page."""

    def server_bind(self) -> None:
        """Bind without the lookup of the host's name that the base class does, which can take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that close the connection during an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _DashboardServer6(DashboardServer):
    address_family = socket.AF_INET6


def make_server(study: Study, *, host: str, port: int) -> DashboardServer:
    """Open the study's storage and listen on the address, without answering yet; port 0 is any free one.

    Raises:
        StudyError: The server cannot listen on the address.
    """
    import optuna_dashboard  # takes a second

    server = _listen(host, port)
    storage = open_storage(study.storage_url)
    names = {host, "localhost", socket.gethostname()}
    server.set_app(_only_by(names, optuna_dashboard.wsgi(storage, PicturesOnDemand(study))))  # type: ignore[attr-defined]
    shown = f"[{host}]" if ":" in host else host
    study_id = storage.get_study_id_from_name(study.name)
    server.study_url = f"http://{shown}:{server.server_port}/dashboard/studies/{study_id}"
    return server


def _only_by(names: Collection[str], app: WSGIApplication) -> WSGIApplication:
    """Answer requests by these names or an IP address only.

    Else a page elsewhere could point its own name at this address (DNS rebinding), and read and change the study.
    """
    known = {name.lower() for name in names}

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if (name := _name_in(environ)) in known or _is_address(name):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"The dashboard is not served under this name; use the address that hpo dashboard has printed.\n"]

    return checked


def _name_in(environ: WSGIEnvironment) -> str:
    """The name by which a browser has found the server, in lower case; empty if it makes no sense."""
    try:
        return urlsplit(f"//{environ.get('HTTP_HOST', 'localhost')}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _listen(host: str, port: int) -> DashboardServer:
    if not host.strip():
        raise StudyError("--host is empty, which is every address of this machine; give one, such as 127.0.0.1")
    kind = _DashboardServer6 if ":" in host else DashboardServer
    try:
        return kind((host, port), _QuietHandler)
    except OSError as error:
        where = f"port {port} of {host}"
        if error.errno == errno.EADDRINUSE:
            raise StudyError(f"{where} is taken; choose another: --port {port % 65535 + 1}") from error
        if error.errno == errno.EACCES:
            raise StudyError(f"{where} needs more rights; choose one above 1023: --port 8080") from error
        raise StudyError(f"{where} cannot be listened on ({error.strerror}); check --host") from error


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
