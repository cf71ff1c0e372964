"""The words of kbsync as frozen values: what a source says (Claim), what the policy accepted (Fact), what the
model is asked to learn (EditRequest). Nothing here reads or writes anything.

Identity is by id: an `Entity.id` is `space:local` (`wikidata:Q937`, `hip:27989`); the label is only how it is written.
Times are timezone-aware UTC `datetime`s; dates that a source gives are kept as the ISO 8601 text it gave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, cast

__all__ = [
    "Alias",
    "Applied",
    "Change",
    "ChangeKind",
    "Claim",
    "Conflict",
    "ConflictKind",
    "Difference",
    "EditRequest",
    "Entity",
    "Entry",
    "Fact",
    "FactKey",
    "FactStatus",
    "Hold",
    "HoldReason",
    "Provenance",
    "QuarantinedRow",
    "Rank",
    "Ruling",
    "Said",
    "Snapshot",
    "WaitReason",
    "Waiting",
    "digest_of",
]

Rank = Literal["preferred", "normal", "deprecated"]
FactStatus = Literal["live", "withdrawn"]
ChangeKind = Literal["added", "changed", "removed", "withdrawn", "restored", "relabelled"]
HoldReason = Literal["rollback", "revert", "probe", "gate", "manual"]
WaitReason = Literal["confirm", "quorum", "flip-flop"]
ConflictKind = Literal["rows", "sources", "ambiguous", "prompt", "inverse"]


def digest_of(value: object) -> str:
    """sha256 (64 hex digits) of a JSON value in canonical form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class Entity:
    """A thing: `id` is `space:local` and decides identity, `label` is how it is written in a prompt."""

    id: str
    label: str


class FactKey(NamedTuple):
    """(relation, subject id): what may have at most one live object (MEMIT Eqn 5). Sorts and hashes as a tuple."""

    relation: str
    subject: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What one source says, and where exactly. `origin` is the row or statement: `line 7`, `wds:Q42-…`.

    `qualifiers` tell subjects apart that are written alike: sorted pairs such as ("state", "Ohio").
    `seen` counts the consecutive accepted fetches that said it, `since` is when the first of them was recorded, and
    `id` is the claim's row in the ledger; a connector leaves all three, the ledger fills them in.
    """

    source: str
    relation: str
    subject: Entity
    object: Entity
    origin: str
    rank: Rank = "normal"
    start: str | None = None
    end: str | None = None
    seen: int = 1
    qualifiers: tuple[tuple[str, str], ...] = ()
    since: datetime | None = field(default=None, compare=False)
    id: int | None = field(default=None, compare=False)

    @property
    def key(self) -> FactKey:
        """The (relation, subject) that the claim is about."""
        return FactKey(self.relation, self.subject.id)


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that cannot be used: where, why, what it said. `subject_id` where it could be read: then the subject
    still counts as present in the snapshot, so that nothing of it is withdrawn."""

    origin: str
    reason: str
    raw: str
    subject_id: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a snapshot came from: URL or path, when, HTTP status (200 for files), sha256 of the body, validators.

    `declaration`: digest of the source file's keys that the body was read with. Validators are offered again only
    under the same declaration: a 304 says nothing about rows that another mapping would have read.
    `as_of`: up to when the answer shows the source's own changes, where it says so; `cursor`: where an incremental
    source goes on; `verified`: the checksum or signature that the body passed.
    """

    location: str
    fetched_at: datetime
    status: int
    body_sha256: str
    etag: str | None = None
    last_modified: str | None = None
    declaration: str | None = None
    as_of: datetime | None = None
    cursor: str | None = None
    verified: str | None = None


@dataclass(frozen=True, slots=True)
class Alias:
    """Another way to write an entity, as the source gives it."""

    entity_id: str
    label: str


Said = tuple[str, str, str, str, str, str | None, str | None, tuple[tuple[str, str], ...], str]
"""A good row, as it is stored: subject id and label, object id and label, rank, start, end, qualifiers, origin. A plain
tuple, because a feed may have a million of them; `Snapshot.claims` makes claims of them where a person looks."""

Entry = Said | QuarantinedRow | Alias


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a source said in one fetch. `content` gives every row each time that it is iterated, and may read them
    anew each time: nothing keeps a large feed in memory but its body. Rows may say the same twice.

    `whole`: the source and its connector speak about every subject, so that an absent one is withdrawn; see `complete`.
    `not_modified`: the source vouched (HTTP 304) that nothing changed since the validators given, or sent the same
    bytes again; then `content` is empty and means nothing. `redirects`: ids that the source has merged into others,
    old -> new. `covers`: of an increment, which speaks about these subjects alone and vouches that no other one has
    changed.

    `claims`, `quarantined`, `aliases`, `complete` and `rows` read all of the content.
    """

    source: str
    relation: str
    provenance: Provenance
    content: Iterable[Entry] = ()
    whole: bool = True
    not_modified: bool = False
    redirects: Mapping[str, str] = field(default_factory=dict)
    covers: frozenset[str] | None = None

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The distinct good rows as claims, each with the place of the first row that says it."""
        first: dict[tuple[object, ...], Said] = {}
        for entry in self.content:
            if isinstance(entry, tuple):
                first.setdefault(entry[:-1], entry)
        return tuple(self._claim(said) for said in first.values())

    def _claim(self, said: Said) -> Claim:
        subject_id, subject, object_id, thing, rank, start, end, qualifiers, origin = said
        return Claim(
            source=self.source,
            relation=self.relation,
            subject=Entity(subject_id, subject),
            object=Entity(object_id, thing),
            origin=origin,
            rank=cast(Rank, rank),
            start=start,
            end=end,
            qualifiers=qualifiers,
        )

    @property
    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """The rows that cannot be used."""
        return tuple(entry for entry in self.content if isinstance(entry, QuarantinedRow))

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Other ways to write an entity, by its id."""
        found: dict[str, tuple[str, ...]] = {}
        for entry in self.content:
            if isinstance(entry, Alias):
                found[entry.entity_id] = (*found.get(entry.entity_id, ()), entry.label)
        return found

    @property
    def complete(self) -> bool:
        """Whether an absent subject is withdrawn (by an increment: a covered one): not while a bad row names none."""
        return self.whole and all(row.subject_id for row in self.quarantined)

    @property
    def rows(self) -> int:
        """Rows read, good and quarantined."""
        return sum(not isinstance(entry, Alias) for entry in self.content)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a snapshot differs from its source's last accepted one, in numbers: what the guard judges.

    `complete`: it speaks about every subject. `rows`: read, good or bad. `claims_before`, `claims`: distinct good rows.
    `subjects`: claimed before; of these `changed` (anything that is said of them) and `removed` (absent, also from the
    rows in quarantine; none where the snapshot's silence means nothing); `added`: not claimed before.
    """

    source: str
    complete: bool
    rows: int
    claims_before: int
    claims: int
    subjects: int
    changed: int = 0
    added: int = 0
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Fact:
    """The claim that the policy accepted for a key. `withdrawn`: the source no longer says it and the policy keeps it.
    `source` and `origin` name the claim behind it (for an inverse fact, the claim behind its origin), `claim` is that
    claim's row in the ledger, `rule` says in words why it was preferred to others."""

    relation: str
    subject: Entity
    object: Entity
    source: str
    origin: str
    status: FactStatus = "live"
    claim: int | None = field(default=None, compare=False)
    rule: str = field(default="", compare=False)

    @property
    def key(self) -> FactKey:
        """The (relation, subject) that the fact is about."""
        return FactKey(self.relation, self.subject.id)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Claims that cannot all be true (Eqn 5). Blocks only its own key, which keeps its last accepted fact."""

    key: FactKey
    kind: ConflictKind
    claims: tuple[Claim, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A key whose claims do not count yet: why, and which object waits (None: not just one). It keeps its last fact."""

    key: FactKey
    reason: WaitReason
    object: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """A person's choice of an object id for a key over those `overruled`. It decides while a claim names the object;
    an object that is neither was not chosen against, and is a conflict again."""

    object: str
    overruled: frozenset[str] = frozenset()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between two states of the ledger for one key; `before`/`after` are None where there was no fact."""

    key: FactKey
    kind: ChangeKind
    before: Fact | None
    after: Fact | None
    at: datetime | None = None
    run_id: int | None = None

    def to_json(self) -> dict[str, object]:
        """The change as a JSON value: subject and objects with id and label."""
        fact = self.after or self.before
        return {
            "relation": self.key.relation,
            "subject_id": self.key.subject,
            "subject": fact.subject.label if fact else None,
            "kind": self.kind,
            "before": self.before.object.label if self.before else None,
            "before_id": self.before.object.id if self.before else None,
            "after": self.after.object.label if self.after else None,
            "after_id": self.after.object.id if self.after else None,
            "source": fact.source if fact else None,
            "origin": fact.origin if fact else None,
            "at": self.at.isoformat() if self.at else None,
            "run": self.run_id,
        }


@dataclass(frozen=True, slots=True)
class EditRequest:
    """What the model is asked to learn: after `prompt` (which contains `subject` exactly once) comes `target`.

    Plain text, rendered: nothing in it is a template any more. `paraphrases` are for probing only, never for z,
    and so are no part of the digest.
    """

    key: FactKey
    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...] = field(default=(), compare=False)

    @property
    def digest(self) -> str:
        """What counts as the same request: sha256 over rendered prompt, subject text and object text."""
        return digest_of([self.prompt, self.subject, self.target])

    def to_json(self) -> dict[str, object]:
        """A JSON value that `from_json` reads back."""
        return {
            "relation": self.key.relation,
            "subject_id": self.key.subject,
            "prompt": self.prompt,
            "subject": self.subject,
            "target": self.target,
            "paraphrases": list(self.paraphrases),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> EditRequest:
        """The inverse of `to_json`. Raises KeyError where a field is missing."""
        paraphrases = value["paraphrases"]
        if not isinstance(paraphrases, list):
            raise TypeError("paraphrases must be a list of strings")
        return cls(
            key=FactKey(str(value["relation"]), str(value["subject_id"])),
            prompt=str(value["prompt"]),
            subject=str(value["subject"]),
            target=str(value["target"]),
            paraphrases=tuple(str(text) for text in paraphrases),
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """A request that a version's weights hold: which column of which delta put it there, and for which object."""

    request: EditRequest
    object_id: str
    delta: str
    column: int


@dataclass(frozen=True, slots=True)
class Hold:
    """A key frozen for one model at what HEAD held for it (`frozen`; None: nothing), and the change held out.

    `held_out` is the object id that is kept out of the weights; None where a retraction is kept out. The hold ends by
    `release`, when the source gives a third object (neither the frozen nor the held-out one), or, where the gate placed
    it, when the settings are other ones.
    """

    key: FactKey
    frozen: Applied | None
    held_out: str | None
    reason: HoldReason
    evidence: str
