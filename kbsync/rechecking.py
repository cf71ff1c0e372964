"""Asks facts of HEAD again when they are due, records what came of it, and says what has faded.

    done = recheck(line, settings.recheck, policies, run_ask)

A fact that is not answered any more has faded: the next pass of its policy edits it once more (plan kind `faded`). One
that fades again after as many edits as `recheck.edits` allows is held with the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from kbsync.editor.job import AskJob, AskResult
from kbsync.errors import Cancelled
from kbsync.facts import FactKey, Hold
from kbsync.ledger.writer import Writer
from kbsync.line import Line
from kbsync.planning import plan_now
from kbsync.policy import Policy
from kbsync.recheck import FactCheck, Recheck, Standing

__all__ = ["Ask", "recheck"]

Ask = Callable[..., AskResult]
"""`child.run_ask`, or what stands in for it."""


def recheck(
    line: Line,
    settings: Recheck,
    policies: Collection[Policy],
    ask: Ask,
    *,
    everything: bool = False,
    dry: bool = False,
) -> dict[str, Any]:
    """Ask the facts that are due; `everything`: all that HEAD holds, due or not. `dry`: only say which. `policies`: all
    there are, whose next passes edit once more what has faded.

    Raises Cancelled where HEAD moved meanwhile or the question was cancelled; StoreError where HEAD's weights do not
    come out as recorded; EditError as the child does. Then nothing is recorded.
    """
    with line.ledger.read() as db:
        head = db.head(line.model)
        standings = db.standings(line.model, head)
        due = standings if everything else settings.due(standings, line.ledger.now())
    done: dict[str, Any] = {"version": head, "facts": len(standings), "due": [_told(one) for one in due]}
    if dry:
        return done
    result = _ask(line, ask, head, due) if due else AskResult(answered=(), failed=())
    with line.ledger.write() as db:
        if (now := db.head(line.model)) != head:
            raise Cancelled(f"HEAD moved from version {head} to {now} meanwhile", hint="kbsync recheck")
        answered = set(result.answered)
        checks = [
            settings.checked(one, answered=one.fact.request.digest in answered, version=head, now=db.now) for one in due
        ]
        db.note_checks(line.model, checks)
        held = _give_up(db, line.model, settings, due, checks, result)
        faded = _tell(db, line, head, policies)
    evidence = {failed.digest: failed.evidence for failed in result.failed}
    missed = [one for one in due if one.fact.request.digest in evidence]
    told = [_told(one) | {"missed": one.missed, "evidence": evidence[one.fact.request.digest]} for one in missed]
    counts = {"asked": len(due), "answered": len(due) - len(told)}
    return done | counts | {"missed": told, "held": [list(key) for key in held], "faded": faded}


def _ask(line: Line, ask: Ask, head: int, due: Sequence[Standing]) -> AskResult:
    with line.ledger.read() as db:
        row = db.version(line.model, head)
    settings = line.workspace.settings
    requests = {one.fact.request.digest: one.fact.request for one in due}
    job = AskJob(
        model_path=str(line.folder.path),
        fingerprint=line.fingerprint,
        device=settings.device,
        dtype=settings.dtype,
        max_gpu_memory=settings.max_gpu_memory,
        preset=line.preset,
        deltas=str(line.workspace.deltas),
        manifest=line.store.manifest(head, row.manifest_sha256),
        requests=tuple(request.to_json() | {"paraphrases": []} for request in requests.values()),
    )
    return ask(job, progress=line.progress, cancelled=line.cancelled)


def _give_up(
    db: Writer, model: str, settings: Recheck, due: Sequence[Standing], checks: Sequence[FactCheck], result: AskResult
) -> list[FactKey]:
    """Hold what edits have not helped; a key that is held already stays so."""
    evidence = {failed.digest: failed.evidence for failed in result.failed}
    standing, held = db.holds(model), []
    for one, check in zip(due, checks, strict=True):
        if check.answered or check.key in standing or not settings.gives_up(one):
            continue
        said = f"not answered, though edited {one.missed - 1} times once more: {evidence[check.request]}"
        db.hold(model, Hold(check.key, one.fact, one.fact.object_id, "probe", said), version=check.version)
        held.append(check.key)
    return held


def _tell(db: Writer, line: Line, head: int, policies: Collection[Policy]) -> int:
    """How many facts have faded and wait for an edit: those that a plan has, and not what is held, protected or of no
    policy any more. People are told when there are any, and when there are none."""
    model = line.model
    faded = db.faded(model, head)
    relations = {key.relation for key, fact in db.applied(model, head).items() if fact.request.digest in faded}
    concerned = [policy for policy in policies if relations & policy.wording().keys()]
    plans = [plan_now(db, policy, model, line.terms) for policy in concerned]
    waiting = sorted(edit.request.key for plan in plans for edit in plan.edits if edit.kind == "faded")
    if waiting:
        text = f"version {head} no longer answers {len(waiting)} of its facts; the next pass edits them once more"
        detail = {"model": model, "version": head, "facts": len(waiting), "first": [list(key) for key in waiting[:5]]}
        db.notify("faded", f"faded {model}", text, detail=detail)
    else:
        db.recovered(f"faded {model}", f"no fact of {model} waits for being edited once more")
    return len(waiting)


def _told(standing: Standing) -> dict[str, Any]:
    request = standing.fact.request
    return {
        "relation": request.key.relation,
        "subject_id": request.key.subject,
        "prompt": request.prompt,
        "target": request.target,
        "served": standing.served.isoformat(),
        "stage": standing.last.stage if standing.last else 0,
    }
