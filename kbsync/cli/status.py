"""`kbsync status`: HEAD, what is live, how much of the model its edits are, what waits, how sources do. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, counted, emit, opened, say, share, table
from kbsync.cli.freshness import freshness_json, say_freshness
from kbsync.cli.read import iso, model_row

if TYPE_CHECKING:
    from kbsync.catalog import Catalog
    from kbsync.config import Workspace
    from kbsync.disk import Disk
    from kbsync.ledger import Ledger, ModelRow, Reader

__all__ = ["app", "lasting"]

app = typer.Typer()


@app.command()
def status(root: Root = Path(), as_json: AsJson = False) -> None:
    """Show HEAD and what is live, what waits, and how sources and policies are doing."""
    with opened(root) as (workspace, ledger):
        found = _status(workspace, ledger)
    if as_json:
        return emit(found)
    applied, unusable = counted(found["facts_applied"], "fact"), counted(found["quarantined"], "quarantined row")
    say(f"[bold]{escape(found['model'])}[/]  version {found['version']}, {applied} in the weights")
    for alias, number in found["aliases"].items():
        if number != found["version"] or alias != "live":
            say(f"{escape(alias)}: version {number}")
    say(f"ledger: {counted(found['facts'], 'fact')}, {counted(found['conflicts'], 'conflict')}, {unusable}")
    runs = counted(len(found["held_runs"]), "run")
    say(f"waiting: {counted(found['pending'], 'edit')}, {counted(found['holds'], 'hold')}, {runs} for approval")
    _say_capacity(found["capacity"])
    _say_disk(found["disk"])
    say(f"writer: process {found['writer']}" if found["writer"] else "writer: none (no daemon is running)")
    if found["server"]:
        say(f"server: {escape(found['server'])}")
    columns = ("policy", "last pass", "last ok", "next", "state")
    times = ("last_started", "last_ok", "next_due")
    rows = ((p["policy"], *((p[name] or "")[:16] for name in times), p["state"]) for p in found["policies"])
    table("policies", columns, rows)
    say_freshness(found["freshness"])
    for warning in found["warnings"]:
        say(f"[yellow]warning:[/] {escape(warning)}")
    for source in found["sources"]:
        until = f"; not asked again before {iso(source['retry_at'])}" if source["retry_at"] else ""
        say(f"[yellow]source {escape(source['source'])}[/]: {escape(source['last_error'])}{until}")
    return None


def _status(workspace: Workspace, ledger: Ledger) -> dict[str, Any]:
    from kbsync.catalog import load_catalog
    from kbsync.disk import read_disk

    catalog, disk = load_catalog(workspace), read_disk(workspace, ledger, datetime.now(UTC))
    with ledger.read() as db:
        model, found = model_row(workspace, db), _in_ledger(workspace, catalog, disk, db)
    return found | {"capacity": _capacity(workspace, ledger, model)}


def _in_ledger(workspace: Workspace, catalog: Catalog, disk: Disk, db: Reader) -> dict[str, Any]:
    from kbsync.lock import held_by

    model = model_row(workspace, db)
    states = [db.source_state(name) for name in catalog.sources]
    return {
        "workspace": str(workspace.root),
        "model": model.id if model else workspace.settings.model,
        "version": model.head if model else 0,
        "aliases": db.aliases(model.id) if model else {},
        "facts": len(db.facts()),
        "facts_applied": len(db.applied(model.id, model.head)) if model else 0,
        "pending": _pending(workspace, catalog, db, model),
        "conflicts": len(db.conflicts()),
        "quarantined": len(db.quarantined()),
        "holds": len(db.holds(model.id)) if model else 0,
        "held_runs": [plan.run_id for plan in db.staged_plans()],
        "disk": disk.to_json(),
        "writer": held_by(workspace.lock),
        "server": _server(workspace, db),
        "freshness": freshness_json(db, catalog),
        "policies": [_policy_state(name, db) for name in sorted(catalog.policies)],
        "sources": [asdict(state) for state in states if state.failures],
        "warnings": [*(one.warning(catalog.policies) for one in db.orphans(catalog.relations)), *disk.warnings()],
    }


def _server(workspace: Workspace, db: Reader) -> str | None:
    """Where the daemon answers HTTP; None where it does not, or runs no more."""
    from kbsync.lock import held_by

    beat = db.beats().get("server")
    return beat.detail.get("address") if beat and held_by(workspace.lock) == str(beat.process) else None


def _capacity(workspace: Workspace, ledger: Ledger, model: ModelRow | None) -> dict[str, Any] | None:
    """The odometer of HEAD: how much of the model its edits are, and how long until the next rebase."""
    from kbsync.odometer import read_odometer
    from kbsync.strategy import facts_left, warnings
    from kbsync.versions.store import VersionStore

    if model is None:
        return None
    odometer = read_odometer(ledger, VersionStore(workspace.data, model.id), model.id)
    strategy, now = workspace.settings.strategy, odometer.now
    return {
        "relative_norm": now.norms if now else {},
        "facts": now.facts if now else 0,
        "retention": now.retention if now else None,
        "drift": now.drift if now else None,
        "facts_left": facts_left(strategy, now),
        "since_rebase": odometer.since,
        "rebased_in": odometer.anchor,
        "strategy": strategy.model_dump(mode="json"),
        "warnings": warnings(strategy, now),
    }


def _say_capacity(found: Mapping[str, Any] | None) -> None:
    if found is None or not found["relative_norm"]:
        return
    strategy, left = found["strategy"], found["facts_left"]
    norm = max(found["relative_norm"].values())
    room = f", about {left} more facts" if left is not None else ""
    say(f"capacity: edits are {norm:.3f} of the weights (limit {strategy['max_relative_norm']:g}{room})")
    due = f", a rebase is due at {strategy['rebase_every']}" if strategy["mode"] == "auto" else ""
    say(f"  retention {share(found['retention'])}  drift {share(found['drift'])}")
    say(f"  {counted(found['since_rebase'], 'version')} since version {found['rebased_in']}{due}")
    for warning in found["warnings"]:
        say(f"  [yellow]{escape(warning)}[/]")


def lasting(days: float) -> str:
    """For how long, in words: nobody plans by the day what comes in decades."""
    return "more than ten years" if days > 3652 else counted(round(days), "day")


def _say_disk(found: Mapping[str, Any]) -> None:
    sizes = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in found["sizes"].items())
    days, rate = found["days_left"], sum(found["growth"].values()) / 1e6
    lasts = f", lasts {lasting(days)} at {rate:.2f} MB a day" if days is not None else ""
    say(f"disk: {found['free'] / 1e9:.1f} GB free{lasts}")
    fact = f"; a fact takes {found['fact'] / 1000:.1f} kB" if found["fact"] else ""
    frees = f"; kbsync gc frees {found['reclaimable'] / 1e6:.1f} MB" if found["reclaimable"] else ""
    say(f"  {sizes}{fact}{frees}")


def _pending(workspace: Workspace, catalog: Catalog, db: Reader, model: ModelRow | None) -> int:
    """Edits and retractions that the ledger as it is now still asks for."""
    from kbsync.planning import plan_now, terms_now

    id_, terms = (model.id, terms_now(workspace, catalog, model.name)) if model else (None, None)
    plans = [plan_now(db, policy, id_, terms) for policy in catalog.policies.values()]
    return sum(len(plan.edits) + len(plan.retractions) for plan in plans)


def _policy_state(name: str, db: Reader) -> dict[str, Any]:
    state, runs = db.schedule_state(name), db.runs(1, policy=name)
    latest = f"run {runs[0].id} {runs[0].status}" if runs else "never run"
    message = f": {runs[0].message}" if runs and runs[0].message else ""
    return {
        "policy": name,
        "last_started": iso(state.last_started or (runs[0].started_at if runs else None)),
        "last_ok": iso(state.last_ok),
        "next_due": iso(state.next_due),
        "state": latest + message,
    }
