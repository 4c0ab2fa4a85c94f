"""How a storage is named, how that is shown without its password, and what to say of one that will not do."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote_plus, urlsplit

MASK = "***"
_DRIVERS = {
    "psycopg": ("postgresql", "postgresql+psycopg://"),
    "psycopg2": ("postgresql", "postgresql+psycopg://"),
    "pymysql": ("mysql", "mysql+pymysql://"),
    "MySQLdb": ("mysql", "mysql+pymysql://"),
    "redis": ("redis", "redis://"),
}
"""Module that a driver is -> (the extra of ours that brings it, the URL that asks for it)."""
_URLS = "a journal's path, sqlite:///FILE, postgresql+psycopg://…, mysql+pymysql://… or redis://…"


def is_journal(url: str) -> bool:
    """Whether a storage is named by the path of a journal file."""
    return "://" not in url


_SECRET_PARAMETERS = "password|sslpassword|account_key|sas_token|sig|secret|token"
"""What is secret in a URL's query, of databases and of what fsspec reaches."""


def mask(url: str) -> str:
    """The URL as it may be shown and written down: `***` for its password."""
    if is_journal(url):
        return url
    for secret in _secrets(url):
        url = url.replace(secret, MASK)
    return url


def is_masked(url: str) -> bool:
    """Whether the URL has lost its password."""
    return MASK in _secrets(url)


def options_of(url: str) -> set[str]:
    """The names of the options that stand behind a URL's `?`."""
    return {name for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True)}


def _secrets(url: str) -> list[str]:
    """What of a URL is secret, as it is spelt there; nothing where it cannot be read as one."""
    if is_journal(url):
        return []
    # Not urlsplit's password: that one stops at a `/` or `#`, which people forget to quote. In front of the scheme may
    # stand others, as in `simplecache::ftp://`.
    found = re.search(r"://[^:@/]*:(.+)@", url)
    return ([found[1]] if found else []) + re.findall(rf"(?i)[?&](?:{_SECRET_PARAMETERS})=([^&#]+)", url)


def advice(url: str, error: BaseException) -> str:
    """What is wrong with a storage that cannot be opened, and what to do about it."""
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
    """What a driver says of an error: on one line, without secrets."""
    words = " ".join(str(error).split())
    for secret in _secrets(url):
        words = words.replace(secret, MASK).replace(unquote_plus(secret), MASK)
    words = re.sub(r"\s*\(Background on this error at: .*?\)", "", words)
    return re.sub(r"^\([\w.]+\)\s*", "", words)


def missing_module(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        if isinstance(error, ImportError) and "redis" in str(error):
            return "redis"
        error = error.__cause__
    return None
