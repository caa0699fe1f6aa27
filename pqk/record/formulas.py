"""Escapes text that a spreadsheet would run as a formula, `safe_text`; for every table that is written to a file.

Source of the rules: OWASP, "CSV Injection". The full-width, small, raised and lowered forms of a sign count as the sign
itself: they are compared after Unicode's compatibility normalisation (NFKC).
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = frozenset("=+-@\N{MINUS SIGN}")
_BREAKS = "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
_SPLIT = re.compile(f"([;{_BREAKS}])")  # where a program may begin a new cell, whatever the quotes say
_UNSEEN = ("C", "Z", "M")  # Unicode categories: control, format and unassigned; blanks; marks


def starts_formula(text: str) -> bool:
    """Returns whether the first visible character, after blanks and control characters, is =, +, - or @ in any form."""
    for char in text:
        if unicodedata.category(char)[0] not in _UNSEEN:
            return unicodedata.normalize("NFKC", char)[0] in _SIGNS
    return False


def holds_formula(text: str) -> bool:
    """Returns whether a formula would start after a semicolon, tab or line break of the text."""
    return any(map(starts_formula, _SPLIT.split(text)[2::2]))


def escape_splits(text: str) -> str:
    r"""Writes semicolons, tabs and line breaks as `\u` and four hexadecimal digits, which JSON and the ledger read."""
    return _SPLIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def safe_text(text: str) -> str:
    """Puts an apostrophe before a text that a spreadsheet may take for a formula, and before each formula inside it.

    Such a text starts with a formula, a tab or a line break, or has a formula after a semicolon, tab or line break:
    a program that splits there, as Excel does in many countries, would begin a cell with it.
    """
    safe = "".join(f"'{piece}" if starts_formula(piece) else piece for piece in _SPLIT.split(text))
    changed = safe != text or text.startswith(tuple(_BREAKS))
    return f"'{safe}" if changed and not safe.startswith("'") else safe
