"""What a user did wrong, in one line: the value, the field, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes of the command line; 75 (stopped, the same command resumes) is sysexits.h's EX_TEMPFAIL."""


class InputError(ValueError):
    """A value that the user gave and can mend. The CLI prints its message as one line and exits with 2."""


class MissingExtra(InputError, ImportError):
    """A part of jkd was used whose packages are not installed; the message holds the install command."""


def nearest(name: str, options: Iterable[str], *, count: int = 3) -> str:
    """A clause that helps after a typo: ``"; did you mean 'a' or 'b'?"``, else the (shortened) list of what there is."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if not options:
        return "; there are none"
    shown = ", ".join(options[:12]) + (f", … ({len(options)} in all)" if len(options) > 12 else "")
    return f"; there are: {shown}"
