"""The catalog: sources and policies that fit together, and one named error for everything that does not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbsync.catalog import Catalog, load_catalog
from kbsync.config import Workspace
from kbsync.errors import ConfigError, UsageError
from kbsync.policy import Schedule
from kbsync.schedule import trigger

SOURCE = """\
source: stars
type: csv
location: stars.csv
columns: {subject: name, object: constellation}
ids: hip
relation: constellation
"""
POLICY = """\
policy: astronomy
sources: [stars]
schedule: {every: 6h}
relations:
  constellation:
    prompt: "{subject} belongs to the constellation of"
"""

Load = Callable[..., Catalog]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a workspace with one good source and one good policy, and the files given over them."""

    def load_with(**files: str) -> Catalog:
        (tmp_path / "kbsync.yaml").write_text("model: smollm2-135m\n", encoding="utf-8")
        for name, text in {"sources/stars": SOURCE, "policies/astronomy": POLICY, **files}.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (tmp_path / "sources" / "stars.csv").write_text("name,constellation\nVega,Lyra\n", encoding="utf-8")
        return load_catalog(Workspace.load(tmp_path))

    return load_with


def with_relation(extra: str) -> str:
    return POLICY + "".join(f"    {line}\n" for line in extra.splitlines())


def test_a_good_workspace_has_its_sources_and_policies_by_name(load: Load) -> None:
    """And nothing to warn of."""
    catalog = load()
    assert list(catalog.sources) == ["stars"]
    assert catalog.policy("astronomy") is catalog.policy_of("constellation")
    assert catalog.sources_of(catalog.policy("astronomy")) == [catalog.sources["stars"]]
    assert catalog.check() == []


def test_a_connector_is_ready_to_be_read(load: Load) -> None:
    """Relative to the source's own file."""
    (claim,) = load().connector("stars").fetch(None).claims
    assert (claim.subject.label, claim.object.label) == ("Vega", "Lyra")


def test_a_workspace_without_sources_and_policies_is_empty_not_wrong(tmp_path: Path) -> None:
    """It is told that nothing happens."""
    (tmp_path / "kbsync.yaml").write_text("model: m\n", encoding="utf-8")
    (warning,) = load_catalog(Workspace.load(tmp_path)).check()
    assert "nothing is kept fresh" in warning


def test_an_unknown_policy_or_relation_is_a_usage_error_with_the_nearest_name(load: Load) -> None:
    """For commands that take one."""
    catalog = load()
    with pytest.raises(UsageError) as caught:
        catalog.policy("astronmy")
    assert caught.value.hint == "did you mean astronomy?"
    with pytest.raises(UsageError) as caught:
        catalog.policy_of("constelation")
    assert caught.value.hint == "did you mean constellation?"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        (SOURCE.replace("csv", "cvs", 1), ":2: type:", "no connector of this type; known: csv, jsonl, sparql, sql"),
        (SOURCE + "delimeter: ;\n", ":7: delimeter:", "not a known key"),
        (SOURCE.replace("location: stars.csv\n", ""), "location:", "is missing"),
        (SOURCE.replace("stars.csv", "../../etc/passwd"), ":3: location:", "outside the folders"),
        (SOURCE.replace("object: constellation", "objekt: constellation"), ":4: columns.objekt:", "not a known key"),
        (
            SOURCE.replace("object: constellation", 'object: {column: c, match: "("}'),
            ":4: columns.object.match:",
            "is no pattern of RE2",
        ),
        (
            SOURCE.replace("object: constellation", "object: {column: c, lookup: no.csv}"),
            ":4: columns.object.lookup:",
            "no.csv cannot be read",
        ),
        (SOURCE.replace("object: constellation", "object: {colum: c}"), ":4: columns.object", "is not a known key"),
        (SOURCE + "minisign: {public_key: RWQ}\n", ":7: minisign.public_key:", "the public key"),
        (SOURCE.replace("source: stars", "source: Stars!"), ":1: source:", "(got 'Stars!')"),
        (SOURCE.replace("source: stars", "source: other"), "sources.0:", "no source stars"),
        (SOURCE.replace("relation: constellation", "relation: color"), "sources.0:", "gives the relation color"),
    ],
)
def test_a_wrong_source_is_refused(load: Load, text: str, place: str, problem: str) -> None:
    """File, line and key, the connector's own keys included."""
    with pytest.raises(ConfigError) as caught:
        load(sources__stars=text)
    assert place in caught.value.message
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        (POLICY.replace("[stars]", "[star]"), ":2: sources.0:", "no source star"),
        (POLICY.replace("[stars]", "[stars, stars]"), ":2: sources.1:", "named twice"),
        (POLICY.replace("[stars]", "[]"), ":2: sources:", "at least 1 item"),
        (POLICY + "gard: {}\n", ":7: gard:", "not a known key"),
        (POLICY + "guard: {max_changed: lots}\n", ":7: guard.max_changed:", "(got 'lots')"),
        (POLICY + "precedence: quorum(2)\n", ":7: precedence:", "can never be reached"),
        (with_relation("prefer: [star]"), "relations.constellation.prefer.0:", "no source star of this policy gives"),
        (with_relation('subject: "{state}"'), "relations.constellation.subject:", "needs {subject} exactly once"),
        (
            with_relation('subject: "{subject} {A}"'),
            "relations.constellation.subject:",
            "has braces that are no {name}",
        ),
        (POLICY + "confirm: {hours: -1}\n", ":7: confirm.hours:", "greater than or equal to 0"),
        (POLICY + "precedence: best\n", ":7: precedence:", "must be order, newest or quorum(n)"),
        (POLICY.replace("{every: 6h}", "{every: 0}"), ":3: schedule:", "1s or more"),
        (POLICY.replace("{every: 6h}", "{}"), ":3: schedule:", "either `every` or `cron`"),
        (POLICY.replace("{every: 6h}", '{cron: "0 5 * *"}'), ":3: schedule:", "five fields"),
        (POLICY.replace("{every: 6h}", '{cron: "0 25 * * *"}'), ":3: schedule:", "25"),
        (POLICY.replace("{every: 6h}", '{cron: "0 5 30 feb *"}'), ":3: schedule:", "never comes"),
        (POLICY.replace("{every: 6h}", '{cron: "0 5 1 * mon"}'), ":3: schedule:", "cannot restrict both"),
        (POLICY.replace("{every: 6h}", '{cron: "0 5 * * 8"}'), ":3: schedule:", "no day of the week 8"),
        (POLICY.replace("6h", "6h, timezone: Mars/Base"), ":3: schedule:", "no time zone Mars/Base"),
        (with_relation("controls: absent.txt"), ":7: relations.constellation.controls:", "no file"),
        (with_relation("controls: ../../x"), ":7: relations.constellation.controls:", "outside the folders"),
        (
            with_relation('inverse: {relation: constellation, prompt: "{subject} holds"}'),
            ":7: relations.constellation.inverse:",
            "already kept by",
        ),
        (
            with_relation('inverse:\n  relation: stars\n  prompt: "{subject} holds"\n  controls: absent.txt'),
            ":10: relations.constellation.inverse.controls:",
            "no file",
        ),
    ],
)
def test_a_wrong_policy_is_refused(load: Load, text: str, place: str, problem: str) -> None:
    """File, line and key."""
    with pytest.raises(ConfigError) as caught:
        load(policies__astronomy=text)
    assert "policies/astronomy.yaml" in caught.value.message
    assert place in caught.value.message
    assert problem in caught.value.message


def test_a_relation_belongs_to_one_policy(load: Load) -> None:
    """The second one is told of the first."""
    with pytest.raises(ConfigError, match=r"second\.yaml:5: relations\.constellation: .* kept by .*astronomy\.yaml"):
        load(policies__second=POLICY.replace("policy: astronomy", "policy: second"))


@pytest.mark.parametrize(("name", "text"), [("sources__twin", SOURCE), ("policies__twin", POLICY)])
def test_a_name_is_declared_once(load: Load, name: str, text: str) -> None:
    """Two files with one name would shadow each other."""
    with pytest.raises(ConfigError, match=r"twin\.yaml:1: (source|policy): .* is declared in "):
        load(**{name: text})


def test_sources_of_one_relation_share_ids_or_match_labels(load: Load) -> None:
    """Otherwise the same star would be two subjects."""
    second = SOURCE.replace("source: stars", "source: more-stars")
    policy = POLICY.replace("[stars]", "[stars, more-stars]")
    with pytest.raises(ConfigError, match=r"astronomy\.yaml:2: sources: .* share no ids \(hip, hd\)") as caught:
        load(sources__more=second.replace("ids: hip", "ids: hd"), policies__astronomy=policy)
    assert "match: label" in caught.value.hint
    load(sources__more=second, policies__astronomy=policy)
    matched = {"sources__stars": SOURCE + "match: label\n", "sources__more": second + "match: label\n"}
    load(**matched, policies__astronomy=policy)


def test_controls_are_found_beside_the_policy(load: Load, tmp_path: Path) -> None:
    """A path relative to the file that names it; None means the shipped prompts."""
    assert load().controls("constellation") is None
    (tmp_path / "policies" / "faint.txt").write_text("Sulafat\n", encoding="utf-8")
    catalog = load(policies__astronomy=with_relation("controls: faint.txt"))
    assert catalog.controls("constellation") == tmp_path / "policies" / "faint.txt"


def test_check_warns_of_what_looks_like_a_mistake(load: Load, tmp_path: Path) -> None:
    """A source that nobody reads, a contact that is nobody's, a relation that nothing feeds, a file that is absent."""
    unused = SOURCE.replace("source: stars", "source: unused").replace("stars.csv", "absent.csv")
    unused += 'user_agent: "kbsync/1.0 (mailto:ops@example.org)"\n'
    policy = POLICY + '  color:\n    prompt: "The color of {subject} is"\n'
    warnings = load(sources__unused=unused, policies__astronomy=policy).check()
    assert any("unused.yaml:1: source: no policy names this source" in text for text in warnings)
    assert any("unused.yaml:7: user_agent:" in text for text in warnings)
    assert any("absent.csv does not exist" in text for text in warnings)
    assert any("astronomy.yaml:7: relations.color: no source" in text for text in warnings)
    assert len(warnings) == 4


@pytest.mark.parametrize(("deadline", "warned"), [("29m", False), ("30m", True)])
def test_check_warns_of_a_fetch_that_the_daemon_would_cancel_before_its_deadline(
    load: Load, deadline: str, warned: bool
) -> None:
    feed = SOURCE.replace("stars.csv", "https://stars.test/stars.csv") + f"deadline: {deadline}\n"
    warnings = load(sources__stars=feed, policies__astronomy=POLICY).check()
    assert any("deadline: kbsync.yaml's `stall` (1800 s)" in text for text in warnings) is warned


def test_check_warns_of_a_prompt_that_ends_with_a_space(load: Load) -> None:
    """The space belongs to the object's first token."""
    (warning,) = load(policies__astronomy=POLICY.replace('constellation of"', 'constellation of "')).check()
    assert "astronomy.yaml:6: relations.constellation.prompt: ends with a space" in warning


def test_check_warns_of_objects_that_can_never_be_equal(load: Load) -> None:
    """A quorum over two feeds compares their objects by id."""
    second = SOURCE.replace("source: stars", "source: more-stars")
    policy = POLICY.replace("[stars]", "[stars, more-stars]") + "precedence: quorum(2)\n"
    (warning,) = load(sources__more=second, policies__astronomy=policy).check()
    assert "by different ids (more-stars, stars)" in warning
    same = "object_ids: constellations\n"
    catalog = load(sources__stars=SOURCE + same, sources__more=second + same, policies__astronomy=policy)
    assert catalog.check() == []


def next_days(cron: str, count: int) -> list[str]:
    """The days of the week on which `cron` fires next."""
    fires, at = trigger(Schedule(cron=cron)), datetime(2026, 1, 1, tzinfo=UTC)
    found = []
    for _ in range(count):
        at = fires.get_next_fire_time(None, at)
        found.append(f"{at:%a}")
        at += timedelta(minutes=1)
    return found


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("0", ["Sun"]),
        ("7", ["Sun"]),
        ("sun", ["Sun"]),
        ("MON-FRI", ["Mon", "Tue", "Wed", "Thu", "Fri"]),
        ("5-7", ["Fri", "Sat", "Sun"]),
        ("fri-mon", ["Mon", "Fri", "Sat", "Sun"]),
        ("*/2", ["Tue", "Thu", "Sat", "Sun"]),
        ("1-5/2,6", ["Mon", "Wed", "Fri", "Sat"]),
        ("*", ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]),
    ],
)
def test_days_of_the_week_are_those_of_crontab(field: str, days: list[str]) -> None:
    """0 and 7 are Sunday, ranges may go over the end of the week."""
    week = next_days(f"0 5 * * {field}", len(days))
    assert sorted(week) == sorted(days)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 7))
def test_a_range_of_days_is_walked_as_a_clock(first: int, last: int, step: int) -> None:
    """From the first day to the last, over Sunday where need be, every so many days."""
    names = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
    expected = {names[(first + walked) % 7] for walked in range(0, (last - first) % 7 + 1, step)}
    assert set(next_days(f"0 5 * * {first}-{last}/{step}", len(expected))) == expected


def test_an_interval_is_an_interval() -> None:
    """With its jitter, in seconds."""
    found = trigger(Schedule.model_validate({"every": "6h", "jitter": "5m"}))
    assert (found.interval, found.jitter) == (timedelta(hours=6), 300)
