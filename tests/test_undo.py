"""What an undo means, as pure decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kbsync.facts import Applied, EditRequest, Entity, Fact, FactKey
from kbsync.undo import holds_after, without_version

KEYS = [FactKey("capital", f"geo:{name}") for name in "abcd"]


def applied(key: FactKey, object_id: str, delta: str, column: int) -> Applied:
    """A fact in a column."""
    return Applied(EditRequest(key, f"{key.subject} is", key.subject, object_id), object_id, delta, column)


def fact(key: FactKey, object_id: str) -> Fact:
    """What the ledger wants for a key."""
    return Fact(key.relation, Entity(key.subject, key.subject), Entity(object_id, object_id), "feed", "line 2")


states = st.dictionaries(
    st.sampled_from(KEYS), st.tuples(st.sampled_from("xyz"), st.sampled_from(["d1", "d2", "d3"])), max_size=4
).map(lambda found: {key: applied(key, obj, delta, KEYS.index(key)) for key, (obj, delta) in found.items()})
wishes = st.dictionaries(st.sampled_from(KEYS), st.sampled_from("xyz"), max_size=4).map(
    lambda found: {key: fact(key, obj) for key, obj in found.items()}
)


def test_reverting_a_version_in_the_middle_keeps_what_later_ones_did() -> None:
    a, b, c, _ = KEYS
    parent = {a: applied(a, "x", "d1", 0)}
    version = {a: applied(a, "y", "d2", 0), b: applied(b, "x", "d2", 1), c: applied(c, "x", "d2", 2)}
    head = version | {b: applied(b, "z", "d3", 0)}
    assert without_version(head, version, parent) == {a: parent[a], b: head[b]}


@given(states, states)
def test_reverting_the_live_version_gives_its_parent_back(parent: dict, version: dict) -> None:  # type: ignore[type-arg]
    assert {k: (v.delta, v.column) for k, v in without_version(version, version, parent).items()} == {
        k: (v.delta, v.column) for k, v in parent.items()
    }


@given(states, states, states)
def test_reverting_twice_changes_nothing_more(head: dict, version: dict, parent: dict) -> None:  # type: ignore[type-arg]
    once = without_version(head, version, parent)
    if all(_at(once, key) != _at(version, key) or _at(version, key) == _at(parent, key) for key in KEYS):
        assert without_version(once, version, parent) == once


@given(states, states, wishes)
def test_after_an_undo_every_key_that_moved_is_as_wanted_or_held(now: dict, then: dict, desired: dict) -> None:  # type: ignore[type-arg]
    holds, released = holds_after(now, then, desired, reason="rollback", evidence="test")
    held = {hold.key: hold for hold in holds}
    assert held.keys().isdisjoint(released)
    for key in KEYS:
        moved = _says(now, key) != _says(then, key)  # a rebase moves columns, and no fact
        wanted = desired[key].object.id if key in desired else None
        has = then[key].object_id if key in then else None
        assert (key in held) == (moved and wanted != has)
        assert (key in released) == (moved and wanted == has)
        if key in held:
            assert held[key].held_out == wanted
            assert held[key].frozen == then.get(key)


def _at(state: dict, key: FactKey) -> tuple[str, int] | None:  # type: ignore[type-arg]
    return (state[key].delta, state[key].column) if key in state else None


def _says(state: dict, key: FactKey) -> str | None:  # type: ignore[type-arg]
    return state[key].object_id if key in state else None
