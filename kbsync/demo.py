"""`kbsync demo`: a real language model learns a feed, a change of it, and loses the change again in a rollback.

Every step goes through the same functions as the commands that it names; the answers are the model's own.

    prepare(folder)
    results = Demo(folder).run()
"""

from __future__ import annotations

import csv
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kbsync.catalog import load_catalog
from kbsync.cli import decide, history, read, versions
from kbsync.cli.common import MEASURED, bars, console, say, share, table, user
from kbsync.cli.write import say_report
from kbsync.commands import perform
from kbsync.config import Workspace
from kbsync.errors import KbsyncError
from kbsync.serving import load_model

if TYPE_CHECKING:
    from kbsync.editor.model import Base

__all__ = ["ADDED", "MODEL", "STARS", "Demo", "prepare"]

STARS = 24
"""Rows of the shipped star catalog that the feed begins with."""
ADDED = 3
"""Rows that the feed gains with its change."""
MODEL = "smollm2-135m"
RELATION = "constellation"
PROSE_WIDTH = 100
"""Columns of running text on a wide terminal."""
ANSWER_WIDTH = 18
"""Characters of an answer that a table shows: a model that does not know goes on for long."""
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of ru_maxrss (getrusage(2))."""

Row = dict[str, str]


def prepare(root: Path) -> None:
    """Make a workspace in `root` that has the star catalog alone. Raises UsageError where the folder is not empty."""
    for name in Workspace.init(root):
        if "election" in name.stem:
            (root / name).unlink()


@dataclass(frozen=True, slots=True)
class Answered:
    """What a version says of a star, and how probable it finds what the feed says. `right`: it begins with that."""

    star: str
    expected: str
    answer: str
    probability: float
    right: bool

    @property
    def shown(self) -> str:
        """The answer as a table shows it, marked where it is right."""
        text = self.answer if len(self.answer) <= ANSWER_WIDTH else self.answer[: ANSWER_WIDTH - 1] + "…"
        return f"{'✓' if self.right else ' '} {text}"


@dataclass(slots=True)
class Demo:
    """The steps, on a workspace at `root` that was never synced and whose feed is sources/star-catalog.csv.

    It takes the feed's first `stars` rows to begin with and `added` more for the change. `results` is what `--json`
    prints.
    """

    root: Path
    stars: int = STARS
    added: int = ADDED
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    first: list[Row] = field(default_factory=list)
    """What is true of each star in version 1, those that are added later included."""
    rows: list[Row] = field(default_factory=list)
    """The same after the change."""
    answered: dict[int, list[Answered]] = field(default_factory=dict)
    """What each version says of every star."""

    def run(self) -> dict[str, Any]:
        """All steps in order. Raises KbsyncError where one does not do what it is to show."""
        begun = time.perf_counter()
        with self._feed.open(encoding="utf-8", newline="") as file:
            self.first = [*csv.DictReader(file)][: self.stars + self.added]
        self._write(self.first[: self.stars])
        self._collect_statistics()
        self._ask_the_pristine_model()
        self._learn_the_feed()
        changed = self._learn_a_change()
        self._read_the_ledger(changed[0]["name"])
        self._contradict()
        self._roll_back()
        return self._finish(time.perf_counter() - begun)

    @property
    def _feed(self) -> Path:
        return self.root / "sources" / "star-catalog.csv"

    def _collect_statistics(self) -> None:
        from kbsync.editor.statistics import statistics_for

        _title(
            "Set-up: statistics of the model",
            "An edit must know which inputs of a layer are in use, to leave them as they are. Sampled once, then kept.",
            "kbsync statistics build (a sync does it by itself)",
        )
        workspace = Workspace.load(self.root)
        with self._timed("statistics"), bars() as progress:
            found = statistics_for(
                load_model(self.root, 0), workspace.preset(workspace.settings.model), progress=progress
            )
        _note(
            f"{found.tokens} tokens of text that the model wrote itself; "
            f"estimated relative error {min(found.error.values()):.3f} to {max(found.error.values()):.3f}."
        )
        self.results["statistics"] = {"tokens": found.tokens, "error": found.error}

    def _ask_the_pristine_model(self) -> None:
        _title(
            "1. What the model says now",
            f"The starting point: a feed of {self.stars} stars, and a small model that has hardly heard of them.",
            'kbsync ask "Betelgeuse belongs to the constellation of"',
        )
        found = self.answered[0] = self._ask(self.first)
        columns = ("star", "the feed says", "the model answers", "P")
        table("answers", columns, ((one.star, one.expected, one.shown, _p(one)) for one in found[: self.stars]))
        _note(f"Right (✓): {_count(found[: self.stars])}. P: how probable the model finds what the feed says.")
        self.results["before"] = _summary(found[: self.stars])

    def _learn_the_feed(self) -> None:
        _title(
            "2. Sync: the model learns the feed",
            "Facts of a feed get into the weights in one pass, and are measured there before they are published.",
            "kbsync sync",
        )
        report = self._sync("sync 1", versions=[1])
        before, after = self.answered[0], self._ask(self.first)
        self.answered[1] = after
        columns = ("star", "the feed says", "the model answers", "P before", "P after")
        rows = zip(before[: self.stars], after[: self.stars], strict=True)
        table("answers", columns, ((new.star, new.expected, new.shown, _p(old), _p(new)) for old, new in rows))
        _note(f"Right before: {_count(before[: self.stars])}, after: {_count(after[: self.stars])}.")
        if report["counts"].get("failed"):
            _note(
                f"{report['counts']['failed']} of the facts did not take: they were left out and are held with the "
                "evidence (kbsync holds), so the other answers are not harmed for them."
            )
        _explain(report["probe"])
        self.results["after"] = _summary(after[: self.stars]) | {"probe": _numbers(report)}

    def _learn_a_change(self) -> list[Row]:
        """Two rows get each other's constellation, the rest of the catalog's rows is added."""
        one, other = _pair(self.first)
        swapped = [{**one, RELATION: other[RELATION]}, {**other, RELATION: one[RELATION]}]
        _title(
            f"3. The feed changes: two rows are corrected, {self.added} are added",
            "Only the difference is edited; what the model learned before stays.",
            "kbsync plan shows the difference, kbsync sync applies it",
        )
        new = {row["hip"]: row for row in swapped}
        self.rows = [new.get(row["hip"], row) for row in self.first]
        self._write(self.rows)
        report = self._sync("sync 2", versions=[2])
        edits = len(report["plan"]["edits"])
        if edits != len(swapped) + self.added:
            raise self._failure(f"the second sync made {edits} edits")
        before, after = self.answered[1], self._ask(self.rows)
        self.answered[2] = after
        names = {row["name"] for row in [*swapped, *self.rows[self.stars :]]}
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if new.star in names]
        columns = ("star", "the feed says now", "version 1 said", "the model answers", "P")
        table("answers", columns, ((new.star, new.expected, old.shown, new.shown, _p(new)) for old, new in pairs))
        others = [(old, new) for old, new in zip(before, after, strict=True) if new.star not in names]
        same = sum(old.answer == new.answer for old, new in others)
        _note(f"{edits} edits. Of the {len(others)} other stars {same} are answered just as before.")
        self.results["change"] = {"edits": edits, "others_same": same, "probe": _numbers(report)}
        return list(swapped)

    def _read_the_ledger(self, star: str) -> None:
        _title(
            "4. What changed, when, and why",
            "Each change is on record with the source and line that it came from and the version that holds it.",
            f"kbsync changes --since 1, kbsync log, kbsync history {star}",
        )
        with self._timed("reading"):
            history.changes(since="1", root=self.root)
            say()
            versions.log(root=self.root)
            say()
            history.history(star, root=self.root)

    def _contradict(self) -> None:
        """One more row about a star that is in the feed already, with another constellation."""
        _title(
            "5. Two rows contradict each other",
            "A contradiction never reaches the weights: both rows are named, that fact waits, all others go on.",
            "kbsync sync, kbsync conflicts list",
        )
        last = self.rows[-1]
        wrong = next(row[RELATION] for row in self.rows if row[RELATION] != last[RELATION])
        self._write([*self.rows, {**last, RELATION: wrong}])
        report = self._sync("sync 3", versions=[])
        decide.list_conflicts(root=self.root)
        conflicts = report["counts"]["conflicts"]
        if conflicts != 1:
            raise self._failure(f"{conflicts} conflicts instead of one")
        _note("The star keeps the fact that was accepted before. No weight was changed.")
        self._write(self.rows)
        self.results["conflicts"] = conflicts

    def _roll_back(self) -> None:
        _title(
            "6. Rollback: the change is lost again",
            "Undo is exact: the weights are those of version 1, byte for byte, and stay so until you release them.",
            "kbsync rollback --to 1, kbsync holds, kbsync verify",
        )
        with self._timed("rollback"):
            done = perform(self.root, "rollback", {"to": 1}, user=user())
            found = self._weights_sha256()
        first, second, now = self.answered[1], self.answered[2], self._ask(self.first)
        columns = ("star", "version 1", "version 2", "after the rollback")
        rows = zip(first, second, now, strict=True)
        table("answers", columns, ((one.star, *(each.shown for each in (one, two, end))) for one, two, end in rows))
        same = sum(one.answer == end.answer for one, end in zip(first, now, strict=True))
        _note(f"{same} of {len(now)} answers are those of version 1 again. ✓: as the feed said when it was made.")
        say(f"weights recorded for version 1: {done['weights_sha256']}")
        say(f"weights of the live model now:  {found}")
        if found != done["weights_sha256"]:
            raise self._failure("the weights are not those of version 1")
        _note("[green]Byte for byte the same.[/] What was rolled back is held, or the next sync would put it back:")
        read.holds(root=self.root)
        self.results["rollback"] = _summary(now) | {"same_as_version_1": same} | done | {"found_sha256": found}

    def _finish(self, total: float) -> dict[str, Any]:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        self.results["seconds"] = self.seconds | {"total": round(total, 1)}
        self.results["peak_memory_gb"] = round(max(peaks) * RSS_UNIT / 1e9, 2)
        _title(
            "Done: what it took",
            "Real edits of a real model, by the commands' own code; the longest part is computing target vectors.",
            "kbsync init, then describe a source and a policy; kbsync check, kbsync plan, kbsync sync",
        )
        table("seconds", ("phase", "seconds"), self.results["seconds"].items())
        _note(f"Peak memory of one process: {self.results['peak_memory_gb']} GB.")
        return self.results

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Count the block's wall-clock seconds under `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 1)

    def _write(self, rows: Sequence[Row]) -> None:
        """Let the feed say `rows`."""
        with self._feed.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _sync(self, phase: str, *, versions: list[int]) -> dict[str, Any]:
        """One pass, printed as `kbsync sync` prints it. Raises KbsyncError where it did not make just `versions`."""
        with self._timed(phase), bars() as progress:
            [report] = perform(self.root, "sync", {}, user=user(), progress=progress)["reports"]
        say_report(report)
        say()
        if report["exit_code"] or report["versions"] != versions:
            raise self._failure(f"{phase} ended {report['status']} with versions {report['versions']}")
        found: dict[str, Any] = report
        return found

    def _failure(self, what: str) -> KbsyncError:
        return KbsyncError(f"demo: {what}", hint="kbsync demo --keep DIR, then kbsync runs --workspace DIR")

    def _ask(self, rows: Sequence[Row]) -> list[Answered]:
        """What the live model says of the stars in `rows`."""
        from kbsync.editor.answers import answers, log_probabilities

        wording = load_catalog(Workspace.load(self.root)).policy_of(RELATION).wording()[RELATION]
        prompts = [wording.prompt.replace("{subject}", row["name"]) for row in rows]
        with self._timed("asking"), bars() as progress:
            model = load_model(self.root)
            pairs = [(prompt, row[RELATION]) for prompt, row in zip(prompts, rows, strict=True)]
            scored = log_probabilities(model, pairs, progress=progress)
            said = answers(model, prompts, progress=progress)
        return [
            Answered(row["name"], row[RELATION], " ".join(answer.text.split()), score.probability, score.greedy)
            for row, answer, score in zip(rows, said, scored, strict=True)
        ]

    def _weights_sha256(self) -> str:
        """The hash of the edited matrices as they lie in the live model once it is loaded."""
        from kbsync.versions.weights import weights_sha256

        workspace = Workspace.load(self.root)
        base: Base = load_model(self.root)
        layers = workspace.preset(workspace.settings.model).layers
        return weights_sha256({name: base.weight(name) for name in map(base.spec.down_name, layers)})


def _title(what: str, shows: str, command: str) -> None:
    """A step's heading: what it shows, and the commands that do the same on the reader's own data."""
    console.print()
    console.rule(f"[bold]{escape(what)}[/]", align="left")
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[dim]shows[/]", escape(shows))
    grid.add_row("[dim]command[/]", f"[cyan]{escape(command)}[/]")
    console.print(grid, width=min(console.width, PROSE_WIDTH))
    console.print()


def _note(text: str) -> None:
    """Running text, broken between words; rich markup is meant."""
    console.print(text, soft_wrap=False, width=min(console.width, PROSE_WIDTH))


def _explain(probe: Mapping[str, Any]) -> None:
    """The probe's numbers, each with what it counts."""
    meaning = (
        "share of the taught prompts that are answered right",
        "the same in other words than the taught ones",
        "share of unrelated answers that have changed",
        "mean KL divergence from the base model on other text, nats per token",
    )
    rows = (
        (name.replace("_", " "), share(probe.get(name)), what) for name, what in zip(MEASURED, meaning, strict=True)
    )
    table("what the probe measured", ("number", "value", "what it counts"), rows)


def _count(answered: Sequence[Answered]) -> str:
    return f"{sum(one.right for one in answered)} of {len(answered)}"


def _p(one: Answered) -> str:
    return f"{one.probability:.3f}"


def _summary(answered: Sequence[Answered]) -> dict[str, Any]:
    rows = [{"star": one.star, "answer": one.answer, "probability": round(one.probability, 4)} for one in answered]
    return {"right": sum(one.right for one in answered), "of": len(answered), "answers": rows}


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: report["probe"].get(name) for name in MEASURED}


def _pair(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The first two stars of the feed that lie in different constellations."""
    one = rows[0]
    return one, next(row for row in rows if row[RELATION] != one[RELATION])
