"""The stages of a pass and of the other commands that write, as the tests count them."""

from __future__ import annotations

STAGES = ("start", "fetch", "record", "edit", "probe", "publish", "rollback", "revert", "gc")
"""By number, as in the control file. `start` is all that is none of the others: opening, recovering, ending a run."""
