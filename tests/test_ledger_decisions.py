"""Decisions in the ledger: what waits, rulings, verdicts on held plans, plans that were carried out."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbsync.errors import UsageError
from kbsync.facts import Ruling, Waiting
from kbsync.policy import Policy
from tests.ledgers import MODEL, NOON, RELATION, Clock, decide, facts, key, opened, register, sync

pytestmark = pytest.mark.usefixtures("database")

POLICY = Policy.model_validate(
    {
        "policy": "astronomy",
        "sources": ["feed"],
        "schedule": {"every": "1h"},
        "relations": {RELATION: {"prompt": "{subject} belongs to"}},
        "confirm": {"flip_flop": "7d"},
    }
)


def test_a_wait_lasts_while_it_is_for_the_same_object_and_reason(tmp_path: Path) -> None:
    """Decided again it costs no row; another object is another wait; what waits no more has an end."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        for objects in (["Lyra", "Lyra"], ["Lyra", "Orion"], ["Lyra"]):
            run = sync(ledger)
            clock.turn(hours=1)
            pending = [
                Waiting(key(subject), "confirm", f"feed:{name}", name)
                for subject, name in zip(("Vega", "Deneb"), objects, strict=False)
            ]
            with ledger.write() as db:
                db.set_waiting(run, pending, [RELATION])
        with ledger.read() as db:
            assert [row.waiting.key for row in db.waiting()] == [key("Vega")]
            rows = db.waiting([RELATION], open_only=False)
            assert db.waiting(["another"], open_only=False) == []
    assert [(row.waiting.detail, row.run_id, row.until_run_id) for row in rows] == [
        ("Lyra", 1, None),
        ("Lyra", 1, 2),
        ("Orion", 2, 3),
    ]


def test_keys_that_were_not_decided_go_on_waiting(tmp_path: Path) -> None:
    """Only the waits of the keys given may end."""
    with opened(tmp_path) as ledger:
        run = sync(ledger)
        with ledger.write() as db:
            db.set_waiting(run, [Waiting(key(name), "quorum", None, "") for name in ("Vega", "Deneb")], [RELATION])
        with ledger.write() as db:
            db.set_waiting(run, [], [RELATION], keys={key("Vega")})
            assert [row.waiting.key for row in db.waiting()] == [key("Deneb")]


def test_keys_that_wait_or_were_ruled_on_are_decided_by_every_pass(tmp_path: Path) -> None:
    """Also where the ruling was withdrawn, which a source says nothing of; not those of other relations."""
    with opened(tmp_path) as ledger:
        run = sync(ledger)
        with ledger.write() as db:
            db.set_waiting(run, [Waiting(key("Vega"), "confirm", None, "")], [RELATION])
            db.rule(key("Deneb"), Ruling("feed:Lyra"), user="ada")
            db.unrule(key("Deneb"), user="ada")
            assert db.restless_keys([RELATION]) == {key("Vega"), key("Deneb")}
            assert db.restless_keys(["another"]) == set()


def test_a_ruling_replaces_the_one_before_and_can_be_withdrawn(tmp_path: Path) -> None:
    """Each with its user, reason and time; all of it is in the audit log."""
    first, second = Ruling("feed:Lyra", frozenset({"feed:Orion"}), "seen"), Ruling("feed:Orion")
    with opened(tmp_path) as ledger:
        for ruling in (first, second):
            with ledger.write() as db:
                db.rule(key("Vega"), ruling, user="ada")
        with ledger.write() as db:
            assert db.decision_context(POLICY).rulings == {key("Vega"): second}
            db.unrule(key("Vega"), user="bob", reason="wrong star")
            assert db.decision_context(POLICY).rulings == {}
            with pytest.raises(UsageError, match="there is no ruling"):
                db.unrule(key("Vega"), user="bob")
        with ledger.read() as db:
            rows = db.rulings(open_only=False)
            actions = [(row.action, row.user) for row in db.audit_log()]
    assert [(row.ruling, row.user, row.until is None) for row in rows] == [
        (first, "ada", False),
        (second, "ada", False),
    ]
    assert actions[:3] == [("unrule", "bob"), ("rule", "ada"), ("rule", "ada")]


def test_recent_objects_are_those_that_a_key_had_within_the_window(tmp_path: Path) -> None:
    """Until seven days after they ended; the present object is no earlier one."""
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        decide(ledger, facts(Vega="Lyra", Deneb="Lyra"))
        clock.turn(days=30)
        decide(ledger, facts(Vega="Orion", Deneb="Lyra"))
        for days, found in [(6, {key("Vega"): frozenset({"feed:Lyra"})}), (1, {})]:
            clock.turn(days=days)
            with ledger.write() as db:
                context = db.decision_context(POLICY)
                assert (context.now, context.recent) == (clock.now, found)
                assert db.decision_context(POLICY, {key("Deneb")}).recent == {}
        plain = POLICY.model_copy(update={"confirm": POLICY.confirm.model_copy(update={"flip_flop": 0})})
        clock.now = NOON
        with ledger.write() as db:
            assert db.decision_context(plain).recent == {}


def test_a_verdict_on_a_row_may_be_changed_until_the_run_is_approved(tmp_path: Path) -> None:
    """The last word counts; each is audited."""
    with opened(tmp_path) as ledger:
        run = sync(ledger)
        with ledger.write() as db:
            db.set_verdicts(run, [key("Vega"), key("Deneb")], approved=True, user="ada")
            db.set_verdicts(run, [key("Vega")], approved=False, user="bob", reason="vandalism")
        with ledger.read() as db:
            found = {one.subject: (row.approved, row.user, row.reason) for one, row in db.verdicts(run).items()}
            assert [row.run_id for row in db.audit_log() if row.action == "verdict"] == [run, run]
    assert found == {"feed:Deneb": (True, "ada", ""), "feed:Vega": (False, "bob", "vandalism")}


def test_a_plan_is_kept_once_per_run_and_head(tmp_path: Path) -> None:
    """Carrying the same plan out again after a crash notes it once."""
    with opened(tmp_path) as ledger:
        register(ledger)
        run = sync(ledger)
        with ledger.write() as db:
            for head in (0, 0, 1):
                db.note_plan(run, MODEL, head, "d" * 64, {"adds": []})
        with ledger.read() as db:
            assert [(row.head, row.document) for row in db.plans(run)] == [(1, {"adds": []}), (0, {"adds": []})]
            assert db.plans(run + 1) == []
