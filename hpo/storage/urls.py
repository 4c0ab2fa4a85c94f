"""URLs of storages: passwords, and advice for one that cannot be opened."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

MASK = "***"
_DRIVERS = {
    "psycopg": ("postgresql", "postgresql+psycopg://"),
    "psycopg2": ("postgresql", "postgresql+psycopg://"),
    "pymysql": ("mysql", "mysql+pymysql://"),
    "MySQLdb": ("mysql", "mysql+pymysql://"),
    "redis": ("redis", "redis://"),
}
"""Module of a driver -> the extra of this package that installs it, and its URL."""
_URLS = "a journal's path, sqlite:///FILE, postgresql+psycopg://…, mysql+pymysql://… or redis://…"


def is_journal(url: str) -> bool:
    """Whether a storage is a journal's path."""
    return "://" not in url


_SECRET_PARAMETERS = "password|sslpassword|account_key|sas_token|sig|secret|token"
"""Secret parameters in the query of a URL."""


def mask(url: str) -> str:
    """Return the URL with `***` for its password, to be shown and stored."""
    for secret in _secrets(url):
        url = url.replace(secret, MASK)
    return url


def is_masked(url: str) -> bool:
    """Return whether `mask` has removed the URL's password."""
    return MASK in _secrets(url)


def _secrets(url: str) -> list[str]:
    if is_journal(url):
        return []
    # The password of urlsplit stops at a `/` or `#`, which users forget to quote. There may be several schemes.
    found = re.search(r"://[^:@/]*:(.+)@", url)
    return ([found[1]] if found else []) + re.findall(rf"(?i)[?&](?:{_SECRET_PARAMETERS})=([^&#]+)", url)


def advice(url: str, error: BaseException) -> str:
    """Describe why a storage cannot be opened, and how to fix it."""
    missing = missing_module(error)
    if missing in _DRIVERS:
        extra, scheme = _DRIVERS[missing]
        if url.startswith(scheme):
            return f"the driver {missing} is not installed; pip install 'hpo-vision[{extra}]'"
        return f"the driver {missing} is not installed; write {scheme}… and pip install 'hpo-vision[{extra}]'"
    kind = type(error).__name__
    if kind in ("ArgumentError", "NoSuchModuleError", "ValueError") or missing:
        return f"not a storage that Optuna knows; give {_URLS}"
    hint = "check the folder" if url.startswith("sqlite") else "check that the server runs, and host, user and database"
    return f"cannot be opened ({words_of(url, error)}); {hint}"


def words_of(url: str, error: BaseException) -> str:
    """Return a driver's message, on one line, without secrets."""
    words = " ".join(str(error).split())
    for secret in _secrets(url):
        words = words.replace(secret, MASK).replace(unquote_plus(secret), MASK)
    words = re.sub(r"\s*\(Background on this error at: .*?\)", "", words)
    return re.sub(r"^\([\w.]+\)\s*", "", words)


def missing_module(error: BaseException | None) -> str | None:
    """Return the module whose failed import caused the error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        if isinstance(error, ImportError) and "redis" in str(error):
            return "redis"
        error = error.__cause__
    return None
