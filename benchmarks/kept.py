"""What a measurement says of where it was made, and the files of `results` that hold one for each name."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from losses import device_name

from jkd import provenance


def where() -> dict[str, Any]:
    return {"device": device_name(), "date": datetime.date.today().isoformat(), "revision": provenance.code_revision()}


def keep(file: Path, name: str, found: dict[str, Any]) -> None:
    """Puts it in the place of the older one of this name."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(kept | {name: found}, indent=1) + "\n")
