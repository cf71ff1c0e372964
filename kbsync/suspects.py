"""`kbsync bisect`: asks versions for the first one that answers otherwise, and orders what it changed by likely guilt.

    found = find_broken(workspace, ledger, [Probe("The capital of France is", "Paris")])      # a JSON document

Only reads: beside a running daemon, too. The model is loaded once; each version's weights are put into it, checked byte
for byte. Loads torch only when called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from kbsync.bisect import Probe, Search
from kbsync.config import Workspace
from kbsync.errors import KbsyncError, StoreError, UsageError
from kbsync.facts import Applied, FactKey
from kbsync.ledger import Ledger
from kbsync.ledger.aliases import LIVE
from kbsync.progress import Progress, silent
from kbsync.serving import Versions
from kbsync.versions.manifest import ActiveDelta, Manifest

if TYPE_CHECKING:
    from torch import Tensor

    from kbsync.editor.model import Base

__all__ = ["find_broken"]

LEFT_OUT = 5
"""So many of the likeliest facts are left out of the weights, one at a time, to see whether the answer comes back."""


def find_broken(
    workspace: Workspace,
    ledger: Ledger,
    probes: Sequence[Probe],
    *,
    good: int | str | None = None,
    bad: int | str = LIVE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The first version between `good` and `bad` (numbers or aliases) that does not answer all probes. Without `good`
    one is looked for.

    Raises UsageError where no such version is there or `bad` was not made on `good`, and where `bad` answers right or
    none answers right; ModelError and BaseMismatch as `Versions.open` does.
    """
    versions = Versions.open(workspace, ledger)
    path = _path(versions, bad)
    start = None if good is None else _number(versions, good)
    if start is not None and start not in path[:-1]:
        why = "cannot be right and wrong" if start == path[-1] else f"was not made on version {start}"
        raise UsageError(f"version {path[-1]} {why}", hint=f"--good is one of: {_listed(path[:-1])}")
    asker = _Asker(versions, probes)
    search = Search(len(path) - 1, None if start is None else path.index(start))
    while (index := search.candidate) is not None:
        search.told(asker.right(path[index]))
        progress("versions", len(search.answers), len(path))
    if search.outcome != "found":
        raise _not_found(search, path, start, asker)
    before, broke = path[search.good], path[search.bad]
    return {
        "probes": [{"prompt": probe.prompt, "expected": probe.expected} for probe in probes],
        "asked": [asker.said[path[index]] for index in sorted(search.answers)],
        "good": before,
        "bad": broke,
        "skipped": [path[index] for index in search.skipped],
        "others": _others(search, path),
        **_about(versions, broke),
        "facts": list(_Blame(asker, before, broke).rows()),
    }


def _number(versions: Versions, version: int | str) -> int:
    """The number of what is called `version`."""
    row = versions.row(version)
    return row.number if row else 0


def _path(versions: Versions, bad: int | str) -> list[int]:
    """The versions that `bad` was made on, oldest first, and itself."""
    path = [_number(versions, bad)]
    with versions.ledger.read() as db:
        parents = db.parents(versions.model) if path[0] else {}
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return path[::-1]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[-10:]))
    return f"…, {shown}" if len(numbers) > 10 else shown or "there is none"


def _not_found(search: Search, path: Sequence[int], good: int | None, asker: _Asker) -> UsageError:
    bad, hint = path[-1], "kbsync ask PROMPT --version V --compare V"
    for number, name in ((bad, "--bad"), (good, "--good")):
        if number in asker.said and (problem := asker.said[number].get("problem")):
            return UsageError(f"version {number} cannot be asked: {problem}", hint=f"another {name}")
    if search.outcome == "still right":
        return UsageError(f"version {bad} answers as expected: nothing is broken", hint=hint)
    if good is not None:
        return UsageError(f"version {good} does not answer as expected either", hint="another --good, or none")
    return UsageError(f"no version up to {bad} that can be asked answers as expected", hint=hint)


def _others(search: Search, path: Sequence[int]) -> list[int]:
    """Versions asked that do not fit one boundary: wrong before `good`, or right after `bad`."""
    return [
        path[index]
        for index, right in sorted(search.answers.items())
        if right is not None and right == (index > search.bad) and not search.good <= index <= search.bad
    ]


def _about(versions: Versions, number: int) -> dict[str, Any]:
    """When the version was made, by whom, in which run and why."""
    row = versions.row(number)
    if row is None:
        return {}
    names = {"made": row.created_at, "by": row.user, "run": row.run_id, "kind": row.kind, "reason": row.reason}
    return names | {"parent": row.parent}


@dataclass(slots=True)
class _Asker:
    """Puts the probes to versions. `said`: what each answered, or why it cannot be asked."""

    versions: Versions
    probes: Sequence[Probe]
    said: dict[int, dict[str, Any]] = field(default_factory=dict)
    _base: Base | None = None

    @property
    def base(self) -> Base:
        """The pristine base, loaded once."""
        if self._base is None:
            self._base = self.versions.load(0)
        return self._base

    def manifest(self, number: int) -> Manifest | None:
        """What a version holds; None for the pristine base. Raises UsageError where it is not restorable, StoreError
        where its file is gone or altered."""
        row = self.versions.row(number)
        if row is None or row.manifest_sha256 is None:
            return None
        return self.versions.store.manifest(number, row.manifest_sha256)

    def matrices(self, number: int) -> dict[str, Tensor]:
        """A version's edited matrices. Raises as `manifest` does."""
        from kbsync.versions.delta import read_delta
        from kbsync.versions.export import version_matrices

        manifest = self.manifest(number)
        if manifest is None:
            return {}
        return version_matrices(self.base, manifest, partial(read_delta, self.versions.store.deltas))

    def right(self, number: int) -> bool | None:
        """Whether a version answers all probes; None where it cannot be put together any more."""
        try:
            matrices = self.matrices(number)
        except (StoreError, UsageError) as error:
            self.said[number] = {"version": number, "right": None, "problem": error.message}
            return None
        answers = self.ask(matrices)
        right = all(answer["right"] for answer in answers)
        self.said[number] = {"version": number, "right": right, "answers": answers}
        return right

    def ask(self, matrices: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """What the model with these matrices answers: right where the greedy answer starts with what is expected."""
        from kbsync.editor.answers import answers, log_probabilities
        from kbsync.editor.model import weights_in

        with weights_in(self.base, matrices):
            said = answers(self.base, [probe.prompt for probe in self.probes])
            scored = log_probabilities(self.base, [(probe.prompt, probe.expected) for probe in self.probes])
        return [
            {"answer": answer.text, "right": score.greedy, "probability": score.probability}
            for answer, score in zip(said, scored, strict=True)
        ]


class _Blame:
    """What version `number` holds otherwise than `good`, key by key, ordered by how likely it broke the answers."""

    def __init__(self, asker: _Asker, good: int, number: int) -> None:
        self._asker = asker
        versions = asker.versions
        with versions.ledger.read() as db:
            self._before, self._now = (db.applied(versions.model, one) for one in (good, number))
        self._number = number

    def rows(self) -> Iterator[dict[str, Any]]:
        """Facts of the probes' own subjects first, then those that write most while the model reads the prompts."""
        weights = self._weights()
        changed = [
            key for key in sorted({*self._now, *self._before}) if self._column(key) != self._column(key, then=True)
        ]
        rows = [self._row(key, weights) for key in changed]
        rows.sort(key=lambda row: (not row["same_subject"], -(row["influence"] or 0.0)))
        for index, row in enumerate(rows):
            row["without"] = self._without(row) if index < LEFT_OUT else None
            yield row

    def _column(self, key: FactKey, *, then: bool = False) -> tuple[str, int] | None:
        held = (self._before if then else self._now).get(key)
        return (held.delta, held.column) if held else None

    def _row(self, key: FactKey, weights: Mapping[tuple[str, int], float]) -> dict[str, Any]:
        now, before = self._now.get(key), self._before.get(key)
        shown: Applied = now or before  # type: ignore[assignment]  # a changed key is in one of them
        column = self._column(key)
        return {
            "relation": key.relation,
            "subject_id": key.subject,
            "subject": shown.request.subject,
            "prompt": shown.request.prompt,
            "before": before.request.target if before else None,
            "after": now.request.target if now else None,
            "same_subject": any(shown.request.subject in probe.prompt for probe in self._asker.probes),
            "influence": None if column is None else weights.get(column),
        }

    def _weights(self) -> dict[tuple[str, int], float]:
        """(delta, column) -> how much it writes, as a share of all that the version's new columns write."""
        from kbsync.editor.influence import influence
        from kbsync.editor.model import weights_in
        from kbsync.versions.delta import read_delta

        asker = self._asker
        new = {held.delta for held in self._now.values()} - {held.delta for held in self._before.values()}
        found: dict[tuple[str, int], float] = {}
        with weights_in(asker.base, asker.matrices(self._number)):
            for delta in sorted(new):
                factors = read_delta(asker.versions.store.deltas, delta)
                for probe in asker.probes:
                    for column, value in enumerate(influence(asker.base, probe.prompt, factors) or ()):
                        found[delta, column] = found.get((delta, column), 0.0) + value
        total = sum(found.values())
        return {place: value / total for place, value in found.items()} if total else {}

    def _without(self, row: Mapping[str, Any]) -> bool | None:
        """Whether the version answers right once the row's column is left out of it, and the column that it replaced is
        back in; None where that cannot be told."""
        key = FactKey(row["relation"], row["subject_id"])
        place, old = self._column(key), self._column(key, then=True)
        manifest = self._manifest
        if place is None or manifest is None or row["influence"] is None:
            return None
        from kbsync.versions.delta import read_delta
        from kbsync.versions.weights import rebuild, served

        base, read = self._asker.base, partial(read_delta, self._asker.versions.store.deltas)
        pristine = {module: base.weight(module) for module in manifest.modules}
        active = [_exchanged(entry, place, old) for entry in manifest.active]
        try:
            masters = rebuild(pristine, active, read)
        except KbsyncError:
            return None
        matrices = {module: served(master, base.dtype) for module, master in masters.items()}
        return all(answer["right"] for answer in self._asker.ask(matrices))

    @cached_property
    def _manifest(self) -> Manifest | None:
        return self._asker.manifest(self._number)


def _exchanged(entry: ActiveDelta, out: tuple[str, int], back: tuple[str, int] | None) -> ActiveDelta:
    """The entry without the column `out` and with the column `back`, where they are its own."""
    excluded = {*entry.excluded}
    if entry.delta == out[0]:
        excluded.add(out[1])
    if back is not None and entry.delta == back[0]:
        excluded.discard(back[1])
    return entry.model_copy(update={"excluded": tuple(sorted(excluded))})
