"""A fact that cannot be placed in its tokens is held or left out, and never stops the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbsync.bench.data import counterfact_records
from kbsync.editor.model import Base
from kbsync.errors import UsageError
from kbsync.facts import FactKey
from kbsync.rebase import rebase
from kbsync.reconcile import Reconciler
from tests.labs import bench, tiny_dataset, tiny_laboratory, tiny_options
from tests.workspaces import workspace

STARS = {"Vega": "Orion", "Betelgeuse": "Lyra"}
LONG = {"z" * 150: "Paris"}
"""More tokens than the tiny model reads."""
REASON = "the model reads 128"


pytestmark = pytest.mark.usefixtures("one_cache")


def evidence(reconciler: Reconciler) -> dict[FactKey, str]:
    """Why facts are held."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        return {key: str(hold) for key, hold in db.holds(line.model).items()}


def live(reconciler: Reconciler) -> set[str]:
    """The subjects of the live facts."""
    line = reconciler.line()
    with reconciler.ledger.read() as db:
        return {one.request.subject for one in db.applied(line.model, db.head(line.model)).values()}


def test_a_sync_publishes_the_others_and_holds_the_fact_with_the_reason(tmp_path: Path) -> None:
    made = workspace(tmp_path, STARS | LONG)
    with made.open() as reconciler:
        assert reconciler.sync()[0].versions == [1]
        assert live(reconciler) == set(STARS)
        ((key, why),) = evidence(reconciler).items()
        assert key == FactKey("constellation", "stars:zzzzz")
        assert REASON in why
        made.feed(STARS | LONG | {"Deneb": "Paris"})
        assert reconciler.sync()[0].versions == [2]
        assert live(reconciler) == {*STARS, "Deneb"}


def test_a_sync_of_such_a_fact_alone_changes_nothing(tmp_path: Path) -> None:
    with workspace(tmp_path, LONG).open() as reconciler:
        reconciler.sync()
        assert live(reconciler) == set()
        assert REASON in next(iter(evidence(reconciler).values()))


def test_it_is_not_asked_of_the_base_either(tmp_path: Path) -> None:
    """`skip_known` scores what it asks, and what cannot be placed may have nothing to score."""
    made = workspace(tmp_path, STARS | LONG)
    made.policy("    retract: keep\n    skip_known: true")
    with made.open() as reconciler:
        reconciler.sync()
        assert live(reconciler) == set(STARS)


def test_a_rebase_goes_on_without_it(tmp_path: Path) -> None:
    made = workspace(tmp_path, STARS | LONG)
    with made.open() as reconciler:
        reconciler.sync()
        done = rebase(reconciler.line(), reconciler.judge, reconciler.controls())
        assert done["facts"] == len(STARS)


def test_a_rebase_takes_out_what_can_no_longer_be_placed_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the value that a fact had nor its new one: another base may read shorter texts."""
    old, changed = "z" * 60, "y" * 60
    made = workspace(tmp_path, STARS | {old: "Paris", changed: "Rome"})
    with made.open() as reconciler:
        reconciler.sync()
        assert live(reconciler) == {*STARS, old, changed}
        made.feed(STARS | {old: "Paris", changed: "French"})
        made.strategy(mode="rebase")
    monkeypatch.setattr(Base, "max_tokens", property(lambda _: 60))
    with made.open() as reconciler:
        reconciler.sync()
        assert live(reconciler) == set(STARS)
        assert all("the model reads 60" in why for why in evidence(reconciler).values())


def with_one_more(folder: Path) -> None:
    """The tiny data set, begun with a record whose subject is twice in its prompt."""
    path = tiny_dataset(folder)
    records = json.loads(path.read_text(encoding="utf-8"))
    first = json.loads(json.dumps(records[0]))
    first["requested_rewrite"] |= {"prompt": "Where is {}", "subject": "is"}
    path.write_text(json.dumps([first, *records]), encoding="utf-8")


def test_a_laboratory_leaves_it_out_and_says_so(tmp_path: Path) -> None:
    lab = tiny_laboratory(tmp_path)
    options = tiny_options(tmp_path)
    with_one_more(tmp_path)
    records = counterfact_records(options[1])
    chosen = lab.placeable(records, 3)
    assert [record.request.subject for record in chosen] == ["Vega", "Deneb", "Rigel"]
    assert ["more than once" in reason for reason in lab.left_out.values()] == [True]
    with pytest.raises(UsageError, match=r"12 facts can be edited, 13 were asked for; 1 cannot: .* more than once"):
        lab.placeable(records, 13)


def test_a_benchmark_takes_the_next_fact_and_counts_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tiny_options(tmp_path)
    with_one_more(tmp_path)
    assert bench("scaling", *options, "--facts", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == 1
    assert [point["facts"] for point in found["points"]] == [2]
