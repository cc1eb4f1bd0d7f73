"""Check that the search of the built documentation finds what people search for.

    python scripts/check_search.py docs/_build/html

It does what the page's JavaScript does: each word is reduced to its stem, and a page is found if it has all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from sphinx.search.en import SearchEnglish

#: What people search for, and the page that must be among those that are found.
EXPECTED: Final = {
    "authentication": "cluster",
    "load balancing": "cluster",
    "failover": "cluster",
    "rate limit": "limits",
    "health check": "cluster",
    "docker": "install",
}


def read_index(folder: Path) -> dict[str, Any]:
    """Return the search index of a built documentation."""
    text = (folder / "searchindex.js").read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    return index


def pages_with(index: dict[str, Any], words: str) -> set[str]:
    """Return the names of the pages that have all words."""
    stemmer = SearchEnglish({})
    pages: set[int] | None = None
    for word in words.split():
        stem = stemmer.stem(word)
        found: set[int] = set()
        for table in ("terms", "titleterms"):
            entry = index[table].get(stem, [])
            # A word of one page only has the number of that page in place of a list.
            found.update([entry] if isinstance(entry, int) else entry)
        pages = found if pages is None else pages & found
    return {index["docnames"][number] for number in pages or ()}


def main() -> int:
    """Return 0 if everything is found, otherwise 1, and print what is not."""
    index = read_index(Path(sys.argv[1]))
    missing = 0
    for words, page in EXPECTED.items():
        found = pages_with(index, words)
        if page not in found:
            missing += 1
            print(f"'{words}' does not find the page '{page}', but {sorted(found)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
