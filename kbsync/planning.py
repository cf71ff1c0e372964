"""What the ledger as it is now asks of a model's HEAD: reads what `plan.make_plan` decides on.

with ledger.read() as db:
    plan = plan_now(db, policy, model, line.terms)
"""

from __future__ import annotations

from kbsync.catalog import Catalog
from kbsync.config import Workspace
from kbsync.errors import KbsyncError
from kbsync.gate import Terms
from kbsync.ledger.reader import Reader
from kbsync.plan import Plan, make_plan
from kbsync.policy import SUBJECT, Inverse, Policy

__all__ = ["plan_now", "terms_now"]


def plan_now(db: Reader, policy: Policy, model: str | None, terms: Terms | None = None) -> Plan:
    """The plan of the policy's relations. Those that it was the last to decide and no longer has are among them: once
    their facts have left the ledger, they are to leave the weights. `model` None: of a base that was never edited.
    `terms`: those in force (`Line.terms`): with others than those by which the gate held a fact, it is tried again."""
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
        outdated=db.outdated_holds(model, {terms.edit(policy.policy), terms.rebase}) if model and terms else (),
        model=model or "",
        head=head,
    )


def terms_now(workspace: Workspace, catalog: Catalog, model: str) -> Terms | None:
    """The terms by which the next pass judges versions of the model of that name, which need not be on this machine.
    None where its preset cannot be read: then no pass can be made either."""
    try:
        preset = workspace.preset(model)
    except KbsyncError:
        return None
    return Terms(preset.digest, workspace.settings.strategy.model_dump(mode="json"), catalog.gates)
