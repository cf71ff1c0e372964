"""What the ledger as it is now asks of a model's HEAD: reads what `plan.make_plan` decides on.

with ledger.read() as db:
    plan = plan_now(db, policy, model)
"""

from __future__ import annotations

from kbsync.ledger.reader import Reader
from kbsync.plan import Plan, make_plan
from kbsync.policy import SUBJECT, Inverse, Policy

__all__ = ["plan_now"]


def plan_now(db: Reader, policy: Policy, model: str | None, settings: str | None = None) -> Plan:
    """The plan of the policy's relations. Those that it was the last to decide and no longer has are among them: once
    their facts have left the ledger, they are to leave the weights. `model` None: of a base that was never edited.
    `settings`: digest of those in force (`Line.settings_digest`): with others than those with which the gate held a
    fact, it is tried again."""
    lost = {name: Inverse(relation=name, prompt=SUBJECT) for name in db.lost_relations(policy.policy)}
    head, wording = db.head(model) if model else 0, lost | policy.wording()
    return make_plan(
        db.facts(tuple(wording)),
        db.applied(model, head) if model else {},
        db.holds(model) if model else {},
        wording,
        known=db.known_to(model, head) if model else (),
        moved=db.redirects(),
        faded=db.faded(model, head) if model else (),
        outdated=db.outdated_holds(model, settings) if model and settings else (),
        model=model or "",
        head=head,
    )
