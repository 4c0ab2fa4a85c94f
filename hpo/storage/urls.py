"""URLs of storages: passwords, and advice for one that cannot be opened."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from hpo.errors import StudyError

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
_SECRETS = (
    # The password of urlsplit stops at a `/` or `#`, which users forget to quote. There may be several schemes.
    re.compile(r"(?is)(?<!sqlite)://+[^:@/]*(?::|%3a)(.+)@"),
    # Redis has no users without a password, and a web server's user alone is a token.
    re.compile(r"(?is)(?:rediss?|https?)://([^:@/]+)@"),
    re.compile(rf"(?is)[?&](?:{_SECRET_PARAMETERS})=([^&#]+)"),
)
_SECRETS_OF_A_PATH = (
    re.compile(r"(?s)^(?![a-zA-Z]:[/\\])[^:]*:/*(.+)@"),  # a mistyped URL, but no drive of Windows
    re.compile(r"(?is)password\s*=(.+)"),  # a driver's `host=… password=…`
)
_SCHEME = re.compile(r"(?i)[a-z][\w+.\-]+:")


def mask(url: str) -> str:
    """Return the URL with `***` for its password, to be shown and stored."""
    for start, end in reversed(_secrets(url)):
        url = url[:start] + MASK + url[end:]
    return url


def is_masked(url: str) -> bool:
    """Return whether `mask` has removed the URL's password."""
    return any(url[start:end] == MASK for start, end in _secrets(url))


def _secrets(url: str) -> list[tuple[int, int]]:
    """First character of each secret and the one after it, in order and disjoint."""
    patterns = _SECRETS_OF_A_PATH if is_journal(url) else _SECRETS
    found = sorted(at.span(1) for pattern in patterns for at in pattern.finditer(url))
    return [span for span, before in zip(found, [(0, 0), *found], strict=False) if span[0] >= before[1]]


def check_path(given: str, option: str) -> None:
    """Raise StudyError if a path is a mistyped URL: it would be written down with the password.

    Args:
        given: A URL or a path.
        option: Name of its option.
    """
    if is_journal(given) and (_SCHEME.match(given) or _secrets(given)):
        raise StudyError(
            f"{option} {mask(given)} is neither a URL nor a plain path; write SCHEME://…, or a path without a colon"
        )


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
    for start, end in _secrets(url):
        for secret in (url[start:end], unquote_plus(url[start:end])):
            words = words.replace(" ".join(secret.split()), MASK)
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
