"""What MkDocs does to a page beside rendering it: names in place of links to files of the repository,
which the site does not hold; and within code in tables, bars as they are (elsewhere they need a backslash)."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    named = re.sub(r"\[`?([^\]`]+)`?\]\(\.\./[^)]+\)", r"`\1`", markdown)
    return re.sub(
        r"^\|.*$", lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]), named, flags=re.M
    )
