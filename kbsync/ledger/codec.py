"""The values that the ledger keeps as JSON text, and back: validated by pydantic on the way in, so that a damaged or
hand-edited row is refused rather than half understood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kbsync.errors import LedgerError
from kbsync.facts import Applied, Claim, Entry, Said, Snapshot, digest_of

__all__ = [
    "applied_from_json",
    "applied_to_json",
    "claims_from_json",
    "claims_to_json",
    "same_claims",
    "snapshot_from_text",
    "snapshot_to_text",
]

_SNAPSHOT = TypeAdapter(Snapshot)
_CONTENT = TypeAdapter(tuple[Entry, ...])
_CLAIMS = TypeAdapter(tuple[Claim, ...])
_APPLIED = TypeAdapter(Applied)


def snapshot_to_text(snapshot: Snapshot) -> str:
    """A staged snapshot as JSON text, with all of its content."""
    value = _SNAPSHOT.dump_python(snapshot, mode="json", exclude={"content"})
    return json.dumps(value | {"content": _CONTENT.dump_python(tuple(snapshot.content), mode="json")})


def snapshot_from_text(text: str) -> Snapshot:
    """The inverse of `snapshot_to_text`. Raises LedgerError where the text is no snapshot."""
    try:
        value = _modern(json.loads(text))
        content = _CONTENT.validate_python(value.pop("content"))
        return replace(_SNAPSHOT.validate_python(value), content=content)
    except (ValidationError, ValueError, KeyError) as error:
        raise LedgerError("a staged snapshot is damaged", hint="kbsync reject it, then kbsync sync") from error


def _modern(value: dict[str, Any]) -> dict[str, Any]:
    """A snapshot as schema 0001 kept it had claims and quarantined rows apart, and `complete` worked out."""
    if "claims" not in value:
        return value
    content = [*map(_said, _CLAIMS.validate_python(value.pop("claims"))), *value.pop("quarantined")]
    return value | {"content": content, "whole": value.pop("complete")}


def _said(claim: Claim) -> Said:
    one, other = claim.subject, claim.object
    return (
        one.id,
        one.label,
        other.id,
        other.label,
        claim.rank,
        claim.start,
        claim.end,
        claim.qualifiers,
        claim.origin,
    )


def claims_to_json(claims: Sequence[Claim]) -> Any:
    """The claims of a conflict as a JSON value."""
    return _CLAIMS.dump_python(tuple(claims), mode="json")


def claims_from_json(value: Any) -> tuple[Claim, ...]:
    """The inverse of `claims_to_json`."""
    return _CLAIMS.validate_python(value)


def same_claims(one: Sequence[Claim], other: Sequence[Claim]) -> bool:
    """Whether two conflicts are about the same claims: how often and where they were seen does not matter."""

    def gist(claims: Sequence[Claim]) -> list[str]:
        return sorted(digest_of(claims_to_json([replace(claim, seen=1, origin="")])) for claim in claims)

    return gist(one) == gist(other)


def applied_to_json(applied: Applied) -> Any:
    """What a hold froze, as a JSON value."""
    return _APPLIED.dump_python(applied, mode="json")


def applied_from_json(value: Any) -> Applied:
    """The inverse of `applied_to_json`."""
    return _APPLIED.validate_python(value)
