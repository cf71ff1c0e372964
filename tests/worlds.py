"""Small random worlds for the tests of decisions: few subjects, objects and labels, so that they collide all the time.

Two subjects may be written alike, one object may be written in two ways, two objects alike, and the inverse relation
may share its template with the direct one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from kbsync.facts import Claim, EditRequest, Entity, FactKey, Ruling
from kbsync.policy import Policy
from kbsync.resolve import Context

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SOURCES = ("alpha", "beta", "gamma")
SUBJECTS = ("s:1", "s:2", "s:3")
OBJECTS = ("o:1", "o:2", "o:3")
LABELS = ("Ann", "Bob")
TEMPLATES = ("{subject} is in", "Where is {subject}? In")


def policy_of(**changes: Any) -> Policy:
    """The plainest policy of one relation `place` and one source `alpha`, with changes."""
    relation = {"prompt": TEMPLATES[0]} | changes.pop("relation", {})
    plain: dict[str, Any] = {
        "policy": "p",
        "sources": ["alpha"],
        "schedule": {"every": "1h"},
        "relations": {"place": relation},
    }
    return Policy.model_validate(plain | changes)


def claim(subject: str, obj: str, *, source: str = "alpha", origin: str = "line 1", **more: Any) -> Claim:
    """A claim of relation `place`; `subject` and `obj` are local id and label in one."""
    return Claim(source, "place", Entity(f"s:{subject}", subject), Entity(f"o:{obj}", obj), origin, **more)


def policies() -> st.SearchStrategy[Policy]:
    """Policies over three sources: each precedence and preference, confirmation, retraction, inverse, protection and
    template of subjects."""
    retract = st.sampled_from(["keep", "revert"])
    template = st.sampled_from(TEMPLATES)
    inverse = st.fixed_dictionaries({"relation": st.just("holder"), "prompt": template, "retract": retract})
    relation = st.fixed_dictionaries(
        {
            "prompt": template,
            "retract": retract,
            "inverse": st.none() | inverse,
            "skip_known": st.booleans(),
            "protected": st.sampled_from([(), (SUBJECTS[0],)]),
            "subject": st.sampled_from(["{subject}", "{subject} ({state})"]),
            "prefer": st.sampled_from([(), (), ("beta",), ("gamma", "alpha")]),
        }
    )
    document = st.fixed_dictionaries(
        {
            "policy": st.just("p"),
            "sources": st.permutations(SOURCES).map(tuple),
            "precedence": st.sampled_from(["order", "newest", "quorum(2)"]),
            "schedule": st.just({"every": "1h"}),
            "relations": st.fixed_dictionaries({"place": relation}),
            "confirm": st.fixed_dictionaries(
                {"fetches": st.sampled_from([1, 1, 2]), "hours": st.sampled_from([0, 0, 5]), "flip_flop": st.just("7d")}
            ),
        }
    )
    return document.map(Policy.model_validate)


def entities(ids: Iterable[str]) -> st.SearchStrategy[Entity]:
    """Things that may be written alike."""
    return st.builds(Entity, st.sampled_from(list(ids)), st.sampled_from(LABELS))


def claims(*, most_seen: int = 3) -> st.SearchStrategy[Claim]:
    """Claims of any source, mostly plain, some with ranks and dates."""
    date = st.sampled_from([None, None, None, "2010", "2011-03-04", "2011-03-04T00:00:00Z"])
    return st.builds(
        Claim,
        source=st.sampled_from(SOURCES),
        relation=st.just("place"),
        subject=entities(SUBJECTS),
        object=entities(OBJECTS),
        origin=st.integers(1, 99).map(lambda line: f"line {line}"),
        rank=st.sampled_from(["normal", "normal", "normal", "preferred", "deprecated"]),
        start=date,
        end=date,
        seen=st.integers(1, most_seen),
        qualifiers=st.sampled_from([(), (), (("state", "Ohio"),), (("state", "Utah"),)]),
        since=st.sampled_from([NOON - timedelta(hours=9), NOON - timedelta(hours=5), NOON]),
    )


def contexts() -> st.SearchStrategy[Context]:
    """Rulings on some keys, and what some keys were before."""
    keys = st.sampled_from([FactKey("place", subject) for subject in SUBJECTS] + [FactKey("holder", OBJECTS[0])])
    things = st.sampled_from([*OBJECTS, *SUBJECTS])
    rulings = st.builds(Ruling, things, st.frozensets(things), st.sampled_from(["", "seen"]))
    return st.builds(
        Context,
        now=st.just(NOON),
        rulings=st.dictionaries(keys, rulings, max_size=2),
        recent=st.dictionaries(keys, st.frozensets(things), max_size=2),
    )


def contradictions(requests: Iterable[EditRequest]) -> Mapping[str, set[str]]:
    """Prompts with more than one target: what MEMIT's Eqn 5 forbids of text."""
    targets: dict[str, set[str]] = {}
    for request in requests:
        targets.setdefault(request.prompt, set()).add(request.target)
    return {prompt: found for prompt, found in targets.items() if len(found) > 1}
