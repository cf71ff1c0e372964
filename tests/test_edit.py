"""What is asked of the child process and what becomes of its answer, as pure decisions."""

from __future__ import annotations

from typing import Any

from kbsync.edit import Edit, anew, held_facts, new_facts, staying_facts, superseded
from kbsync.editor.job import EditResult, FailedFact
from kbsync.facts import Applied, EditRequest, FactKey, Hold
from kbsync.plan import PlannedEdit, carried
from kbsync.versions.manifest import ActiveDelta

ANN, BOB, EVE = (FactKey("place", name) for name in ("s:ann", "s:bob", "s:eve"))
OLD, NEW = "0" * 64, "1" * 64


def applied(key: FactKey, obj: str, column: int, *, subject: str = "", delta: str = OLD) -> Applied:
    """A live fact; `subject`: as it is written, the key's own unless given."""
    name = subject or key.subject
    return Applied(EditRequest(key, f"{name} is in", name, obj), f"o:{obj}", delta, column)


def planned(old: Applied | None, key: FactKey, obj: str, *, subject: str = "") -> PlannedEdit:
    """The change of a fact to another object."""
    request = applied(key, obj, 0, subject=subject).request
    return PlannedEdit(request, "changed" if old else "added", old, f"o:{obj}", "feed", "line 2")


def result(*columns: str, failed: dict[str, str] | None = None, **more: Any) -> EditResult:
    """What the child made."""
    values: dict[str, Any] = {
        "active": (),
        "modules": (),
        "dtype": "float32",
        "weights_sha256": "a" * 64,
        "base_weights_sha256": "b" * 64,
        "delta": NEW,
        "columns": columns,
        "failed": tuple(FailedFact(digest=digest, evidence=said) for digest, said in (failed or {}).items()),
        "known": {},
        "probe": {},
        "numerics": {},
        "seconds": {},
        "libraries": {},
    }
    return EditResult(**(values | more))


def rebased(*live: Applied) -> Edit:
    """A rebase of these facts."""
    keep = {fact.request.key: fact for fact in live}
    return Edit("rebase", 1, keep, edits=carried(keep, {}))


def test_a_fact_that_fails_is_held_at_what_the_weights_hold_instead() -> None:
    old = applied(ANN, "Rome", 0)
    new = planned(old, ANN, "Oslo")
    edit = Edit("edit", 1, {}, edits=[new])
    failed = result(failed={new.request.digest: "no"})
    assert held_facts(edit, failed, {ANN: old}, {}) == (Hold(ANN, old, "o:Oslo", "probe", "no"),)
    assert held_facts(edit, failed, {}, {}) == (Hold(ANN, None, "o:Oslo", "probe", "no"),)


def test_a_rollback_holds_out_the_same_object_after_the_fact_that_it_froze_has_failed() -> None:
    """Else the object that a person took out would come back as a third one."""
    live = applied(ANN, "Rome", 0)
    before = Hold(ANN, live, "o:Oslo", "rollback", "rolled back")
    failed = result(failed={live.request.digest: "no"})
    [held] = held_facts(rebased(live), failed, {}, {ANN: before})
    assert held == Hold(ANN, None, "o:Oslo", "rollback", "rolled back; no")


def test_a_hold_that_the_edit_itself_places_stands_before_an_older_one_and_a_released_one_not_at_all() -> None:
    live = applied(ANN, "Rome", 0)
    older, placed = Hold(ANN, live, "o:Oslo", "probe", "a"), Hold(ANN, live, "o:Bonn", "revert", "b")
    failed = result(failed={live.request.digest: "no"})
    edit = rebased(live)
    [held] = held_facts(Edit("rebase", 1, {}, edits=edit.edits, holds=[placed]), failed, {}, {ANN: older})
    assert (held.held_out, held.reason) == ("o:Bonn", "revert")
    [held] = held_facts(Edit("rebase", 1, {}, edits=edit.edits, releases=[ANN]), failed, {}, {ANN: older})
    assert (held.held_out, held.reason) == ("o:Rome", "probe")


def test_one_request_for_two_subjects_supersedes_the_columns_of_both() -> None:
    first, second = applied(ANN, "Rome", 0), applied(BOB, "Oslo", 1)
    edits = [planned(first, ANN, "Bonn", subject="Zoe"), planned(second, BOB, "Bonn", subject="Zoe")]
    [(digest, columns)] = superseded(Edit("edit", 1, {}, edits=edits), {ANN: first, BOB: second}).items()
    assert (digest, columns) == (edits[0].request.digest, ((OLD, 0), (OLD, 1)))


def test_a_column_that_a_fact_which_stays_shares_is_not_superseded() -> None:
    first, second = applied(ANN, "Rome", 0, subject="Zoe"), applied(BOB, "Rome", 0, subject="Zoe")
    edit = Edit("edit", 1, {BOB: second}, edits=[planned(first, ANN, "Bonn")])
    assert superseded(edit, {ANN: first, BOB: second}) == {}


def test_one_request_for_two_subjects_that_fails_in_a_rebase_puts_both_facts_back() -> None:
    first, second = applied(ANN, "Rome", 0), applied(BOB, "Oslo", 1)
    edits = [planned(first, ANN, "Bonn", subject="Zoe"), planned(second, BOB, "Bonn", subject="Zoe")]
    edit, digest = Edit("rebase", 1, {}, edits=edits), edits[0].request.digest
    assert anew(edit)["instead"] == {digest: (first.request.to_json(), second.request.to_json())}
    made = result(first.request.digest, second.request.digest, failed={digest: "no"})
    found = {fact.request.key: (fact.object_id, fact.column) for _, fact in new_facts(edit, made)}
    assert found == {ANN: ("o:Rome", 0), BOB: ("o:Oslo", 1)}


def test_a_fact_stays_while_its_column_is_active_and_not_left_out() -> None:
    facts = {ANN: applied(ANN, "Rome", 0), BOB: applied(BOB, "Oslo", 1), EVE: applied(EVE, "Bonn", 0, delta=NEW)}
    assert set(staying_facts(facts, [ActiveDelta(delta=OLD, excluded=(1,))])) == {ANN}
    assert staying_facts(facts, []) == {}


def test_a_request_that_is_inserted_once_more_supersedes_its_own_column() -> None:
    """On the live version; a rebase has one column of it in any case."""
    old = applied(ANN, "Rome", 3)
    again = PlannedEdit(old.request, "faded", old, old.object_id, "", "")
    edit = Edit("edit", 1, {}, edits=[again])
    assert superseded(edit, {ANN: old}) == {old.request.digest: ((OLD, 3),)}
    [(_, new)] = new_facts(edit, result(old.request.digest))
    assert (new.request, new.delta, new.column) == (old.request, NEW, 0)
    assert anew(edit)["instead"] == {old.request.digest: (old.request.to_json(),)}


def test_one_that_fails_to_be_inserted_once_more_is_held_at_itself() -> None:
    old = applied(ANN, "Rome", 3)
    edit = Edit("edit", 1, {}, edits=[PlannedEdit(old.request, "faded", old, old.object_id, "", "")])
    failed = result(failed={old.request.digest: "no"})
    assert held_facts(edit, failed, {ANN: old}, {}) == (Hold(ANN, old, "o:Rome", "probe", "no"),)
