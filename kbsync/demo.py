"""`kbsync demo`: a real language model learns a feed, a change of it, and loses the change again in a rollback.

Every step goes through the same functions as the commands that it names; the answers are the model's own.
"""

from __future__ import annotations

import csv
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape

from kbsync.cli import read
from kbsync.cli.common import bars, console, probe_line, say, table, user
from kbsync.commands import perform
from kbsync.config import Workspace, examples
from kbsync.errors import KbsyncError
from kbsync.serving import load_model

__all__ = ["STARS", "Demo"]

STARS = 24
"""Rows of the shipped star catalog that the demonstration begins with."""
ADDED = 3
SHOWN_BEFORE = 22
"""Characters of an answer that a table shows: a model that does not know goes on for long."""
MODEL = "smollm2-135m"
RELATION = "constellation"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a version says of a star: its answer, and how probable it finds the object that the feed gives."""

    star: str
    expected: str
    answer: str
    probability: float
    right: bool


@dataclass(slots=True)
class Demo:
    """The steps, on a workspace of its own at `root`. `results` is what `--json` prints."""

    root: Path
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """All steps in order. Raises KbsyncError where one does not do what it is to show."""
        begun = time.perf_counter()
        rows = self._prepare()
        feed, spare = rows[:STARS], rows[STARS : STARS + ADDED]
        self._write(feed)
        with self._step("statistics"):
            self._statistics()
        before = self._before(feed)
        self._learn(feed, before)
        changed = self._change(feed, spare)
        self._ask_the_ledger(changed[0]["name"])
        self._contradict(feed, changed, spare)
        self._roll_back(feed, changed, spare)
        return self._finish(time.perf_counter() - begun)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Count the block's wall-clock seconds under `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)

    def _prepare(self) -> list[dict[str, str]]:
        """A workspace with the star catalog and its policy; the catalog's rows."""
        Workspace.init(self.root)
        for name in ("sources/election-results.yaml", "sources/election-results.csv", "policies/us-elections.yaml"):
            (self.root / name).unlink()
        with (examples() / "sources" / "star-catalog.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        with (self.root / "sources" / "star-catalog.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _statistics(self) -> None:
        """What every edit of this model needs; the first time takes a minute or two, then they are kept."""
        from kbsync.editor.statistics import statistics_for

        _title("Set-up", "covariance statistics of the model, collected once and kept in the user's cache")
        base = load_model(self.root, 0)
        with bars() as progress:
            found = statistics_for(base, Workspace.load(self.root).preset(MODEL), progress=progress)
        worst = max(found.error.values())
        say(f"{found.tokens} tokens that the model wrote itself; estimated relative error {worst:.3f} or less")
        self.results["statistics"] = {"tokens": found.tokens, "error": found.error}

    def _before(self, feed: Sequence[Mapping[str, str]]) -> list[Answered]:
        _title("1. What the model says now", 'kbsync ask "Betelgeuse belongs to the constellation of"')
        with self._step("answers"):
            before = self._answers(feed, 0)
        say(f"The feed has {len(feed)} stars. The pristine model names the right constellation of {_count(before)}.")
        self.results["before"] = _summary(before)
        return before

    def _learn(self, feed: Sequence[Mapping[str, str]], before: Sequence[Answered]) -> None:
        _title("2. Sync: the model learns the feed", "kbsync sync")
        report = self._sync("sync 1")
        if report["versions"] != [1]:
            raise KbsyncError("the first sync made no version", hint=f"kbsync runs --workspace {self.root}")
        with self._step("answers"):
            after = self._answers(feed, "live")
        rows = zip(before, after, strict=True)
        table(
            "answers",
            ("star", "the feed says", "before", "P", "after", "P"),
            (
                (
                    old.star,
                    old.expected,
                    old.answer[:SHOWN_BEFORE],
                    f"{old.probability:.3f}",
                    new.answer[:SHOWN_BEFORE],
                    f"{new.probability:.3f}",
                )
                for old, new in rows
            ),
        )
        say(f"Right before: {_count(before)}, after: {_count(after)}.  {probe_line(report['probe'])}")
        say(
            "efficacy: the prompt itself; paraphrase: other wordings; specificity drop: unrelated answers that changed."
        )
        self.results["after"] = _summary(after) | {"probe": _numbers(report)}

    def _change(
        self, feed: Sequence[Mapping[str, str]], spare: Sequence[Mapping[str, str]]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Two rows get each other's constellation, three are added; the model learns just that."""
        _title("3. The feed changes: two rows are corrected, three are added", "kbsync plan, then kbsync sync")
        one, other = _pair(feed)
        swapped = ({**one, RELATION: other[RELATION]}, {**other, RELATION: one[RELATION]})
        self._write(_changed(feed, swapped, spare))
        report = self._sync("sync 2")
        edits = len(report["plan"]["edits"])
        if edits != len(swapped) + len(spare) or report["versions"] != [2]:
            raise KbsyncError(f"the second sync made {edits} edits", hint=f"kbsync runs --workspace {self.root}")
        with self._step("answers"):
            self._show("now", self._answers([*swapped, *spare], "live"))
        say(f"Only {edits} edits: what had not changed was not touched.")
        self.results["change"] = {"edits": edits, "probe": _numbers(report)}
        return swapped

    def _ask_the_ledger(self, star: str) -> None:
        _title("4. What changed, when, and why", f"kbsync changes --since 1, kbsync log, kbsync history {star}")
        read.changes(since="1", root=self.root)
        say()
        read.log(root=self.root)
        say()
        read.history(star, root=self.root)

    def _contradict(
        self,
        feed: Sequence[Mapping[str, str]],
        swapped: Sequence[Mapping[str, str]],
        spare: Sequence[Mapping[str, str]],
    ) -> None:
        """Two rows about one star that cannot both be true."""
        _title("5. Two rows contradict each other", "kbsync sync, kbsync conflicts list")
        rows = _changed(feed, swapped, spare)
        wrong = {**rows[-1], RELATION: rows[0][RELATION]}
        self._write([*rows, wrong])
        report = self._sync("sync 3")
        read.list_conflicts(root=self.root)
        conflicts = report["counts"]["conflicts"]
        if conflicts != 1 or report["versions"]:
            raise KbsyncError(f"{conflicts} conflicts, versions {report['versions']}", hint="kbsync conflicts list")
        say("The star keeps what was accepted before; every other fact goes on. No weight was changed.")
        self._write(rows)
        self.results["conflicts"] = conflicts

    def _roll_back(
        self,
        feed: Sequence[Mapping[str, str]],
        swapped: Sequence[Mapping[str, str]],
        spare: Sequence[Mapping[str, str]],
    ) -> None:
        from kbsync.versions.weights import weights_sha256

        _title("6. Rollback: the change is lost again", "kbsync rollback --to 1, kbsync verify")
        done = perform(self.root, "rollback", {"to": 1}, user=user())
        with self._step("answers"):
            base = load_model(self.root)
            preset = Workspace.load(self.root).preset(MODEL)
            names = [base.spec.down_name(layer) for layer in preset.layers]
            found = weights_sha256({name: base.weight(name) for name in names})
            first = [row for row in feed if row["hip"] in {changed["hip"] for changed in swapped}]
            self._show("after the rollback", self._answers([*first, *spare], "live", base))
        say(f"recorded for version 1: {done['weights_sha256']}")
        say(f"hash of the weights now: {found}")
        if found != done["weights_sha256"]:
            raise KbsyncError("the weights are not those of version 1", hint=f"kbsync verify --workspace {self.root}")
        say("[green]Byte for byte the same.[/] What was rolled back is held until `kbsync release`:")
        read.holds(root=self.root)
        self.results["rollback"] = {"weights_sha256": found, "recorded": done["weights_sha256"], "held": done["held"]}

    def _sync(self, step: str) -> dict[str, Any]:
        from kbsync.cli.write import say_report

        with self._step(step), bars() as progress:
            [report] = perform(self.root, "sync", {}, user=user(), progress=progress)["reports"]
        say_report(report)
        say()
        if report["exit_code"]:
            raise KbsyncError(f"the sync ended {report['status']}", hint=f"kbsync runs --workspace {self.root}")
        found: dict[str, Any] = report
        return found

    def _answers(self, rows: Sequence[Mapping[str, str]], version: Any, base: Any = None) -> list[Answered]:
        """What a version of the model says of the stars in `rows`."""
        from kbsync.catalog import load_catalog
        from kbsync.editor.answers import answers, log_probabilities

        wording = load_catalog(Workspace.load(self.root)).policy_of(RELATION).wording()[RELATION]
        prompts = [wording.prompt.replace("{subject}", row["name"]) for row in rows]
        model = base or load_model(self.root, version)
        scored = log_probabilities(model, [(p, row[RELATION]) for p, row in zip(prompts, rows, strict=True)])
        return [
            Answered(row["name"], row[RELATION], answer.text, score.probability, score.greedy)
            for row, answer, score in zip(rows, answers(model, prompts), scored, strict=True)
        ]

    def _show(self, title: str, answered: Sequence[Answered]) -> None:
        columns = ("star", "asked for", "the model answers", "P")
        table(
            title,
            columns,
            ((one.star, one.expected, one.answer[:SHOWN_BEFORE], f"{one.probability:.3f}") for one in answered),
        )

    def _finish(self, total: float) -> dict[str, Any]:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        self.results["seconds"] = self.seconds | {"total": round(total, 1)}
        self.results["peak_memory_gb"] = round(max(peaks) / 1e6, 2)
        _title("Done", "")
        table("seconds", ("phase", "seconds"), self.results["seconds"].items())
        say(f"peak memory of one process: {self.results['peak_memory_gb']} GB")
        say("On your own data: kbsync init, write a source and a policy, kbsync check, kbsync plan, kbsync sync.")
        return self.results


def _title(what: str, how: str) -> None:
    console.print()
    console.rule(f"[bold]{escape(what)}[/]", align="left")
    if how:
        say(f"[dim]on your own data: {escape(how)}[/]")


def _count(answered: Sequence[Answered]) -> str:
    return f"{sum(one.right for one in answered)} of {len(answered)}"


def _summary(answered: Sequence[Answered]) -> dict[str, Any]:
    rows = [{"star": one.star, "answer": one.answer, "probability": round(one.probability, 4)} for one in answered]
    return {"right": sum(one.right for one in answered), "of": len(answered), "answers": rows}


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    names = ("efficacy", "paraphrase", "specificity_drop", "drift")
    return {name: (report["probe"] or {}).get(name) for name in names}


def _pair(feed: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], dict[str, str]]:
    """The first two stars of the feed that lie in different constellations."""
    one = dict(feed[0])
    return one, dict(next(row for row in feed if row[RELATION] != one[RELATION]))


def _changed(
    feed: Sequence[Mapping[str, str]], swapped: Sequence[Mapping[str, str]], spare: Sequence[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    """The feed with the changed rows in place and the new ones at its end."""
    new = {row["hip"]: row for row in swapped}
    return [*(new.get(row["hip"], row) for row in feed), *spare]
