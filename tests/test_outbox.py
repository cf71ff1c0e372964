"""Delivery of notices: at least once on each channel, whatever the network and the process do in between."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kbsync.cli import app
from kbsync.config import Workspace
from kbsync.errors import ConfigError, LedgerError, UsageError
from kbsync.hook import run
from kbsync.ledger import Ledger
from kbsync.ledger.notices import DeliveryRow, NoticeWriter
from kbsync.notify import outbox
from kbsync.notify.outbox import FIRST, GIVE_UP, JITTER, LONGEST, Outbox, deliver, enroll, next_attempt, try_channel
from tests.faultserver import FaultServer, answer
from tests.ledgers import opened
from tests.test_mail import Postbox, serving
from tests.test_webhook import SECRET

NOW = datetime(2026, 7, 1, tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    """A receiver."""
    with FaultServer() as running:
        yield running


class Office:
    """A workspace with channels, and its ledger."""

    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.root, self.ledger = root, ledger

    @property
    def workspace(self) -> Workspace:
        """As kbsync.yaml is now."""
        return Workspace.load(self.root)

    def channels(self, *lines: str) -> None:
        """What kbsync.yaml says of channels, and that it is in force."""
        listed = "".join(f"    - {line}\n" for line in lines)
        (self.root / "kbsync.yaml").write_text(f"model: none\nnotify:\n  channels:\n{listed}")
        enroll(self.workspace, self.ledger)

    def tell(self, thread: str = "stale sky") -> None:
        """A notice is written."""
        with self.ledger.write() as db:
            assert db.notify("stale", thread, f"{thread} is late")

    def deliver(self) -> int:
        """One round."""
        return deliver(self.workspace, self.ledger)

    def over(self, thread: str = "stale sky") -> None:
        """What was told is over."""
        with self.ledger.write() as db:
            assert db.recovered(thread, f"{thread} is in time")

    def said(self, name: str) -> list[str]:
        """The lines of a file that commands write."""
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []

    def states(self) -> dict[str, DeliveryRow]:
        """How far the newest notice came, by channel."""
        with self.ledger.read() as db:
            newest = db.notices(1)[0].id
            return {row.channel: row for row in db.deliveries([newest]).get(newest, [])}

    def everything(self) -> dict[int, list[DeliveryRow]]:
        """How far every notice came."""
        with self.ledger.read() as db:
            return db.deliveries([notice.id for notice in db.notices(None)])

    def due_now(self) -> None:
        """The time of the next attempt has come, of every notice."""
        with self.ledger.write() as db:
            for row in itertools.chain(*self.everything().values()):
                if row.next_at is not None:
                    db.note_delivery(replace(row, next_at=NOW))


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    """A workspace without channels; SECRET is in the environment."""
    monkeypatch.setenv("SECRET", SECRET)
    (tmp_path / "kbsync.yaml").write_text("model: none\n")
    (tmp_path / "data").mkdir()
    with Ledger.open(Workspace.load(tmp_path).ledger_url) as ledger:
        yield Office(tmp_path, ledger)


PATIENCE = 20.0
"""Seconds."""


def until(done: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def crashing(root: str) -> None:
    """Deliver in a process that may end."""
    workspace = Workspace.load(Path(root))
    with Ledger.open(workspace.ledger_url) as ledger:
        deliver(workspace, ledger)


def unnoted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full when something has been noted so often: first that an attempt begins, then how it ended."""
    note, calls = NoticeWriter.note_delivery, itertools.count()

    def noted(self: NoticeWriter, row: DeliveryRow) -> None:
        if next(calls) >= after:
            raise LedgerError("the disk is full")
        note(self, row)

    monkeypatch.setattr(NoticeWriter, "note_delivery", noted)


def hook(name: str, url: str, **more: str) -> str:
    """A webhook as kbsync.yaml has it."""
    extra = "".join(f", {key}: {value}" for key, value in more.items())
    return f'{{name: {name}, type: webhook, url: "{url}", secret: "${{SECRET}}"{extra}}}'


def test_a_notice_goes_out_once_on_every_channel(office: Office, server: FaultServer) -> None:
    office.channels(hook("one", server.on("/one", answer())), hook("two", server.on("/two", answer())))
    office.tell()
    assert office.deliver() == 2
    assert office.deliver() == 0
    assert sorted(request.path for request in server.requests) == ["/one", "/two"]
    assert all(row.delivered_at for row in office.states().values())


def test_a_dead_channel_keeps_no_other_one_waiting_and_is_tried_later(office: Office, server: FaultServer) -> None:
    office.channels(hook("dead", "http://127.0.0.1:9/x"), hook("ops", server.on("/ops", answer())))
    for thread in ("one", "two"):
        office.tell(thread)
    assert office.deliver() == 2
    states = office.states()
    assert states["ops"].delivered_at
    assert (states["dead"].attempts, states["dead"].error) == (0, ""), "the first one failed: the second waits its turn"
    assert office.deliver() == 0


def test_a_notice_that_was_written_while_the_network_was_down_goes_out_later_with_its_own_time(
    office: Office, server: FaultServer
) -> None:
    office.channels(hook("ops", server.on("/ops", answer(status=503))))
    office.tell()
    assert office.deliver() == 0
    [state] = office.states().values()
    assert (state.attempts, state.error, state.given_up) == (1, "127.0.0.1: status 503", False)
    assert state.next_at is not None
    assert office.deliver() == 0, "it is not due yet"
    server.on("/ops", answer())
    office.due_now()
    assert office.deliver() == 1
    first, second = (json.loads(request.body) for request in server.requests)
    assert first == second


def test_after_a_crash_between_sending_and_recording_it_is_sent_again_with_the_same_id(office: Office) -> None:
    """The command itself kills the process that runs it."""
    office.channels("{name: ops, type: command, run: 'echo $KBSYNC_NOTICE >> got; [ -e up ] || kill -9 $PPID'}")
    office.tell()
    code = "import sys; from tests.test_outbox import crashing; crashing(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", code, str(office.root)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (office.root / "up").touch()
    [state] = office.states().values()
    assert (state.attempts, state.error) == (1, outbox.BEGUN)
    office.due_now()
    assert office.deliver() == 1
    first, second = office.said("got")
    assert first == second


def test_what_is_sent_but_cannot_be_noted_comes_again_no_faster_than_what_fails(
    office: Office, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.channels(hook("ops", server.on("/ops", answer())))
    office.tell()
    unnoted(monkeypatch, after=1)
    for _ in range(4):
        assert office.deliver() == 0
    assert len(server.requests) == 1
    [state] = office.states().values()
    assert state.next_at is not None
    assert FIRST - timedelta(seconds=5) < state.next_at - datetime.now(UTC) <= FIRST


def test_a_ledger_that_cannot_be_written_sends_nothing(
    office: Office, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.channels(hook("ops", server.on("/ops", answer())))
    office.tell()
    unnoted(monkeypatch, after=0)
    for _ in range(4):
        assert office.deliver() == 0
    assert server.requests == []


def test_a_slow_channel_keeps_no_other_one_waiting_and_is_left_alone_while_it_is_busy(office: Office) -> None:
    office.channels(
        "{name: slow, type: command, run: 'echo $KBSYNC_THREAD >> begun; until [ -e go ]; do sleep 0.02; done'}",
        "{name: quick, type: command, run: 'echo $KBSYNC_THREAD >> quick'}",
    )
    outbox_ = Outbox()
    for thread in ("one", "two"):
        office.tell(thread)
        outbox_.deliver(office.workspace, office.ledger)
        until(lambda thread=thread: thread in office.said("quick"))  # type: ignore[misc]
    until(lambda: bool(office.said("begun")))
    assert office.said("begun") == ["one"]
    assert not outbox_.wait(0)
    (office.root / "go").touch()
    assert outbox_.wait(PATIENCE)
    assert (office.said("begun"), office.said("quick")) == (["one", "two"], ["one", "two"])
    outbox_.stop()


def test_an_outbox_that_was_stopped_writes_nothing_and_the_next_one_sends_what_was_on_its_way(office: Office) -> None:
    office.channels(
        "{name: slow, type: command, run: 'echo $KBSYNC_NOTICE >> begun; until [ -e go ]; do sleep 0.02; done'}"
    )
    office.tell("one")
    office.tell("two")
    stopped = Outbox()
    stopped.deliver(office.workspace, office.ledger)
    until(lambda: bool(office.said("begun")))
    stopped.stop(0.1)
    before = office.everything()
    (office.root / "go").touch()
    assert stopped.wait(PATIENCE)
    stopped.deliver(office.workspace, office.ledger)
    assert stopped.wait(PATIENCE)
    assert office.everything() == before
    office.due_now()
    assert office.deliver() == 2
    first, *later = office.said("begun")
    assert first in later
    assert len(set(later)) == 2


def test_a_command_that_still_runs_is_killed_as_its_outbox_stops(office: Office) -> None:
    """It comes again, and no other command is kept from running."""
    office.channels("{name: slow, type: command, run: 'echo $$ > begun; sleep 300'}")
    office.tell()
    stopped = Outbox()
    stopped.deliver(office.workspace, office.ledger)
    until(lambda: bool(office.said("begun")))
    stopped.stop(0.1)
    assert stopped.wait(PATIENCE)
    assert not Path(f"/proc/{office.said('begun')[0]}").exists()
    [state] = office.states().values()
    assert state.next_at is not None
    assert run("true", folder=office.root, variables={}, keep=(), seconds=PATIENCE) is None


def test_while_a_receiver_wants_to_be_left_alone_no_other_notice_goes_there(
    office: Office, server: FaultServer
) -> None:
    office.channels(hook("ops", server.on("/ops", answer(status=429, headers={"Retry-After": "3600"}))))
    for thread in ("one", "two", "three"):
        office.tell(thread)
        assert office.deliver() == 0
    assert len(server.requests) == 1
    server.on("/ops", answer())
    office.due_now()
    assert office.deliver() == 3


def test_waits_grow_with_what_fails_on_a_channel_however_many_notices_wait(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    office.channels("{name: dead, type: command, run: 'exit 1'}")
    for number in range(5):
        office.tell(f"thread {number}")
    waits = []
    for _ in range(5):
        assert office.deliver() == 0
        rows = itertools.chain(*office.everything().values())
        waits.append(max(row.next_at for row in rows if row.next_at) - datetime.now(UTC))
        office.due_now()
    assert all(later > 1.8 * earlier for earlier, later in itertools.pairwise(waits))


def test_that_a_trouble_is_over_never_overtakes_the_trouble(office: Office) -> None:
    """Also where it was over before it was ever sent: both go out, in order."""
    office.channels("{name: ops, type: command, run: 'test -e up && echo $KBSYNC_KIND $KBSYNC_THREAD >> got'}")
    office.tell()
    assert office.deliver() == 0
    office.over()
    (office.root / "up").touch()
    assert office.deliver() == 0
    office.due_now()
    assert office.deliver() == 2
    assert office.said("got") == ["stale stale sky", "recovered stale sky"]


def test_a_notice_that_never_comes_through_is_in_no_other_ones_way(office: Office) -> None:
    office.channels("{name: ops, type: command, run: 'test $KBSYNC_THREAD != odd && echo $KBSYNC_THREAD >> got'}")
    office.tell("odd")
    assert office.deliver() == 0
    for thread in ("one", "two"):
        office.tell(thread)
    office.over("odd")
    office.due_now()
    assert office.deliver() == 2
    office.tell("three")
    assert office.deliver() == 1
    assert office.said("got") == ["one", "two", "three"]


def test_a_test_of_a_channel_loses_nothing_and_what_waits_for_its_next_attempt_is_due(
    office: Office, server: FaultServer
) -> None:
    office.channels(hook("ops", server.on("/ops", answer(status=500))))
    office.tell("one")
    office.deliver()
    office.tell("two")
    server.on("/ops", answer())
    try_channel(office.workspace, office.ledger, "ops")
    assert office.deliver() == 2
    threads = [json.loads(request.body)["thread"] for request in server.requests]
    assert threads == ["one", "test", "two", "one"]


def test_a_receiver_that_is_gone_stops_its_channel_until_a_test_of_it_succeeds(
    office: Office, server: FaultServer
) -> None:
    office.channels(hook("ops", server.on("/ops", answer(status=410))))
    office.tell("first")
    office.deliver()
    office.tell("second")
    office.deliver()
    assert len(server.requests) == 1
    output = CliRunner().invoke(app, ["notices", "-w", str(office.root)]).output
    assert "channel ops is stopped" in output
    with pytest.raises(UsageError, match="status 410"):
        try_channel(office.workspace, office.ledger, "ops")
    server.on("/ops", answer())
    try_channel(office.workspace, office.ledger, "ops")
    office.tell("third")
    assert office.deliver() == 1
    assert [json.loads(request.body)["kind"] for request in server.requests] == ["stale", "test", "test", "stale"]


def test_a_notice_is_given_up_after_three_days_and_the_list_says_so(
    office: Office, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.channels(hook("ops", server.on("/ops", answer(status=500))))
    office.tell()
    monkeypatch.setattr(outbox, "GIVE_UP", timedelta(0))
    office.deliver()
    [state] = office.states().values()
    assert state.given_up
    office.deliver()
    assert len(server.requests) == 1
    [shown] = json.loads(CliRunner().invoke(app, ["notices", "--json", "-w", str(office.root)]).output)["notices"]
    assert shown["deliveries"][0]["state"] == "given up after 1 attempt"


def test_a_channel_that_came_later_gets_no_old_notices(office: Office, server: FaultServer) -> None:
    office.tell("old")
    office.channels(hook("ops", server.on("/ops", answer())))
    assert office.deliver() == 0
    office.tell("new")
    assert office.deliver() == 1


def test_a_missing_secret_is_told_and_keeps_the_notice_waiting(
    office: Office, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.channels(hook("ops", server.on("/ops", answer())))
    office.tell()
    monkeypatch.delenv("SECRET")
    assert office.deliver() == 0
    [state] = office.states().values()
    assert "SECRET is not set" in state.error
    assert not state.given_up


def test_a_command_gets_the_message_on_stdin_and_in_its_environment_without_our_secrets(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.channels("{name: script, type: command, run: 'cat > got.json; env > got.env'}")
    with office.ledger.write() as db:
        db.notify("held", "held sky", "run 3 waits; `touch no` $(touch no)", policy="sky")
    assert office.deliver() == 1
    message = json.loads((office.root / "got.json").read_text())
    environment = dict(line.partition("=")[::2] for line in (office.root / "got.env").read_text().splitlines())
    assert message["message"] == environment["KBSYNC_MESSAGE"] == "run 3 waits; `touch no` $(touch no)"
    assert (environment["KBSYNC_KIND"], environment["KBSYNC_POLICY"], environment["KBSYNC_RUN"]) == ("held", "sky", "")
    assert not (office.root / "no").exists()
    assert SECRET not in environment.values()


def test_a_command_that_fails_or_hangs_is_tried_again(office: Office) -> None:
    office.channels(
        "{name: fails, type: command, run: 'echo no disk >&2; exit 3'}",
        "{name: hangs, type: command, run: 'sleep 60', timeout: 0.1}",
    )
    office.tell()
    assert office.deliver() == 0
    errors = {name: state.error for name, state in office.states().items()}
    assert errors["fails"] == "the command failed: status 3: no disk"
    assert errors["hangs"] == "the command failed: did not end within 0.1 s"


def test_no_secret_reaches_the_ledger_the_log_or_the_list(
    office: Office, server: FaultServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The address of a chat service is one, a token that a command prints, and the signing key."""
    monkeypatch.setenv("CHAT_URL", server.on("/canary-chat-token", answer(status=500)))
    monkeypatch.setenv("PAGER_TOKEN", "canary-pager-token")
    office.channels(hook("chat", "${CHAT_URL}"), "{name: pager, type: command, run: 'echo canary-pager-token; exit 1'}")
    (office.root / "sources").mkdir()
    from kbsync.references import noted

    noted("${PAGER_TOKEN}")
    office.tell()
    with caplog.at_level(logging.DEBUG):
        office.deliver()
    listed = CliRunner().invoke(app, ["notices", "--all", "--json", "-w", str(office.root)]).output
    told = listed + caplog.text + (office.root / "data" / "ledger.db").read_bytes().decode("latin-1")
    assert "status 500" in told
    for canary in ("canary-chat-token", "canary-pager-token", SECRET):
        assert canary not in told


def test_who_was_refused_a_mail_that_others_got_is_in_the_list_and_nobody_gets_it_twice(office: Office) -> None:
    box = Postbox()
    box.unknown = {"bob@x.org": "550 nobody"}
    with serving(box) as port:
        office.channels(
            f"{{name: mail, type: email, host: 127.0.0.1, port: {port}, security: none, from: a@b.c,"
            " to: [ada@x.org, bob@x.org]}"
        )
        office.tell()
        assert office.deliver() == 1
        office.due_now()
        assert office.deliver() == 0
        with pytest.raises(UsageError, match=r"channel mail: 127.0.0.1: refused bob@x.org \(550\)"):
            try_channel(office.workspace, office.ledger, "mail")
    assert [envelope.rcpt_tos for envelope in box.envelopes] == [["ada@x.org"]] * 2
    shown = CliRunner().invoke(app, ["notices", "-w", str(office.root)], env={"COLUMNS": "200"}).output
    assert "mail: delivered (127.0.0.1: refused bob@x.org (550))" in shown


def test_a_test_message_arrives_from_the_command_line(office: Office, server: FaultServer) -> None:
    office.channels(hook("ops", server.on("/ops", answer())))
    runner = CliRunner()
    (office.root / "sources").mkdir()
    (office.root / "policies").mkdir()
    done = runner.invoke(app, ["notices", "test", "ops", "-w", str(office.root)])
    assert done.exit_code == 0, done.output
    assert "delivered" in done.output
    other = runner.invoke(app, ["notices", "test", "other", "-w", str(office.root)])
    assert isinstance(other.exception, UsageError)
    assert other.exception.hint == "notify: in kbsync.yaml has ops"


@pytest.mark.parametrize(
    ("line", "key", "problem"),
    [
        ("{name: ops, type: webhook, url: https://x.org}", "notify.channels.0.secret", "is missing"),
        ("{name: ops, type: pigeon}", "notify.channels.0", "does not match any of the expected tags"),
        (
            "{name: ops, type: webhook, url: https://x.org, secret: canary}",
            "notify.channels.0.secret",
            "must be ${NAME}",
        ),
        ("{name: ops, type: command, run: x, colour: red}", "notify.channels.0.colour", "is not a known key"),
        ("{name: ops, type: email, host: m, from: a@b.c, to: [d]}", "notify.channels.0.to.0", "should match"),
        ("{name: ops, type: email, host: m, security: none, from: a@b.c, to: [d@e.f]}", "0", "on this machine only"),
        ("{name: ops, type: email, host: m, user: u, from: a@b.c, to: [d@e.f]}", "0", "go together"),
        ("{name: ops, type: command, run: x, on: [birthday]}", "notify.channels.0.on.0", "should be 'held'"),
    ],
)
def test_what_is_wrong_with_a_channel_is_named_with_file_line_and_key(
    office: Office, line: str, key: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        office.channels(line)
    assert "kbsync.yaml:4" in caught.value.message
    assert key in caught.value.message
    assert problem in caught.value.message
    assert "canary" not in caught.value.message


def test_two_channels_have_two_names(office: Office) -> None:
    with pytest.raises(ConfigError, match="two channels have the name ops"):
        office.channels("{name: ops, type: command, run: x}", "{name: ops, type: command, run: y}")


@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), st.booleans())))
def test_in_each_thread_troubles_and_their_ends_take_turns(
    tmp_path_factory: pytest.TempPathFactory, story: list[tuple[str, bool]]
) -> None:
    """Whatever happens in which order: nobody is told twice of one thing, and never first that it is over."""
    with opened(tmp_path_factory.mktemp("story")) as ledger:
        with ledger.write() as db:
            for thread, ends in story:
                db.recovered(thread, "over") if ends else db.notify("stale", thread, "late")
        with ledger.read() as db:
            told = list(reversed(db.notices(None)))
    for thread in ("one", "two"):
        found = [notice.kind for notice in told if notice.thread == thread]
        assert found == ["stale", "recovered"] * (len(found) // 2) + ["stale"] * (len(found) % 2)


@given(st.integers(1, 60), st.floats(0, 1), st.none() | st.floats(0, 1e9))
def test_waits_grow_from_ten_seconds_to_six_hours_and_respect_the_receivers_wish(
    attempts: int, chance: float, wish: float | None
) -> None:
    found = next_attempt(attempts, NOW, NOW, retry_after=wish, chance=chance)
    assert found is not None
    wait = found - NOW
    assert FIRST * (1 - JITTER) <= wait <= LONGEST * (1 + JITTER)
    if wish is None:
        middle = next_attempt(attempts, NOW, NOW)
        assert middle is not None
        assert middle - NOW == min(FIRST * 2 ** min(attempts - 1, 20), LONGEST)
    else:
        assert wait >= min(timedelta(seconds=wish), LONGEST) * (1 - JITTER)


def test_three_days_of_attempts_are_few() -> None:
    """Some twenty, so that a receiver that is away for a weekend is not flooded."""
    now, attempts = NOW, 0
    while (again := next_attempt(attempts + 1, NOW, now)) is not None:
        now, attempts = again, attempts + 1
    assert now - NOW >= GIVE_UP
    assert 15 <= attempts <= 30
