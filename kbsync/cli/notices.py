"""`kbsync notices`: what people are told, and how far that came on each channel. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, emit, say, table
from kbsync.cli.read import reading, short
from kbsync.cli.write import perform

if TYPE_CHECKING:
    from kbsync.ledger.notices import DeliveryRow, NoticeRow

__all__ = ["app"]

app = typer.Typer()
group = typer.Typer(invoke_without_command=True)
app.add_typer(group, name="notices")


@group.callback()
def notices(
    context: typer.Context,
    root: Root = Path(),
    everything: Annotated[bool, typer.Option("--all", help="Every notice, those that are over, too.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many at most.", min=1)] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what needs a person now (`--all`: everything that people were told), and how far it came on each channel."""
    if context.invoked_subcommand is not None:
        return None
    with reading(root) as (_, db):
        found = db.notices(limit) if everything else db.troubles()[:limit]
        sent, channels = db.deliveries([one.id for one in found]), db.channels().values()
    if as_json:
        rows = [_as_json(one, sent.get(one.id, [])) for one in found]
        return emit({"notices": rows, "channels": [asdict(channel) for channel in channels]})
    columns = ("notice", "since", "kind", "message", "delivery")
    rows_of = ((one.id, short(one.at), one.kind, one.message, _came(sent.get(one.id, []))) for one in found)
    table("notices", columns, rows_of)
    for channel in channels:
        if channel.stopped:
            say(f"[yellow]channel {escape(channel.name)} is stopped:[/] {escape(channel.stopped)}")
            say(f"  kbsync notices test {escape(channel.name)} starts it again once that succeeds")
    return None


@group.command("test")
def channel_test(
    channel: Annotated[str, typer.Argument(help="A channel's name in `notify:` of kbsync.yaml.")],
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Send a message on one channel, to see that it arrives."""
    done = perform("test_channel", {"channel": channel}, root)
    if as_json:
        return emit(done)
    say(f"channel [bold]{escape(channel)}[/]: delivered")
    return None


def _as_json(notice: NoticeRow, sent: Sequence[DeliveryRow]) -> dict[str, Any]:
    return asdict(notice) | {"uid": notice.uid, "deliveries": [asdict(row) | {"state": _state(row)} for row in sent]}


def _came(sent: Sequence[DeliveryRow]) -> str:
    return "; ".join(f"{row.channel}: {_state(row)}{f' ({row.error})' if row.error else ''}" for row in sent)


def _state(row: DeliveryRow) -> str:
    if row.delivered_at is not None:
        return "delivered"
    tried = f"after {row.attempts} attempt{'s' * (row.attempts != 1)}"
    return f"given up {tried}" if row.given_up else f"next try {short(row.next_at)} {tried}"
