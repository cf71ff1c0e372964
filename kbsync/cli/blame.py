"""`kbsync blame`: the whole chain behind a fact, from the row of its source to the column in the weights. No torch
unless `--now` asks the live model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.tree import Tree

from kbsync.cli.common import AsJson, Root, console, counted, emit, opened
from kbsync.cli.read import model_row, one_subject, short

if TYPE_CHECKING:
    from kbsync.catalog import Catalog
    from kbsync.config import Workspace
    from kbsync.facts import EditRequest, FactKey
    from kbsync.ledger import Ledger, Reader
    from kbsync.ledger.lineage import Lineage
    from kbsync.ledger.links import ClaimLink
    from kbsync.plan import Plan
    from kbsync.policy import Policy

__all__ = ["app"]

app = typer.Typer()


@app.command()
def blame(
    subject: Annotated[str, typer.Argument(help="Subject: its id, or any label that it has had.")],
    relation: Annotated[str, typer.Argument(help="Relation.")],
    model: Annotated[str | None, typer.Option("--model", help="Another model of the ledger.", metavar="ID")] = None,
    now: Annotated[bool, typer.Option("--now", help="Also measure the probability on the live weights.")] = False,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Show where a fact comes from and where it went: source row, fetch, run, decision, plan, column, probability."""
    from kbsync.catalog import load_catalog
    from kbsync.facts import FactKey
    from kbsync.ledger.lineage import lineage

    with opened(root) as (workspace, ledger):
        with ledger.read() as db:
            key = FactKey(relation, one_subject(db, subject))
            named = model or (row.id if (row := model_row(workspace, db)) else None)
            catalog = load_catalog(workspace)
            asked = _asked(catalog, db, key)
            plan = partial(_plan, workspace, catalog, db, asked.policy, named)
            chain = lineage(db, key, model=named, kept_out=asked.kept_out, unasked=lambda: _unasked(plan(), key))
            if named and "column" in chain.gaps and key in db.holds(named) and _has_ended(plan(), key):
                column = f"{chain.gaps['column']}; the next pass tries it again"
                chain = replace(chain, gaps={**chain.gaps, "column": column})
        request = chain.column.request if chain.column else asked.request
        measured = _measure(workspace, ledger, request) if now and request else None
    if as_json:
        return emit(chain.to_json() | ({"now": measured} if now else {}))
    console.print(_drawn(chain, measured), soft_wrap=False)
    return None


class _Asked(NamedTuple):
    """The policy that has a key's relation, what it asks the model for the key, and why it never does, if so."""

    policy: Policy | None
    request: EditRequest | None
    kept_out: str


def _asked(catalog: Catalog, db: Reader, key: FactKey) -> _Asked:
    from kbsync.policy import Relation, render

    policies = catalog.policies.values()
    policy = next((policy for policy in policies if key.relation in policy.wording()), None)
    if policy is None:
        return _Asked(None, None, f"no policy has the relation {key.relation}")
    words, row = policy.wording()[key.relation], db.fact_row(key.relation, db.merged(key.subject))
    request = render(row.fact, words) if row else None
    if isinstance(words, Relation) and words.cardinality == "many":
        return _Asked(policy, request, "a relation of cardinality many is recorded, never edited")
    if isinstance(words, Relation) and not set(db.ids_of(key.subject)).isdisjoint(words.protected):
        return _Asked(policy, request, "the policy protects this subject: it is recorded, never edited")
    return _Asked(policy, request, "")


def _plan(workspace: Workspace, catalog: Catalog, db: Reader, policy: Policy | None, model: str | None) -> Plan | None:
    """The plan of a pass that is made now; None where none concerns the key."""
    from kbsync.planning import plan_now, terms_now

    if policy is None or model is None:
        return None
    row = model_row(workspace, db)
    terms = terms_now(workspace, catalog, row.name) if row and row.id == model else None
    return plan_now(db, policy, model, terms)


def _has_ended(plan: Plan | None, key: FactKey) -> bool:
    """Whether the hold on a key no longer keeps the next pass from its fact."""
    return plan is not None and key in plan.ended_holds


def _unasked(plan: Plan | None, key: FactKey) -> str:
    """Why a plan made now would not ask the model for a key; nothing where it would."""
    if plan is None:
        return ""
    if key in plan.known:
        return "the model knows it without an edit"
    return next((f"blocked: {no.reason}" for no in plan.blocked if no.key == key), "")


def _measure(workspace: Workspace, ledger: Ledger, request: EditRequest) -> dict[str, Any]:
    """The log-probability (nats) of the object after the prompt on the live weights: per token, and of the whole."""
    from kbsync.editor.answers import answers, log_probabilities
    from kbsync.serving import Versions

    versions = Versions.open(workspace, ledger)
    base, row = versions.load("live"), versions.row("live")
    [scored] = log_probabilities(base, [(request.prompt, request.target)])
    return {
        "version": row.number if row else 0,
        "probability": scored.probability,
        "log_probability": scored.log_probability,
        "log_probability_per_token": scored.mean_log_probability,
        "answered": scored.greedy,
        "answer": answers(base, [request.prompt])[0].text,
    }


# The tree ----------------------------------------------------------------------------------------------------------


def _drawn(chain: Lineage, now: dict[str, Any] | None) -> Tree:
    """The chain as a tree: one branch per link, what has none says why."""
    fact = chain.fact
    said = f"[bold]{escape(fact.fact.object.label)}[/] [dim]{escape(fact.fact.object.id)}[/]" if fact else "no fact"
    title = f"{escape(chain.subject.label)} [dim]{escape(chain.subject.id)}[/]  {escape(chain.key.relation)}: {said}"
    tree = Tree(title, guide_style="dim")
    for name, lines in _branches(chain, now):
        first, *more = [line for line in lines if line]
        branch = tree.add(f"[cyan]{name:<9}[/] {first}")
        for line in more:
            branch.add(line)
    return tree


def _branches(chain: Lineage, now: dict[str, Any] | None) -> Iterator[tuple[str, list[str]]]:
    fact = chain.fact
    if fact is None:
        yield "fact", [_gap(chain, "fact")]
    else:
        state = "withdrawn: no source says it any more, the policy keeps it" if fact.fact.status != "live" else "live"
        yield "fact", [f"{state}, since {short(fact.since)}"]
        yield "claim", _claim_lines(chain)
        yield "fetch", _fetch_lines(chain)
        yield "run", _run_lines(chain)
        yield "decision", _decision_lines(chain)
    yield "plan", _plan_lines(chain)
    yield "weights", _column_lines(chain)
    yield "model", _measured_lines(chain, now)


def _gap(chain: Lineage, name: str) -> str:
    return f"[yellow]{escape(chain.gaps.get(name, 'none'))}[/]"


def _said(claim: ClaimLink) -> str:
    """A claim in one line: object, source, place, what qualifies it."""
    place = claim.origin if claim.origin == claim.last_origin else f"{claim.origin}, now {claim.last_origin}"
    what = [] if claim.rank == "normal" else [claim.rank]
    what += [f"from {claim.start}"] if claim.start else []
    what += [f"to {claim.end}"] if claim.end else []
    what += [f"{name} {value}" for name, value in claim.qualifiers.items()]
    more = f" ({escape(', '.join(what))})" if what else ""
    return f"[bold]{escape(claim.object.label)}[/] by {escape(claim.source)}, {escape(place)}{more}"


def _claim_lines(chain: Lineage) -> list[str]:
    claim = chain.claim
    if claim is None:
        return [_gap(chain, "claim")]
    gone = f", no longer since {short(claim.until)}" if claim.until else ""
    turned = claim.relation != chain.key.relation
    about = f"{escape(claim.subject.label)} {escape(claim.relation)}: " if turned else ""
    times = "once" if claim.said == 1 else f"{claim.said} times in a row"
    return [about + _said(claim), f"first said {short(claim.first_said)}, {times}{gone}  [dim]claim {claim.id}[/]"]


def _fetch_lines(chain: Lineage) -> list[str]:
    fetch = chain.fetch
    if fetch is None:
        return [_gap(chain, "fetch")]
    source = fetch.provenance
    validators = [f"ETag {source.etag}"] if source.etag else []
    validators += [f"as of {short(source.as_of)}"] if source.as_of else []
    validators += [f"verified by {source.verified}"] if source.verified else []
    return [
        escape(source.location),
        f"{short(source.fetched_at)}, status {source.status}, {counted(fetch.rows, 'row')}  [dim]fetch {fetch.id}[/]",
        f"sha256 {source.body_sha256}",
        escape(", ".join(validators)),
    ]


def _run_lines(chain: Lineage) -> list[str]:
    run = chain.run
    if run is None:
        return [_gap(chain, "run")]
    policy = f" of {run.policy}" if run.policy else ""
    ended = f", {run.status}" + (f": {run.message}" if run.message else "")
    return [f"{run.id}{policy}, {run.trigger} by {escape(run.user)}, {short(run.started_at)}{escape(ended)}"]


def _decision_lines(chain: Lineage) -> list[str]:
    lines = [escape(chain.rule) if chain.rule else _gap(chain, "rule")]
    lines += [f"weighed: {_said(claim)}" for claim in chain.weighed]
    if chain.ruling:
        lines.append(f"ruled by {escape(chain.ruling['by'])}: {escape(chain.ruling['reason'])}")
    lines += [f"[yellow]{escape(text)}[/]" for text in chain.conflicts]
    lines += [f"[yellow]waits, {escape(chain.waiting)}[/]"] if chain.waiting else []
    return [*lines, f"[yellow]run {chain.approval} waits for approval and changes it[/]" if chain.approval else ""]


def _plan_lines(chain: Lineage) -> list[str]:
    plan = chain.plan
    if plan is None:
        return [_gap(chain, "plan")]
    return [f"{plan.kind}, on version {plan.head}, run {plan.run_id}", f"digest {plan.digest}"]


def _column_lines(chain: Lineage) -> list[str]:
    column = chain.column
    if column is None:
        return [_gap(chain, "column")]
    held = "" if chain.current else f" hold {escape(column.request.target)}:"
    where = "live in" if column.live == column.head else f"live is version {column.live}, this is of HEAD,"
    made = f"{held} column {column.column} of version {column.version} ({column.kind}), {where} version {column.head}"
    since = f", as since version {column.first}" if column.first != column.version else ""
    lines = [f"{made.strip()}{since}", f"made {short(column.at)} by {escape(column.by)}", f"delta {column.delta}"]
    lines += [f"shared with {escape(key.relation)} of {escape(key.subject)}" for key in column.shared]
    return [_gap(chain, "column"), *lines] if not chain.current else lines


def _measured_lines(chain: Lineage, now: dict[str, Any] | None) -> list[str]:
    found, lines = chain.measured, []
    if found is None:
        lines.append(_gap(chain, "measured"))
    else:
        answer = "" if found.answered else f", it says {escape(found.answer)!r}"
        lines.append(f"P {found.probability:.4f} when version {found.version} was probed{answer}")
    if now is not None:
        each = f"{now['log_probability']:.3f} nats, {now['log_probability_per_token']:.3f} per token"
        answer = "" if now["answered"] else f", it says {escape(now['answer'])!r}"
        lines.insert(0, f"P {now['probability']:.4f} now, on version {now['version']} ({each}){answer}")
    return lines
