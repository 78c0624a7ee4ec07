"""URLs of services: read strictly, shown without what is secret. The one place that does either.

A password with a character that URLs reserve makes a URL mean something else, and then nobody can tell what of it is
secret. Such a URL is refused before it is used, and of it only the scheme is shown. Used by `config` and the adapters
that connect to a URL.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

HIDDEN = "***"
#: What to do about a password that breaks its URL.
ESCAPES = "in a user or password write @ as %40, # as %23, / as %2F, ? as %3F and % as %25"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOSTS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])?(?::\d*)?")


def redacted(url: str) -> str:
    """The URL fit to be shown: without user and password, and without the values of its query. Takes any text."""
    if not url:
        return ""
    scheme = _SCHEME.match(url)
    if scheme is None:
        return HIDDEN
    rest = url[scheme.end() :]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    userinfo, at, host = authority.rpartition("@")
    path, query, _ = tail.partition("?")
    if "@" in tail or "#" in tail or not _HOSTS.fullmatch(host):
        return scheme[0] + HIDDEN
    return f"{scheme[0]}{HIDDEN if userinfo else ''}{at}{host}{path}{f'?{HIDDEN}' if query else ''}"


def parse_url(url: str, *, schemes: tuple[str, ...], example: str) -> SplitResult:
    """Raises ValueError that says what to write, and shows nothing of the URL but what `redacted` does."""
    fault = None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # raises for what is not a port
    except ValueError:
        parts, fault = urlsplit(""), "cannot be read"
    if not fault and parts.scheme not in schemes:
        fault = f"does not begin with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    elif not fault and ("@" in parts.path + parts.query or parts.fragment or "#" in url):
        fault = "has a reserved character in its user or password"
    elif not fault and not _HOSTS.fullmatch(parts.netloc.rpartition("@")[2]):
        fault = "has no host that can be read"
    if fault:
        raise ValueError(f"{redacted(url)} {fault}; write {example}, and {ESCAPES}")
    return parts
