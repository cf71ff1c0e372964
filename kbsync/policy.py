"""Sources and policies as validated values: what `sources/*.yaml` and `policies/*.yaml` may say, and nothing else.

Values only; `catalog.py` reads the files and names file, line and key of what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from kbsync.facts import EditRequest, Fact

__all__ = [
    "Batch",
    "Confirm",
    "Freshness",
    "Gate",
    "Guard",
    "Inverse",
    "Policy",
    "Relation",
    "Schedule",
    "Share",
    "Source",
    "render",
]

SUBJECT = "{subject}"
_FIELD = re.compile(r"\{([a-z][a-z0-9_]*)\}")
"""`{subject}`, `{state}`: a name in the template of a subject."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_DURATION = re.compile(r"(\d+)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _share(value: object) -> object:
    """`20%` -> 0.2; a number stays what it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


def _seconds(value: object) -> object:
    """`6h` -> 21600.0 seconds; a number is taken as seconds."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        return float(int(match[1]) * _SECONDS[match[2]])
    return value


Share = Annotated[float, BeforeValidator(_share), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
Name = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _template(text: str) -> str:
    if (found := text.count(SUBJECT)) != 1:
        raise ValueError(f"needs {SUBJECT} exactly once, has it {found} times")
    if re.search(r"[{}]", text.replace(SUBJECT, "")):
        raise ValueError(f"has braces other than {SUBJECT}")
    return text


Template = Annotated[str, Field(max_length=512), BeforeValidator(lambda v: _template(v) if isinstance(v, str) else v)]


def _subject_template(text: str) -> str:
    if (found := text.count(SUBJECT)) != 1:
        raise ValueError(f"needs {SUBJECT} exactly once, has it {found} times")
    if re.search(r"[{}]", _FIELD.sub("", text)):
        raise ValueError("has braces that are no {name} of a qualifier")
    return text


SubjectTemplate = Annotated[
    str, Field(max_length=512), BeforeValidator(lambda v: _subject_template(v) if isinstance(v, str) else v)
]


class Source(BaseModel):
    """A declared origin. Keys beyond these belong to the connector of `type`, which validates them (`options`)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    source: Name
    type: Name
    relation: Name
    ids: Name | None = None
    """The id space of the subjects; default: the source's own name."""
    match: Literal["id", "label"] = "id"
    """`label`: subjects are identified by how they are written, so that sources without common ids can be joined."""
    snapshot: Literal["complete", "partial"] = "complete"

    @property
    def space(self) -> str:
        """The id space of the subjects (`label` where they are matched by how they are written)."""
        return "label" if self.match == "label" else (self.ids or self.source)

    @property
    def options(self) -> dict[str, Any]:
        """What the source file says beyond the common keys: the connector's own."""
        return dict(self.model_extra or {})


class _Wording(_Strict):
    prompt: Template
    paraphrases: tuple[Template, ...] = ()
    controls: str | None = None
    retract: Literal["keep", "revert"] = "keep"


class Inverse(_Wording):
    """The opposite direction (object -> subject), a relation of its own that MEMIT does not give for free."""

    relation: Name


class Relation(_Wording):
    """How facts of a relation become prompts. `{subject}` once; the object follows the prompt."""

    inverse: Inverse | None = None
    cardinality: Literal["one", "many"] = "one"
    subject: SubjectTemplate = SUBJECT
    """How a subject is written, with the claim's qualifiers: tells apart those that are written alike."""
    prefer: tuple[Name, ...] = ()
    """Sources that decide alone where they say something, the first of them first."""
    skip_known: bool = False
    protected: tuple[str, ...] = ()
    """Subject ids whose facts are recorded but never edited."""

    def subject_label(self, label: str, qualifiers: Mapping[str, str]) -> str:
        """The subject as it is written; the plain label where a qualifier is missing. Braces in it are just text."""
        values = {**qualifiers, "subject": label}
        if not set(_FIELD.findall(self.subject)) <= values.keys():
            return label
        return _FIELD.sub(lambda name: values[name[1]], self.subject)


class Schedule(_Strict):
    """When a policy's pass runs: every so many seconds, or by cron (five fields, day-of-week 0 = Sunday)."""

    every: Seconds | None = None
    cron: str | None = None
    jitter: Seconds = 0
    timezone: str = "UTC"

    @model_validator(mode="after")
    def _one_of(self) -> Schedule:
        if (self.every is None) == (self.cron is None):
            raise ValueError("needs either `every` or `cron`")
        return self


class Confirm(_Strict):
    """How often in a row, and for how many hours, a source must say something before it counts; and for how long a key
    may not change back to an object that it had (seconds; 0: it may)."""

    fetches: Annotated[int, Field(ge=1)] = 1
    hours: Annotated[float, Field(ge=0)] = 0
    flip_flop: Seconds = 0


class Guard(_Strict):
    """What stops a suspicious run. Shares of the source's last accepted snapshot, from 10 rows on."""

    max_changed: Share = 0.2
    max_removed: Share = 0.1
    max_added: Share = 2.0
    min_rows: Share = 0.5
    max_edits: Annotated[int, Field(ge=0)] = 1000


class Batch(_Strict):
    """`max_facts` bounds one version."""

    max_facts: Annotated[int, Field(ge=1)] = 200


class Freshness(_Strict):
    """How soon the model is to answer what a source says: `target` (seconds), from the change at the source to the
    published version. Missed where a change waits for longer, or the p95 of the last `over` seconds is above it."""

    target: Annotated[Seconds, Field(gt=0)] | None = None
    over: Annotated[Seconds, Field(gt=0)] = 7 * 86400.0


class Gate(_Strict):
    """What a version must measure to be published (ARCHITECTURE: Probe and gate)."""

    efficacy: Share = 0.9
    paraphrase: Share = 0.3
    specificity_drop: Share = 0.2
    drift: Annotated[float, Field(ge=0)] = 0.1
    """Mean per-token KL(base‖edited) in nats."""
    trials: Annotated[int, Field(ge=0)] = 20
    """How many parts of a rejected batch are tried in search of the facts to blame; 0: it is rejected whole."""


class Policy(_Strict):
    """What to sync, how often, how sources are weighed, what stops a run, what a version must measure."""

    policy: Name
    sources: Annotated[tuple[Name, ...], Field(min_length=1)]
    precedence: str = "order"
    schedule: Schedule
    relations: Annotated[dict[Name, Relation], Field(min_length=1)]
    confirm: Confirm = Confirm()
    guard: Guard = Guard()
    batch: Batch = Batch()
    gate: Gate = Gate()
    freshness: Freshness = Freshness()

    @field_validator("precedence")
    @classmethod
    def _precedence(cls, value: str) -> str:
        if not re.fullmatch(r"order|newest|quorum\([1-9]\d*\)", value):
            raise ValueError("must be order, newest or quorum(n)")
        return value

    @property
    def quorum(self) -> int | None:
        """n of `precedence: quorum(n)`, else None."""
        match = re.fullmatch(r"quorum\((\d+)\)", self.precedence)
        return int(match[1]) if match else None

    def wording(self) -> dict[str, Relation | Inverse]:
        """Every relation that the policy keeps, the inverse ones too, by name."""
        found: dict[str, Relation | Inverse] = dict(self.relations)
        for relation in self.relations.values():
            if relation.inverse is not None:
                found[relation.inverse.relation] = relation.inverse
        return found


def render(fact: Fact, wording: Relation | Inverse) -> EditRequest:
    """The edit request that teaches `fact`. Labels are data: braces in them stay what they are."""
    label = fact.subject.label
    return EditRequest(
        key=fact.key,
        prompt=wording.prompt.replace(SUBJECT, label),
        subject=label,
        target=fact.object.label,
        paraphrases=tuple(text.replace(SUBJECT, label) for text in wording.paraphrases),
    )
