"""The base URL of a server's API, parsed and checked."""

from __future__ import annotations

from urllib.parse import unquote_plus, urlsplit

import attrs

__all__ = ["BaseURL"]


@attrs.frozen
class BaseURL:
    """The base URL of a server's API, ``http://host:port/some/prefix``.

    A query (``?api-version=...``) is part of every request. It is not shown: it may hold a key.

    Attributes:
        scheme: ``http`` or ``https``.
        host: a name or an address; an IPv6 address without brackets.
        port: as given, or the default port of the scheme.
        path: the path prefix, percent-encoded as given, without a trailing slash.
        query: what follows the question mark, percent-encoded as given; empty if there is none.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = attrs.field(default="", repr=False)

    @classmethod
    def parse(cls, url: str) -> BaseURL:
        """Parse a URL.

        Raises:
            ValueError: it cannot be the base URL of an API; the message says what is wrong with it.
        """
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"a URL has no spaces and only ASCII characters: {url!r}")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000/v1, got '{url}'")
        if parts.username is not None or parts.fragment:
            raise ValueError(f"leave the user and the fragment out of the URL: '{url}'")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError(f"the port must be a number from 1 to 65535: '{url}'")
        default = 443 if parts.scheme == "https" else 80
        return cls(parts.scheme, parts.hostname, port or default, parts.path.rstrip("/"), parts.query)

    def target(self, path: str, query: str = "") -> str:
        """Return the request target for a path below this URL.

        Args:
            path: percent-encoded.
            query: added to the query of this URL, without those of its parameters that this URL has too. Of two
                parameters of one name some servers take the first, and others the last.
        """
        if query and self.query:
            own = set(_names(self.query))
            given = zip(_names(query), query.split("&"), strict=True)
            query = "&".join([self.query, *(parameter for name, parameter in given if name not in own)])
        query = query or self.query
        return f"{self.path}{path}?{query}" if query else self.path + path

    @property
    def authority(self) -> str:
        """The value of the ``Host`` header: the host, and the port unless it is the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def _names(query: str) -> list[str]:
    return [unquote_plus(parameter.partition("=")[0]) for parameter in query.split("&")]
