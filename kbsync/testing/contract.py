"""The connector contract, one test a rule. Each failure is an AssertionError that says the rule and what was seen."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

from pydantic import ValidationError

from kbsync.connectors import Connector, known_types, make_connector
from kbsync.errors import SourceBlocked, SourceError, SourceInvalid, SourceUnavailable
from kbsync.facts import Snapshot
from kbsync.policy import Source

__all__ = ["SECRET", "ConnectorContract", "Said"]

SECRET = "kbsync-canary-7c1f0e"  # noqa: S105 (a planted one, to be looked for)
"""What `arrange_secret` plants, and no connector may ever show."""
NAME, RELATION, SPACE = "contract", "says", "contract_ids"
LONGEST_MESSAGE = 2_000
PIPE_SECONDS = 30.0
"""A connector that still waits for a pipe after so long waits for ever."""
_KINDS = (SourceUnavailable, SourceBlocked, SourceInvalid)


@dataclass(frozen=True, slots=True)
class Said:
    """One row that a source is to say. An empty text: the row has none."""

    id: str
    subject: str
    object: str


ROWS = (Said("1", "Vega", "Lyra"), Said("2", "Deneb", "Cygnus"), Said("3", "Ægir Ørsted", "Łódź"))


class ConnectorContract:
    """Subclass it, name the `type`, and write `arrange` and `ruin`; the other methods are for what a connector has.

    A source of kbsync's own common keys is made around the keys that `arrange` returns. Ids may be changed on the way
    (`1` may become `Q1`), labels may not.
    """

    type: ClassVar[str]
    """What a source file says as `type:`."""
    path_keys: ClassVar[Sequence[str]] = ()
    """The options that name a local file or folder: none may lead out of the allowed folders."""

    def arrange(self, folder: Path, rows: Sequence[Said]) -> Mapping[str, Any]:
        """Make a source in `folder` that says exactly these rows, and return its options. May be called again, with
        other rows: then the same source says those."""
        raise NotImplementedError

    def ruin(self, folder: Path) -> None:
        """Make what `arrange` made unreadable: delete it, stop the server, write garbage."""
        raise NotImplementedError

    def arrange_secret(self, folder: Path) -> Mapping[str, Any] | None:
        """Options of a source that cannot be read and that SECRET is part of (in the environment variable
        KBSYNC_CONTRACT_SECRET, or in a file); None: the connector takes no secrets."""
        del folder
        return None

    def connector(self, folder: Path, options: Mapping[str, Any], **common: Any) -> Connector:
        """What reads the source; `common` are keys of every source file."""
        declared = {"source": NAME, "type": self.type, "relation": RELATION, "ids": SPACE, **common, **options}
        return make_connector(Source.model_validate(declared), folder=folder)

    # -- what is said

    def test_it_is_found_by_its_type(self, tmp_path: Path) -> None:
        """The package registers it under `kbsync.connectors`."""
        _must(self.type in known_types(), f"no entry point {self.type} in kbsync.connectors", known_types())
        found = self.connector(tmp_path, self.arrange(tmp_path, ROWS))
        _must(all(isinstance(text, str) for text in found.warnings), "`warnings` are texts", found.warnings)
        _must(callable(found.fetch), "it has a `fetch`", found)

    def test_every_row_is_a_claim(self, tmp_path: Path) -> None:
        """Labels come through as they are, ids lie in the declared space, source and relation are the declared ones."""
        snapshot = self._fetched(tmp_path, ROWS)
        found = {(claim.subject.label, claim.object.label) for claim in snapshot.claims}
        _must(found == {(row.subject, row.object) for row in ROWS}, "each row is a claim, its labels unchanged", found)
        _must((snapshot.source, snapshot.relation) == (NAME, RELATION), "the snapshot is of the source", snapshot)
        for claim in snapshot.claims:
            _must(claim.subject.id.startswith(f"{SPACE}:"), "a subject's id is in the space of `ids`", claim)
            _must(bool(claim.origin), "a claim says where it stands: a line, a statement", claim)

    def test_values_stay_text(self, tmp_path: Path) -> None:
        """Nothing is taken for a number, a date, a truth value or a null."""
        rows = [Said(str(n), f"case {n}", text) for n, text in enumerate(("NO", "007", "1.10", "1e3", "12:30", "null"))]
        found = {claim.object.label for claim in self._fetched(tmp_path, rows).claims}
        _must(found == {row.object for row in rows}, "values are the text that the source has", found)

    def test_the_same_source_says_the_same(self, tmp_path: Path) -> None:
        """Another connector over it gives the same claims under the same ids, and the same body hash."""
        options = self.arrange(tmp_path, ROWS)
        one, two = (self.connector(tmp_path, options).fetch(None) for _ in range(2))
        _must(_set(one) == _set(two), "ids and labels are the same each time", _set(one) ^ _set(two))
        _must(
            one.provenance.body_sha256 == two.provenance.body_sha256, "the same body has the same hash", one.provenance
        )

    def test_ids_do_not_depend_on_order_or_label(self, tmp_path: Path) -> None:
        """A row that moves keeps its id; so does one that is only written differently."""
        before = {claim.subject.label: claim.subject.id for claim in self._fetched(tmp_path, ROWS).claims}
        _must(len(set(before.values())) == len(ROWS), "each subject has an id of its own", before)
        moved = [*ROWS[::-1][:-1], Said(ROWS[0].id, "Wega", ROWS[0].object)]
        after = {claim.subject.label: claim.subject.id for claim in self._fetched(tmp_path, moved).claims}
        wanted = {("Wega" if label == "Vega" else label): id_ for label, id_ in before.items()}
        _must(after == wanted, "an id follows from the row's id alone", after)

    def test_rows_can_be_read_again(self, tmp_path: Path) -> None:
        """The ledger goes through a snapshot's content more than once, and later than the fetch."""
        snapshot = self._fetched(tmp_path, ROWS)
        first = list(snapshot.content)
        self.ruin(tmp_path)
        _must(
            list(snapshot.content) == first, "each iteration gives the same, whatever has become of the source", first
        )
        _must(len(first) >= len(ROWS), "the first iteration gives all rows", first)

    def test_nothing_is_decided(self, tmp_path: Path) -> None:
        """Two objects of one subject are two claims: which of them counts is not the connector's to say."""
        rows = [*ROWS, Said(ROWS[0].id, ROWS[0].subject, "Aquila")]
        found = {claim.object.label for claim in self._fetched(tmp_path, rows).claims if claim.subject.label == "Vega"}
        _must(found == {"Lyra", "Aquila"}, "both claims are given", found)

    # -- what cannot be used

    def test_a_bad_row_keeps_its_subject(self, tmp_path: Path) -> None:
        """A row without an object waits in quarantine by its subject's id, so that nothing of it is withdrawn."""
        whole = {claim.subject.label: claim.subject.id for claim in self._fetched(tmp_path, ROWS).claims}
        snapshot = self._fetched(tmp_path, [*ROWS[:-1], Said(ROWS[-1].id, ROWS[-1].subject, "")])
        _must(len(snapshot.claims) == len(ROWS) - 1, "the good rows are read", snapshot.claims)
        _must(len(snapshot.quarantined) == 1, "the bad row is in quarantine", snapshot.quarantined)
        bad = snapshot.quarantined[0]
        _must(bad.subject_id == whole[ROWS[-1].subject], "a bad row names the subject that it is about", bad)
        _must(bool(bad.reason and bad.origin), "a bad row says why, and where it stands", bad)
        _must(snapshot.complete, "the snapshot is complete: every subject of the source is known", snapshot)

    def test_a_row_of_nobody_makes_it_incomplete(self, tmp_path: Path) -> None:
        """Nobody knows which subject such a row was about: nothing may be withdrawn on account of it."""
        snapshot = self._fetched(tmp_path, [*ROWS, Said("", "", "Lyra")])
        _must(len(snapshot.claims) == len(ROWS), "the good rows are read", snapshot.claims)
        _must(not snapshot.complete, "a snapshot with a row that names no subject is not complete", snapshot)

    def test_complete_and_partial_are_as_declared(self, tmp_path: Path) -> None:
        """`snapshot: partial` is never complete: in it, absence means nothing."""
        options = self.arrange(tmp_path, ROWS)
        _must(self.connector(tmp_path, options).fetch(None).complete, "a whole answer is complete", options)
        partial = self.connector(tmp_path, options, snapshot="partial").fetch(None)
        _must(not partial.complete, "`snapshot: partial` is not complete", partial)

    # -- provenance

    def test_the_provenance_is_filled(self, tmp_path: Path) -> None:
        """Where the rows are from, when, with what status, and the hash of the body."""
        before = datetime.now(UTC)
        one = self._fetched(tmp_path, ROWS).provenance
        _must(bool(one.location), "it says where", one)
        _must(one.fetched_at.tzinfo is not None, "it says when, with a time zone", one)
        _must(abs(one.fetched_at - before) < timedelta(hours=1), "it says when, by the clock", one)
        _must(len(one.body_sha256) == 64 and set(one.body_sha256) <= set("0123456789abcdef"), "it has a sha256", one)
        _must(one.status == 200, "a whole answer has status 200", one)
        other = self._fetched(tmp_path, ROWS[:-1]).provenance
        _must(other.body_sha256 != one.body_sha256, "another body has another hash", other)

    def test_not_modified_is_said_only_to_who_knows(self, tmp_path: Path) -> None:
        """Without a previous fetch there is nothing that could be unmodified; and what has changed is not."""
        first = self._fetched(tmp_path, ROWS)
        _must(not first.not_modified, "a first fetch is never `not_modified`", first)
        again = self.connector(tmp_path, self.arrange(tmp_path, ROWS)).fetch(first.provenance)
        if again.not_modified:
            _must(list(again.content) == [], "`not_modified` comes without rows", again)
            _must(again.provenance.body_sha256 == first.provenance.body_sha256, "it keeps the body's hash", again)
        changed = self.connector(tmp_path, self.arrange(tmp_path, ROWS[:-1])).fetch(first.provenance)
        _must(not changed.not_modified, "what has changed is not `not_modified`", changed)
        _must(len(changed.claims) == len(ROWS) - 1, "what has changed is read", changed.claims)

    # -- what it may not do

    def test_unknown_options_are_refused(self, tmp_path: Path) -> None:
        """A misspelt key of a source file is an error, not silence."""
        options = {**self.arrange(tmp_path, ROWS), "kbsync_no_such_key": "x"}
        with _refused("an unknown option is refused", ValidationError):
            self.connector(tmp_path, options)

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        """A fetch leaves the folder of the source as it was."""
        found = self.connector(tmp_path, self.arrange(tmp_path, ROWS))
        before = _files(tmp_path)
        list(found.fetch(None).content)
        _must(
            _files(tmp_path) == before, "no file is made, changed or removed", _files(tmp_path).keys() ^ before.keys()
        )

    def test_a_source_that_cannot_be_read_is_one_of_three_errors(self, tmp_path: Path) -> None:
        """SourceUnavailable, SourceBlocked or SourceInvalid, naming the source, on one line: never a traceback."""
        found = self.connector(tmp_path, self.arrange(tmp_path, ROWS))
        self.ruin(tmp_path)
        error = _failure(found)
        _must(isinstance(error, _KINDS), f"the error is one of {[kind.__name__ for kind in _KINDS]}", repr(error))
        text = str(error)
        _must(NAME in text and "\n" not in text, "the error names the source, on one line", text)
        _must(len(text) <= LONGEST_MESSAGE, "the error is short", len(text))

    def test_no_file_outside_the_allowed_folders_is_read(self, tmp_path: Path) -> None:
        """Neither by `..`, nor by an absolute path, nor by a link."""
        inside, outside = tmp_path / "sources", tmp_path / "outside"
        inside.mkdir()
        outside.mkdir()
        self.arrange(outside, ROWS)
        options = self.arrange(inside, ROWS)
        if not self.path_keys:
            raise SkipTest("no `path_keys`; ends when the options that name local files are listed there")
        for key in self.path_keys:
            self._stays_inside(inside, outside, options, key)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        """Only regular files are read: a named pipe would hold up everything until somebody writes to it."""
        if not self.path_keys:
            raise SkipTest("no `path_keys`; ends when the options that name local files are listed there")
        options = self.arrange(tmp_path, ROWS)
        os.mkfifo(tmp_path / "pipe")
        for key in self.path_keys:
            ended = list[str]()
            reading = threading.Thread(target=self._read_pipe, args=(tmp_path, options, key, ended), daemon=True)
            reading.start()
            reading.join(PIPE_SECONDS)
            _must(ended == ["refused"], f"{key}: a pipe is refused", ended or "it waits")

    def _read_pipe(self, folder: Path, options: Mapping[str, Any], key: str, ended: list[str]) -> None:
        name = str(options[key])
        changed = {**options, key: name.replace(Path(name).name, "pipe") if "://" in name else "pipe"}
        try:
            self.connector(folder, changed).fetch(None)
            ended.append("read")
        except (ValidationError, SourceError):
            ended.append("refused")

    def _stays_inside(self, inside: Path, outside: Path, options: Mapping[str, Any], key: str) -> None:
        _must(key in options, f"`path_keys` has {key}, which `arrange` does not return", options)
        name = str(options[key])
        (inside / "link").symlink_to(outside)
        ways = (
            f"../outside/{Path(name).name}",
            str(outside / Path(name).name),
            f"link/{Path(name).name}",
            "/etc/hostname",
        )
        for way in ways:
            changed = {**options, key: name.replace(Path(name).name, way) if "://" in name else way}
            with _refused(f"{key}: {way} is refused", ValidationError, SourceError):
                self.connector(inside, changed).fetch(None)
        (inside / "link").unlink()

    def test_no_secret_is_shown(self, tmp_path: Path) -> None:
        """Not in an error, its hint or causes, not in a warning, nor in what the connector is printed as."""
        os.environ["KBSYNC_CONTRACT_SECRET"] = SECRET
        try:
            options = self.arrange_secret(tmp_path)
            if options is None:
                raise SkipTest("no `arrange_secret`; ends when the connector takes secrets and it is written")
            found = self.connector(tmp_path, options)
            shown = [*found.warnings, repr(found), repr(vars(found) if hasattr(found, "__dict__") else "")]
            shown += _chain(_failure(found))
        finally:
            del os.environ["KBSYNC_CONTRACT_SECRET"]
        leaks = [text[:200].replace(SECRET, "<the secret>") for text in shown if SECRET in text]
        _must(not leaks, "no secret is shown", leaks)

    def _fetched(self, folder: Path, rows: Sequence[Said]) -> Snapshot:
        return self.connector(folder, self.arrange(folder, rows)).fetch(None)


def _must(holds: bool, rule: str, seen: object) -> None:
    if not holds:
        raise AssertionError(f"connector contract: {rule}; seen: {seen!r}")


@contextmanager
def _refused(rule: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"connector contract: {rule}; nothing was raised")


def _failure(connector: Connector) -> Exception:
    """What reading a source that cannot be read raises."""
    try:
        list(connector.fetch(None).content)
    except Exception as error:
        return error
    raise AssertionError("connector contract: a source that cannot be read raises an error; nothing was raised")


def _chain(error: BaseException | None) -> list[str]:
    """All that an error and what a log would print after it say."""
    found: list[str] = []
    while error is not None:
        found += [str(error), repr(error), str(getattr(error, "hint", ""))]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _set(snapshot: Snapshot) -> set[tuple[str, str, str, str]]:
    return {(one.subject.id, one.subject.label, one.object.id, one.object.label) for one in snapshot.claims}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
