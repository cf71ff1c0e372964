"""What people are told of a pass, and of freshness: which notices follow from what happened. All write in the caller's
transaction, so that what is told has happened, and what has happened is told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from kbsync.catalog import Catalog
from kbsync.freshness import FreshnessRow, freshness_rows
from kbsync.ledger import Ledger
from kbsync.ledger.writer import Writer
from kbsync.policy import Policy
from kbsync.references import hidden

__all__ = ["tell_conflicts", "tell_end", "tell_freshness", "tell_refused"]

LISTED = 5
"""Conflicts that a notice names one by one."""
COUNTED = ("done", "failed", "held", "rejected", "postponed")
"""Ends of a pass that say something about its policy; a cancelled one is begun again."""


def tell_end(db: Writer, policy: str, run_id: int, status: str, message: str, failures: int) -> None:
    """Of the end of a pass: held, rejected by the gate, failed `failures` times in a row, and that this is over."""
    text = hidden(message)
    about: dict[str, Any] = {"policy": policy, "run_id": run_id}
    if status == "held":
        db.notify("held", f"held {policy}", f"run {run_id} of policy {policy} waits for approval: {text}", **about)
    if status == "rejected":
        db.notify("rejected", f"rejected {policy}", f"run {run_id} was rejected: {text}", **about)
    if status == "failed" and _failed_in_a_row(db, policy, failures):
        db.notify(
            "failed", f"failed {policy}", f"{failures} passes of {policy} failed in a row, the last: {text}", **about
        )
    if status in ("done", "postponed", "held", "rejected"):
        db.recovered(f"failed {policy}", f"policy {policy} does not fail any more", **about)
    if status in ("done", "postponed", "rejected"):
        db.recovered(f"held {policy}", f"no run of policy {policy} waits for approval", **about)
    if status == "done":
        db.recovered(f"rejected {policy}", f"a pass of policy {policy} ended without a rejection", **about)


def tell_refused(db: Writer, policy: str, run_id: int) -> None:
    """That a person has rejected a held run."""
    db.recovered(f"held {policy}", f"run {run_id} of policy {policy} was rejected", policy=policy, run_id=run_id)


def tell_conflicts(db: Writer, policy: Policy, run_id: int) -> None:
    """Of the conflicts that a pass has found, all in one; and that none is left."""
    name, relations = policy.policy, tuple(policy.wording())
    if opened := db.conflicts_opened(run_id, relations):
        first = [
            {"relation": relation, "subject_id": subject, "reason": reason}
            for relation, subject, reason in opened[:LISTED]
        ]
        subjects = ", ".join(f"{one['relation']} of {one['subject_id']}" for one in first)
        more = f" and {len(opened) - LISTED} more" if len(opened) > LISTED else ""
        text = f"policy {name}: {len(opened)} new conflict{'s' * (len(opened) > 1)}: {subjects}{more}"
        detail = {"conflicts": len(opened), "first": first}
        db.notify("conflict", f"conflict {name}", text, detail=detail, policy=name, run_id=run_id, again=True)
    elif not db.in_conflict(relations):
        db.recovered(f"conflict {name}", f"policy {name} has no conflict any more", policy=name, run_id=run_id)


def tell_freshness(ledger: Ledger, catalog: Catalog) -> None:
    """Of targets of freshness that are missed, once each, and how that ended: they are kept again, or gone. What was
    told of a policy that is gone is over, too: nothing else would ever end it."""
    now, policies = datetime.now(UTC), catalog.policies
    with ledger.read() as db:
        troubles = db.troubles()
        aimed = any(policy.freshness.target for policy in policies.values())
        rows = freshness_rows(db, catalog, now) if aimed else []
    # What a source that is gone has left behind may still arrive, but nobody asks it any more.
    aims = {_thread(row): row for row in rows if row.target and row.source in policies[row.policy].sources}
    missed = {thread: reasons for thread, row in aims.items() if (reasons := row.missed(now))}
    gone = [notice for notice in troubles if notice.policy is not None and notice.policy not in policies]
    stale = {notice.thread: notice for notice in troubles if notice.kind == "stale" and notice not in gone}
    if missed.keys() == stale.keys() and not gone:
        return
    with ledger.write() as db:
        for notice in gone:
            db.recovered(notice.thread, f"policy {notice.policy} is gone", policy=notice.policy)
        for thread in sorted(stale.keys() - missed.keys()):
            policy = policies[str(stale[thread].policy)]
            db.recovered(thread, _ended(thread, policy, thread in aims), policy=policy.policy)
        for thread in sorted(missed.keys() - stale.keys()):
            row, reasons = aims[thread], missed[thread]
            text = f"{row.relation} of source {row.source} is stale: {'; '.join(reasons)}"
            db.notify("stale", thread, text, detail=_detail(row, now), policy=row.policy)


def _ended(thread: str, policy: Policy, kept: bool) -> str:
    """How a target that was missed came to an end."""
    _, name, source, relation = thread.split()
    if kept:
        return f"{source} {relation} is as fresh as policy {name} wants it"
    if policy.freshness.target is None:
        return f"policy {name} has no target of freshness any more, {source} {relation} may be stale still"
    return f"policy {name} does not ask source {source} for {relation} any more"


def _thread(row: FreshnessRow) -> str:
    return f"stale {row.policy} {row.source} {row.relation}"


def _detail(row: FreshnessRow, now: datetime) -> dict[str, object]:
    found = row.to_json(now)
    wanted = ("source", "relation", "target", "p50", "p95", "waiting", "oldest", "oldest_why", "lag")
    return {name: found[name] for name in wanted}


def _failed_in_a_row(db: Writer, policy: str, failures: int) -> bool:
    ends = [run.status for run in db.runs(20 * failures, policy=policy) if run.status in COUNTED][:failures]
    return ends == ["failed"] * failures
