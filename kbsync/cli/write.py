"""The commands that change the ledger or HEAD. While the daemon runs they are handed to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kbsync.cli.common import AsJson, Root, bars, counted, emit, probe_line, say, user
from kbsync.cli.read import model_row, reading

__all__ = ["app", "find_key", "passes", "perform", "say_report"]

app = typer.Typer()

Policies = Annotated[list[str] | None, typer.Argument(help="Policies; default: all.", show_default=False)]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the audit log.")]


CHANGES = 10
"""Exit code of `plan --exit-code` where there is something to do: none of those that mean a failure."""


@app.command()
def plan(
    policies: Policies = None,
    root: Root = Path(),
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the plan into this file, for `sync --plan`.", metavar="FILE")
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help=f"End with {CHANGES} where there is something to do, for CI.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what `sync` would do now, without doing it. `--json` is a document for review (docs/policies.md)."""
    done = perform("plan", {"policies": policies or []}, root)
    document = _plan_file(done["reports"])
    if out is not None:
        write_json(out, document)
    if as_json:
        emit(document)
    else:
        for report in done["reports"]:
            say_report(report)
    if code := _gravest(done["reports"]):
        raise typer.Exit(code)
    if exit_code and any(_does_something(one) for one in document["plans"]):
        raise typer.Exit(CHANGES)


def _plan_file(reports: list[dict[str, Any]]) -> dict[str, Any]:
    from kbsync.plan_document import PlanFile

    plans = [report["document"] for report in reports if report["document"]]
    problems = [{"policy": report["policy"], **problem} for report in reports for problem in report["problems"]]
    return PlanFile(plans=plans, problems=problems).model_dump(mode="json")


def _does_something(document: dict[str, Any]) -> bool:
    """Whether a plan would change the weights, the ledger or a hold."""
    parts = ("adds", "changes", "re_rendered", "faded", "retractions", "ended_holds", "facts")
    return any(document[part] for part in parts)


@app.command()
def sync(
    policies: Policies = None,
    root: Root = Path(),
    as_json: AsJson = False,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Apply exactly the plan in this file, or refuse.", metavar="FILE"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same as `kbsync plan`; with --plan, check it.")
    ] = False,
) -> None:
    """Fetch the sources, record what changed, and bring the model in line."""
    arguments: dict[str, Any] = {"policies": policies or []}
    if plan_file is not None:
        arguments["reviewed"] = read_json(plan_file)
    passes("plan" if dry_run else "sync", arguments, root, as_json)


@app.command()
def rollback(
    to: Annotated[
        str, typer.Option("--to", help="The version to go back to: a number or an alias; 0 is the pristine model.")
    ],
    root: Root = Path(),
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Move HEAD back to an earlier version. What that takes out is held until `kbsync release`."""
    done = perform("rollback", {"to": to, "reason": reason}, root)
    if as_json:
        return emit(done)
    what = "live" if done["live"] == done["version"] else "HEAD"
    weights = str(done["weights_sha256"])[:12]
    say(f"version [bold]{done['version']}[/] is {what} (was {done['from']}), weights {weights}")
    _say_held(done)
    say_live(root)
    return None


@app.command()
def revert(
    version: Annotated[int | None, typer.Argument(help="The version to undo, anywhere in the history.")] = None,
    fact: Annotated[
        tuple[str, str] | None, typer.Option("--fact", help="Take one fact out.", metavar="SUBJECT RELATION")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --fact: insert all other facts anew instead of taking its share out.")
    ] = False,
    root: Root = Path(),
    reason: Reason = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a new version without the work of one version, or without one fact; later versions stay."""
    from kbsync.errors import UsageError

    if (version is None) == (fact is None):
        raise UsageError("give either a version or --fact SUBJECT RELATION", hint="kbsync log lists the versions")
    arguments: dict[str, Any] = {"reason": reason, "dry": dry_run, "exact": exact}
    if fact is not None:
        arguments["key"] = find_key(root, *fact)
    else:
        arguments["version"] = version
    done = perform("revert", arguments, root)
    if as_json:
        return emit(done)
    how = f"a rebase: {done['rebase']}" if done["rebase"] else "on HEAD"
    say(f"{len(done['taken_out'])} facts taken out, {len(done['put_back'])} put back ({escape(how)})")
    if not dry_run:
        _say_version(done)
        _say_held(done)
        say_live(root)
    return None


@app.command()
def rebase(
    onto: Annotated[
        str | None, typer.Option("--onto", help="Another base model, which takes over all live facts.", metavar="MODEL")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="With --onto: its editing preset; default: the model's own.")
    ] = None,
    root: Root = Path(),
    reason: Reason = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would hold and cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Insert all live facts anew, in one go, into the pristine base; or into another base model."""
    from kbsync.errors import UsageError

    if preset is not None and onto is None:
        raise UsageError("--preset is for --onto", hint="this model's preset is named in kbsync.yaml")
    done = perform("rebase", {"onto": onto, "preset": preset, "reason": reason, "dry": dry_run}, root)
    if as_json:
        return emit(done)
    if dry_run:
        return _say_forecast(done)
    _say_version(done)
    if "change" not in done:
        say_live(root)
    else:
        say(f"{escape(done['from'])} stays as it is. To follow the new line, write into kbsync.yaml:")
        say(escape(done["change"]))
    return None


def _say_version(done: dict[str, Any]) -> None:
    """What came of a command that makes a version."""
    weights = str(done["weights_sha256"])[:12]
    said = f"version [bold]{done['version']}[/] is HEAD" if done["version"] is not None else "no new version: the same"
    say(f"{said}, weights {weights}")
    say(f"  {probe_line(done['probe'])}")
    for name, what in (("failed", "held"), ("lost", "no longer answered")):
        for fact in done[name]:
            say(f"  [yellow]{what}[/]: {escape(fact['evidence'])}")


def _say_forecast(found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    time = f", about {seconds:.0f} s" if seconds is not None else ""
    say(
        f"a rebase of version {found['head']} inserts {found['facts']} facts into the pristine {escape(found['model'])}"
    )
    say(f"  {found['targets']} target vectors to compute{time}")
    if "change" in found:
        say(f"  {escape(found['from'])} stays as it is; afterwards write into kbsync.yaml:")
        return say(escape(found["change"]))
    every, since, anchor = found["strategy"]["rebase_every"], found["since"], found["anchor"]
    say(f"  by itself: {escape(found['due'] or f'not due yet, {since} of {every} versions since version {anchor}')}")
    for warning in found["warnings"]:
        say(f"  [yellow]{escape(warning)}[/]")
    return None


@app.command()
def release(
    subject: Annotated[str | None, typer.Argument(help="Subject: its id or its label.")] = None,
    relation: Annotated[str | None, typer.Argument(help="Relation.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="End every hold.")] = False,
    root: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """End holds, so that the next sync applies what the ledger wants."""
    from kbsync.errors import UsageError

    if everything == (subject is not None) or (subject is not None and relation is None):
        raise UsageError("give SUBJECT RELATION, or --all", hint="kbsync holds lists what is held")
    keys = [] if subject is None or relation is None else [find_key(root, subject, relation)]
    done = perform("release", {"keys": keys, "everything": everything}, root)
    if as_json:
        return emit(done)
    say(f"{done['released']} released; `kbsync sync` applies them")
    return None


@app.command()
def gc(
    root: Root = Path(),
    hours: Annotated[float, typer.Option("--older-than", help="Hours that a file must be old.", min=0)] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give up old versions as `retention:` says, and remove files that no version needs."""
    done = perform("gc", {"older_than": hours * 3600, "dry": dry_run}, root)
    if as_json:
        return emit(done)
    for path in done["files"]:
        say(escape(path))
    for model, numbers in done["versions"].items():
        lost = ", ".join(map(str, numbers))
        say(f"not restorable any more: {counted(len(numbers), 'version')} of {escape(model)} ({lost})")
    say(f"{len(done['files'])} files {'would be' if dry_run else ''} removed, {done['bytes'] / 1e6:.1f} MB")
    return None


@app.command()
def retire(
    model: Annotated[str, typer.Argument(help="A model that kbsync.yaml no longer names: its name or id.")],
    root: Root = Path(),
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Give up the versions of a former model, so that `gc` frees their files."""
    done = perform("retire", {"model": model, "reason": reason}, root)
    if as_json:
        return emit(done)
    say(f"the versions of {escape(done['model'])} are given up; `kbsync gc` removes their files")
    return None


def perform(command: str, arguments: dict[str, Any], root: Path) -> dict[str, Any]:
    """Do a command here or in the daemon, with a progress bar; its result."""
    from kbsync.commands import perform

    with bars() as progress:
        return perform(root, command, arguments, user=user(), progress=progress)


def passes(command: str, arguments: dict[str, Any], root: Path, as_json: bool) -> None:
    """Run a command that reports passes, print them, and end with the gravest exit code among them."""
    done = perform(command, arguments, root)
    if as_json:
        emit(done)
    else:
        for report in done["reports"]:
            say_report(report)
        if any(report["versions"] for report in done["reports"]):
            say_live(root)
    if code := _gravest(done["reports"]):
        raise typer.Exit(code)


def _gravest(reports: list[dict[str, Any]]) -> int:
    return max((report["exit_code"] for report in reports), default=0)


def read_json(path: Path) -> Any:
    """The JSON document in a file. Raises UsageError where there is none."""
    from kbsync.errors import UsageError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", hint="kbsync plan --out FILE writes one") from None


def write_json(path: Path, value: object) -> None:
    """Write a JSON document into a file. Raises UsageError where that fails."""
    from kbsync.errors import UsageError

    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}", hint="another --out") from None


_COUNTS = {
    "rows": ("row",),
    "added": ("new claim",),
    "ended": ("ended claim",),
    "quarantined": ("quarantined row",),
    "changes": ("changed fact",),
    "conflicts": ("conflict",),
    "pending": ("waiting fact",),
    "held": ("held change",),
    "failed": ("failed edit",),
}
"""What a pass counts, in words that say of what."""


def say_report(report: dict[str, Any]) -> None:
    """One pass for a person."""
    run = f"run {report['run']}" if report["run"] else "dry run"
    say(f"[bold]{escape(report['policy'])}[/]  {run}  {report['status']}")
    counts = report["counts"]
    if counts:
        say("  " + "  ".join(counted(counts[name], *nouns) for name, nouns in _COUNTS.items() if counts.get(name)))
    if report["plan"]:
        _say_plan(report["plan"], report["rebase"])
    for note in report["notes"]:
        say(f"  [yellow]{escape(note)}[/]")
    for search in report["searches"]:
        _say_search(search)
    for number in report["versions"]:
        say(f"  version [bold]{number}[/] published")
    if report["probe"]:
        say(f"  {probe_line(report['probe'])}")
    if report["seconds"]:
        phases = [f"{phase} {seconds:.1f} s" for phase, seconds in report["seconds"].items() if seconds >= 0.05]
        say(f"  {'  '.join(phases)}")
    for problem in report["problems"]:
        say(f"  [red]{escape(problem['message'])}[/]")
        if problem["hint"]:
            say(f"  hint: {escape(problem['hint'])}")


def _say_search(search: dict[str, Any]) -> None:
    """How a batch that the gate rejected was searched for the facts to blame, for a person."""
    say(f"  [yellow]rejected at first:[/] {escape('; '.join(search['rejected']))}")
    tried, fine = counted(search["trials"], "trial"), counted(search["accepted"], "fact")
    say(f"  {tried}: {fine} published, {len(search['held'])} held, {search['undecided']} left for the next pass")
    for row in search["held"]:
        say(f"    [yellow]held[/]        {escape(row['prompt'])} [bold]{escape(row['target'])}[/]")
        say(f"                {escape(row['reason'])}: {escape(row['evidence'])}")


SHOWN_EDITS = 20
"""Edits that a plan lists for a person; `--json` has them all."""


def _say_plan(plan: dict[str, Any], rebase: str | None) -> None:
    edits, retractions = plan["edits"], plan["retractions"]
    way = f", as a rebase: {escape(rebase)}" if rebase else ""
    inserted, removed = counted(len(edits), "edit"), counted(len(retractions), "retraction")
    say(f"  plan on version {plan['head']}: {inserted}, {removed}{way}")
    for edit in edits[:SHOWN_EDITS]:
        before = f" (was {edit['before']})" if edit["before"] else ""
        request = edit["request"]
        say(f"    {edit['kind']:<11} {escape(request['prompt'])} [bold]{escape(request['target'])}[/]{escape(before)}")
    if len(edits) > SHOWN_EDITS:
        say(f"    … and {len(edits) - SHOWN_EDITS} more (--json lists all)")
    for gone in retractions[:SHOWN_EDITS]:
        say(f"    retract     {escape(gone['relation'])} of {escape(gone['subject_id'])}: {escape(gone['target'])}")
    for no in plan["blocked"]:
        what = f"{no['relation']} of {no['subject_id']}: {no['reason']}"
        say(f"    [yellow]blocked[/]     {escape(what)}")


def say_live(root: Path) -> None:
    """Where `live` does not follow HEAD, which version is served all the same."""
    with reading(root) as (workspace, db):
        if (model := model_row(workspace, db)) is None:
            return
        live = db.pinned(model.id).get("live")
    if live not in (None, model.head):
        say(f"[yellow]live stays at version {live}[/]; `kbsync promote {model.head}` serves version {model.head}")


def _say_held(done: dict[str, Any]) -> None:
    if done["held"]:
        say(f"{done['held']} changes are held; `kbsync holds` lists them, `kbsync release` ends a hold")


def find_key(root: Path, subject: str, relation: str) -> list[str]:
    """(relation, subject id) of a subject given by id or label."""
    from kbsync.cli.common import opened
    from kbsync.errors import UsageError

    with opened(root) as (_, ledger), ledger.read() as db:
        found = sorted({row.fact.key for row in db.history(subject, relation)})
    if len(found) != 1:
        many = ", ".join(key.subject for key in found)
        raise UsageError(
            f"{subject!r} is {'ambiguous: ' + many if found else 'not in the ledger'} ({relation})",
            hint="kbsync facts shows subjects with their ids",
        )
    return list(found[0])
