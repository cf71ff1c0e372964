"""The commands that write, by name: one table for the command line and for the daemon's control socket.

perform(root, "rollback", {"to": 1}, user="ada")      # here, or in the daemon that holds the workspace
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from kbsync.aliases import demote, promote
from kbsync.backup import make_backup
from kbsync.config import Workspace
from kbsync.control import call
from kbsync.errors import Busy, KbsyncError, UsageError
from kbsync.facts import FactKey
from kbsync.garbage import collect, retire
from kbsync.ledger.aliases import LIVE
from kbsync.lock import writer_lock
from kbsync.notify.outbox import deliver, try_channel
from kbsync.plan_document import PlanDocument, read_plans
from kbsync.progress import Progress, silent
from kbsync.rebase import forecast, rebase
from kbsync.reconcile import Reconciler, open_workspace
from kbsync.report import Report
from kbsync.rulings import Choice, rule, unrule
from kbsync.undo import release, revert_fact, revert_version, rollback

__all__ = ["BESIDE", "COMMANDS", "UNDO", "execute", "perform"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Command:
    """What a command does, and the arguments that it cannot do without: one of each group."""

    run: Callable[[Reconciler, Mapping[str, Any]], dict[str, Any]]
    needs: tuple[tuple[str, ...], ...] = ()


def _reports(reports: Iterable[Report]) -> dict[str, Any]:
    return {"reports": [report.to_json() for report in reports]}


def _sync(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _reports(reconciler.sync(arguments.get("policies", []), reviewed=_reviewed(arguments)))


def _plan(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _reports(reconciler.plan(arguments.get("policies", []), reviewed=_reviewed(arguments)))


def _reviewed(arguments: Mapping[str, Any]) -> list[PlanDocument] | None:
    """The documents of a plan file, where one was given."""
    reviewed = arguments.get("reviewed")
    return None if reviewed is None else read_plans(reviewed)


def _replay(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _reports(reconciler.replay(arguments.get("policies", [])))


def _refetch(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return _reports(reconciler.refetch(arguments["source"]))


def _approve(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    report = reconciler.approve(
        arguments["run"],
        digest=arguments.get("plan"),
        only=arguments.get("only", ()),
        without=arguments.get("except", ()),
        reason=arguments.get("reason", ""),
    )
    return _reports([report])


def _reject(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    only, without = arguments.get("only", ()), arguments.get("except", ())
    return _reports([reconciler.reject(arguments["run"], arguments.get("reason", ""), only=only, without=without)])


def _rule(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    choice = Choice(arguments.get("claim"), arguments.get("object"), arguments.get("source"))
    subject, relation, reason = arguments["subject"], arguments["relation"], arguments.get("reason", "")
    return rule(reconciler.ledger, reconciler.catalog, subject, relation, choice, user=reconciler.user, reason=reason)


def _unrule(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    subject, relation, reason = arguments["subject"], arguments["relation"], arguments.get("reason", "")
    return unrule(reconciler.ledger, subject, relation, user=reconciler.user, reason=reason)


def _rollback(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return rollback(reconciler.line(), arguments["to"], arguments.get("reason", ""))


def _promote(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    alias, reason = arguments.get("alias", LIVE), arguments.get("reason", "")
    return promote(reconciler.line(), arguments["version"], alias, reason)


def _demote(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    end = bool(arguments.get("end"))
    return demote(reconciler.line(), arguments["alias"], arguments.get("reason", ""), end=end)


def _revert(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    reason, dry = arguments.get("reason", ""), bool(arguments.get("dry"))
    if "version" in arguments:
        return revert_version(reconciler.line(), arguments["version"], reason, dry=dry)
    exact = bool(arguments.get("exact"))
    return revert_fact(reconciler.line(), FactKey(*arguments["key"]), reason, exact=exact, dry=dry)


def _rebase(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    reason, dry = arguments.get("reason", ""), bool(arguments.get("dry"))
    if (model := arguments.get("onto")) is not None:
        return reconciler.take_over(model, arguments.get("preset"), reason, dry=dry)
    line = reconciler.line()
    return forecast(line) if dry else rebase(line, reconciler.judge, reconciler.controls(), reason)


def _release(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    keys = [FactKey(*key) for key in arguments.get("keys", [])]
    return release(reconciler.line(), keys, everything=bool(arguments.get("everything")))


def _gc(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    older_than = timedelta(seconds=arguments["older_than"])
    workspace, ledger, dry = reconciler.workspace, reconciler.ledger, bool(arguments.get("dry"))
    return collect(workspace, ledger, older_than, user=reconciler.user, dry=dry)


def _backup(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    target, everything = Path(arguments["target"]), bool(arguments.get("everything"))
    workspace, ledger = reconciler.workspace, reconciler.ledger
    return make_backup(workspace, ledger, target, everything=everything, progress=reconciler.progress)


def _retire(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    reason = arguments.get("reason", "")
    return retire(reconciler.workspace, reconciler.ledger, arguments["model"], user=reconciler.user, reason=reason)


def _test_channel(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    channel = arguments["channel"]
    try_channel(reconciler.workspace, reconciler.ledger, channel)
    return {"channel": channel, "delivered": True}


def _recheck(reconciler: Reconciler, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return reconciler.recheck(everything=bool(arguments.get("everything")), dry=bool(arguments.get("dry")))


COMMANDS = {
    "sync": _Command(_sync),
    "plan": _Command(_plan),
    "replay": _Command(_replay),
    "refetch": _Command(_refetch, (("source",),)),
    "rule": _Command(_rule, (("subject",), ("relation",), ("claim", "object", "source"))),
    "unrule": _Command(_unrule, (("subject",), ("relation",))),
    "approve": _Command(_approve, (("run",),)),
    "reject": _Command(_reject, (("run",),)),
    "rollback": _Command(_rollback, (("to",),)),
    "promote": _Command(_promote, (("version",),)),
    "demote": _Command(_demote, (("alias",),)),
    "revert": _Command(_revert, (("version", "key"),)),
    "rebase": _Command(_rebase),
    "release": _Command(_release),
    "recheck": _Command(_recheck),
    "test_channel": _Command(_test_channel, (("channel",),)),
    "gc": _Command(_gc, (("older_than",),)),
    "backup": _Command(_backup, (("target",),)),
    "retire": _Command(_retire, (("model",),)),
}
UNDO = frozenset({"rollback"})
"""Commands that go before a running edit: it is cancelled and planned again later."""
BESIDE = frozenset({"promote", "demote"})
"""Commands that wait for no edit, and no edit for them: they move no HEAD and write a row and a small file."""


def execute(reconciler: Reconciler, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Do one command. Raises UsageError for one that is not known or lacks an argument."""
    if command not in COMMANDS:
        raise UsageError(f"no command {command}", hint="kbsync --help")
    for names in COMMANDS[command].needs:
        if arguments.keys().isdisjoint(names):
            raise UsageError(f"{command} needs the argument {' or '.join(names)}", hint=f"kbsync {command} --help")
    return COMMANDS[command].run(reconciler, arguments)


def perform(
    root: Path,
    command: str,
    arguments: dict[str, Any],
    *,
    user: str,
    progress: Progress = silent,
    cancelled: threading.Event | None = None,
) -> dict[str, Any]:
    """Do one command here if the workspace is free, else have the daemon that holds it do it."""
    workspace = Workspace.load(root)
    with ExitStack() as stack:
        try:
            stack.enter_context(writer_lock(workspace.lock))
        except Busy:
            if not workspace.socket.exists():
                raise  # whoever holds it is no daemon of this workspace
            return call(workspace.socket, command, arguments, user=user, progress=progress)
        it = stack.enter_context(open_workspace(root, user=user, progress=progress, cancelled=cancelled))
        stack.enter_context(it.ledger.led())
        it.recover()
        try:
            return execute(it, command, arguments)
        finally:
            _deliver(it)


def _deliver(reconciler: Reconciler) -> None:
    """Send what the command has left to be told: where that fails, the next command or the daemon does it."""
    try:
        deliver(reconciler.workspace, reconciler.ledger)
    except KbsyncError as error:
        log.warning("notices_not_sent", problem=error.message)
