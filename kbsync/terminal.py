"""What may reach a terminal or a log: text, and nothing that a terminal obeys.

Labels of sources are cleaned when they are read (`connectors.text`). A model's answer, the words of a server, of
another program or of a file name are not, and a database may hold what somebody else wrote into it.
"""

from __future__ import annotations

import re

__all__ = ["tame"]

# C0 but tab and newline, DEL, C1 (ECMA-48: colours, titles, the clipboard); the signs that turn the direction of
# writing (https://www.unicode.org/reports/tr36/#Bidirectional_Text_Spoofing); halves of surrogate pairs, which are no
# text that can be printed.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def tame(text: str) -> str:
    """`text` with each such character written out as JSON writes it: `\\u001b`. JSON stays the same JSON."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
