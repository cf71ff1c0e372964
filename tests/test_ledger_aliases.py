"""What aliases name, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbsync.errors import LedgerError, UsageError
from kbsync.ledger import Ledger
from kbsync.versions.manifest import ActiveDelta
from tests.ledgers import MODEL, NOON, Clock, applied, opened, register, version

pytestmark = pytest.mark.usefixtures("database")

VIEW = "SELECT DISTINCT version, state FROM version_contents"


def published(ledger: Ledger, versions: int) -> None:
    """MODEL with so many versions, each on the one before, HEAD on the newest."""
    register(ledger)
    for number in range(1, versions + 1):
        delta = f"{number:064x}"
        with ledger.write() as db:
            held = applied("Vega", f"O{number}", delta, 0)
            db.publish(version(number, number - 1, held, active=[ActiveDelta(delta=delta)]))


def test_live_follows_head_until_somebody_pins_it(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        published(ledger, 2)
        with ledger.write() as db:
            assert (db.aliases(MODEL), db.pinned(MODEL)) == ({"live": 2}, {})
            db.move_head(MODEL, 1, user="me", reason="back")
            assert db.aliases(MODEL) == {"live": 1}
            db.note_promotion(MODEL, "live", "promote", 2, user="ada", reason="measured")
            db.note_promotion(MODEL, "canary", "promote", 1, user="ada", reason="")
        with ledger.write() as db:
            db.move_head(MODEL, 0, user="me", reason="back")
            assert db.aliases(MODEL) == db.pinned(MODEL) == {"live": 2, "canary": 1}
            db.note_promotion(MODEL, "live", "end", None, user="ada", reason="")
            assert (db.aliases(MODEL), db.pinned(MODEL)) == ({"live": 0, "canary": 1}, {"canary": 1})


def test_a_version_is_named_by_number_alias_or_head(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        published(ledger, 3)
        with ledger.write() as db:
            db.note_promotion(MODEL, "live", "promote", 1, user="ada", reason="")
            db.note_promotion(MODEL, "canary", "promote", 2, user="ada", reason="")
            named = {name: db.number_of(MODEL, name) for name in (0, "2", "live", "canary", "HEAD")}
            assert named == {0: 0, "2": 2, "live": 1, "canary": 2, "HEAD": 3}
            for unknown in (7, "7", "head", "", "-1"):
                with pytest.raises(UsageError):
                    db.number_of(MODEL, unknown)


def test_who_moved_an_alias_is_kept_and_audited(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as ledger:
        published(ledger, 1)
        clock.turn(days=1)
        with ledger.write() as db:
            db.note_promotion(MODEL, "canary", "promote", 1, user="ada", reason="try it")
        with ledger.read() as db:
            [row] = db.promotions(MODEL)
            assert (row.alias, row.kind, row.version, row.user, row.reason) == ("canary", "promote", 1, "ada", "try it")
            assert (row.at > NOON, db.promotions(MODEL, "live")) == (True, [])
            newest = max(db.audit_log(), key=lambda entry: entry.id)
            assert (newest.action, newest.user, newest.detail["alias"]) == ("promote", "ada", "canary")


def test_an_alias_names_only_versions_that_there_are(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        published(ledger, 1)
        with pytest.raises(LedgerError), ledger.write() as db:
            db.note_promotion(MODEL, "live", "promote", 5, user="ada", reason="")


def test_the_view_marks_what_is_served_not_what_is_edited(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        published(ledger, 2)
        with ledger.write() as db:
            db.note_promotion(MODEL, "live", "promote", 1, user="ada", reason="")
            assert set(map(tuple, db._connection.exec_driver_sql(VIEW))) == {(1, "live"), (2, "not live")}
            db.note_promotion(MODEL, "live", "end", None, user="ada", reason="")
            assert set(map(tuple, db._connection.exec_driver_sql(VIEW))) == {(1, "not live"), (2, "live")}
