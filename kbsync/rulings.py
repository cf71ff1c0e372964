"""A person's choice between claims: for one key as a ruling, for a whole relation as policy text.

rule(ledger, catalog, "Vega", "constellation", Choice(source="iau"), user="ada", reason="checked")
preference(catalog, "constellation", "iau")        # the text to paste, and where
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from kbsync.catalog import Catalog
from kbsync.documents import nearest
from kbsync.errors import UsageError
from kbsync.facts import Claim, Conflict, FactKey, Ruling
from kbsync.ledger import Ledger, Reader, RulingRow
from kbsync.policy import Policy
from kbsync.versions.files import write_durably

__all__ = ["Choice", "Preference", "preference", "rule", "stale", "unrule"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What is chosen: a claim by its number, an object by id or as it is written, or what a source says."""

    claim: int | None = None
    object: str | None = None
    source: str | None = None

    def among(self, claims: Sequence[Claim]) -> Claim:
        """The claim that is meant. Raises UsageError where it is none, or where several objects are meant."""
        found = [
            claim
            for claim in claims
            if (self.claim is None or claim.id == self.claim)
            and (self.object is None or self.object in (claim.object.id, claim.object.label))
            and (self.source is None or claim.source == self.source)
        ]
        objects = {claim.object.id for claim in found}
        if len(objects) == 1:
            return found[0]
        named = ", ".join(f"{claim.object.label} ({claim.source} {claim.origin})" for claim in found or claims)
        problem = "several objects are meant" if found else "no claim says that"
        raise UsageError(f"{problem}: {named}", hint="kbsync conflicts list shows the claims with their numbers")


def rule(
    ledger: Ledger, catalog: Catalog, subject: str, relation: str, choice: Choice, *, user: str, reason: str = ""
) -> dict[str, Any]:
    """Rule that a key's object is the chosen one, over all others that are claimed now. The next pass, or `conflicts
    replay`, acts on it. Raises UsageError where the subject, the claim or the kind of conflict does not allow it."""
    policy = catalog.policy_of(relation)
    with ledger.write() as db:
        claims = _claims(db, policy, subject, relation)
        key = claims[0].key
        _refuse_prompt_conflict(db.conflicts(), key)
        chosen = choice.among(claims)
        overruled = frozenset(claim.object.id for claim in claims) - {chosen.object.id}
        db.rule(key, Ruling(chosen.object.id, overruled, reason), user=user)
    others = sorted({claim.object.label for claim in claims if claim.object.id in overruled})
    return {
        "relation": relation,
        "subject_id": key.subject,
        "subject": chosen.subject.label,
        "object": chosen.object.label,
        "object_id": chosen.object.id,
        "overruled": others,
        "policy": policy.policy,
    }


def unrule(ledger: Ledger, subject: str, relation: str, *, user: str, reason: str = "") -> dict[str, Any]:
    """Withdraw a ruling. Raises UsageError where there is none."""
    with ledger.write() as db:
        keys = {row.key for row in db.rulings([relation])}
        if len(found := {key for key in keys if key.subject == subject}) != 1:
            found = keys & {claim.key for claim in db.claims_about(relation, subject)}
        if len(found) != 1:
            raise UsageError(f"{relation} of {subject!r}: there is no ruling", hint="kbsync conflicts list")
        [key] = found
        db.unrule(key, user=user, reason=reason)
    return {"relation": relation, "subject_id": key.subject}


def stale(db: Reader, rulings: Collection[RulingRow]) -> set[FactKey]:
    """The rulings without effect: no claim names their object any more."""
    found = set()
    for row in rulings:
        claims = db.claims_about(row.key.relation, row.key.subject)
        # An inverse relation has no claims of its own; what it rests on is decided with every pass.
        if claims and row.ruling.object not in {claim.object.id for claim in claims if claim.rank != "deprecated"}:
            found.add(row.key)
    return found


def _claims(db: Reader, policy: Policy, subject: str, relation: str) -> list[Claim]:
    """The claims about one subject, of the policy's sources; of an inverse relation, what the facts say. Raises
    UsageError where there is none, or where several subjects are written so."""
    direct = [name for name, words in policy.relations.items() if words.inverse and words.inverse.relation == relation]
    if direct:
        turned = (
            Claim(fact.source, relation, fact.object, fact.subject, fact.origin, id=fact.claim)
            for fact in db.facts(direct).values()
        )
        claims = [claim for claim in turned if subject in (claim.subject.id, claim.subject.label)]
    else:
        claims = [claim for claim in db.claims_about(relation, subject) if claim.source in policy.sources]
    ids = sorted({claim.subject.id for claim in claims})
    if len(ids) == 1:
        return claims
    problem = f"is ambiguous: {', '.join(ids)}" if ids else "has no claim"
    raise UsageError(f"{relation} of {subject!r} {problem}", hint="kbsync conflicts list shows the ids of subjects")


def _refuse_prompt_conflict(rows: Sequence[Any], key: FactKey) -> None:
    conflicts: list[Conflict] = [row.conflict for row in rows if row.conflict.key == key]
    if any(conflict.kind == "prompt" for conflict in conflicts):
        raise UsageError(
            f"{key.relation} of {key.subject}: two subjects are written alike; choosing an object does not part them",
            hint=f'relations.{key.relation}.subject: "{{subject}} ({{qualifier}})" in the policy does',
        )


@dataclass(frozen=True, slots=True)
class Preference:
    """`relations.R.prefer` as it is to be in a policy: which file, at which line the relation stands, what to paste
    there, and the whole file with it."""

    path: Path
    line: int
    text: str
    whole: str

    def write(self) -> None:
        """Write the file. Raises StoreError where the disk refuses."""
        write_durably(self.path, self.whole.encode())


def preference(catalog: Catalog, relation: str, source: str) -> Preference:
    """The policy text by which `source` is always preferred for `relation`. Comments and order of the file are kept.

    Raises UsageError where the relation has no such source.
    """
    policy = catalog.policy_of(relation)
    if relation not in policy.relations:
        raise UsageError(f"{relation} is an inverse relation: its facts follow the direct ones", hint="kbsync check")
    known = [name for name in policy.sources if catalog.sources[name].relation == relation]
    if source not in known:
        raise UsageError(f"no source {source} of policy {policy.policy} gives {relation}", hint=nearest(source, known))
    document = catalog.policy_files[policy.policy]
    prefer = [source, *(name for name in policy.relations[relation].prefer if name != source)]
    round_trip = YAML()  # builds no objects but text, numbers, lists and mappings
    round_trip.preserve_quotes = True
    round_trip.width = 4096
    tree = round_trip.load(document.path.read_text(encoding="utf-8-sig"))
    tree["relations"][relation]["prefer"] = _flow(prefer)
    text = _dump(round_trip, {"prefer": _flow(prefer)}).rstrip("\n")
    return Preference(document.path, document.line(("relations", relation)), text, _dump(round_trip, tree))


def _flow(names: Sequence[str]) -> CommentedSeq:
    listed = CommentedSeq(names)
    listed.fa.set_flow_style()
    return listed


def _dump(yaml: YAML, value: Any) -> str:
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
