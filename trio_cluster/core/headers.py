"""The grammar of HTTP header fields (RFC 9110, section 5) and of queries, as far as this package checks it."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["HEADER_NAME", "HEADER_VALUE", "QUERY", "QUERY_MAX"]

#: A field name: a token.
HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: A field value: visible ASCII, spaces and tabs, and the upper half of Latin-1, which older servers use.
HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
#: The query of a URL: visible ASCII, without the mark that begins a fragment. Such a text cannot end a request line.
QUERY: Final = re.compile(r"[\x21\x22\x24-\x7e]*")
#: Characters of a query that is passed on.
QUERY_MAX: Final = 8192
