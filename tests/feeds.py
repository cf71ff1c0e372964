"""Feeds for tests: a declared source over a file in the test's folder, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kbsync.connectors import Connector, make_connector
from kbsync.facts import Snapshot
from kbsync.policy import Source

CSV = "hip,name,con\n91262,Vega,Lyr\n102098,Deneb,Cyg\n"
JSONL = '{"hip": 91262, "name": "Vega", "con": "Lyr"}\n{"hip": 102098, "name": "Deneb", "con": "Cyg"}\n'
BODIES = {"csv": CSV, "jsonl": JSONL}


def connector(folder: Path, kind: str = "csv", *, allowed_dirs: tuple[Path, ...] = (), **keys: Any) -> Connector:
    """A source of stars in `folder`, with these keys; None leaves one out."""
    declared = {
        "source": "stars",
        "type": kind,
        "relation": "constellation",
        "ids": "hip",
        "location": f"stars.{kind}",
        "row_id": "hip",
        "columns": {"subject": "name", "object": "con"},
        **keys,
    }
    given = {key: value for key, value in declared.items() if value is not None}
    return make_connector(Source.model_validate(given), folder=folder, allowed_dirs=allowed_dirs)


def read(folder: Path, text: str | bytes, kind: str = "csv", **keys: Any) -> Snapshot:
    """What a file with this text says."""
    (folder / f"stars.{kind}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return connector(folder, kind, **keys).fetch(None)


def pairs(snapshot: Snapshot) -> dict[str, str]:
    """Subject -> object, as they are written."""
    return {claim.subject.label: claim.object.label for claim in snapshot.claims}


def reasons(snapshot: Snapshot) -> list[tuple[str, str, str | None]]:
    """Origin, reason (its first sentence) and subject id of each quarantined row."""
    return [
        (row.origin, row.reason.partition("; nothing is withdrawn")[0], row.subject_id) for row in snapshot.quarantined
    ]
