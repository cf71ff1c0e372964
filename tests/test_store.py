"""Manifests, HEAD, what verify finds and what gc removes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from kbsync.errors import StoreError
from kbsync.facts import EditRequest, FactKey
from kbsync.versions.files import TEMPORARY, sha256_of
from kbsync.versions.manifest import ActiveDelta, Manifest, ManifestFact
from kbsync.versions.store import Problem, VersionRecord, VersionStore, named
from tests.deltas import manifest, random_delta, stored

A, B, C = "a" * 64, "b" * 64, "c" * 64
REQUEST = EditRequest(
    FactKey("constellation", "hip:27989"), "Betelgeuse belongs to", "Betelgeuse", "Orion", ("β is in",)
)


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """An empty store of model `m-0`."""
    return VersionStore(tmp_path / "data", "m-0")


def _published(store: VersionStore) -> list[VersionRecord]:
    """Versions 0, 1 and 2 as a ledger would record them, with their files and HEAD on 2."""
    (one, two), _ = stored(store.deltas, random_delta(2), random_delta(1, seed=5))
    first = (ActiveDelta(delta=one),)
    second = (ActiveDelta(delta=one, excluded=(1,)), ActiveDelta(delta=two))
    records = [VersionRecord(0, None, ())]
    for number, active in ((1, first), (2, second)):
        digest = store.write_manifest(manifest(number=number, parent=number - 1, active=active))
        records.append(VersionRecord(number, digest, active))
    store.write_head(2)
    return records


# --- manifests ----------------------------------------------------------------------------------------------------


def test_a_manifest_reads_back_as_it_was_written() -> None:
    """As JSON with sorted keys, `except` for the excluded columns, and text as it is."""
    fact = ManifestFact(
        delta=A, column=0, request=REQUEST.to_json(), object_id="label:orion", source="stars", origin="line 2"
    )
    whole = manifest(
        active=(ActiveDelta(delta=A, excluded=(3, 1, 3), corrections=B), ActiveDelta(delta=C)),
        facts=(fact,),
        settings={"layers": [4, 5]},
        probe={"efficacy": 1.0},
        numerics={"residual": {"m": 1e-12}},
        libraries={"torch": "2.13"},
        run_id=7,
    )
    data = whole.to_bytes()
    value = json.loads(data)
    assert Manifest.from_bytes(data) == whole
    assert Manifest.from_bytes(data).to_bytes() == data
    assert list(value) == sorted(value)
    assert value["active"][0] == {"delta": A, "except": [1, 3], "corrections": B}
    assert value["created_at"] == "2026-01-02T03:04:05+00:00"
    assert "β is in" in data.decode()
    assert Manifest.from_bytes(data).facts[0].edit_request == REQUEST


@pytest.mark.parametrize(
    "fields",
    [
        {"weights_sha256": "A" * 64},
        {"base_fingerprint": "short"},
        {"created_at": datetime(2026, 1, 1)},  # noqa: DTZ001 - a naive time, which is what must be refused
        {"dtype": "int8"},
        {"kind": "other"},
        {"number": -1},
        {"format": 2},
        {"surprise": 1},
    ],
)
def test_a_manifest_takes_nothing_that_it_cannot_mean(fields: dict[str, object]) -> None:
    """Bad hashes, naive times, unknown kinds, dtypes, formats and keys."""
    with pytest.raises(ValidationError):
        manifest(**fields)


@pytest.mark.parametrize(
    "fields", [{"delta": "../x"}, {"delta": A, "excluded": (-1,)}, {"delta": A, "corrections": ""}]
)
def test_an_active_delta_takes_nothing_that_it_cannot_mean(fields: dict[str, object]) -> None:
    """What names no file and no column."""
    with pytest.raises(ValidationError):
        ActiveDelta.model_validate(fields)


def test_numbers_that_json_lacks_are_refused() -> None:
    """A NaN in a report would make a file that other readers cannot read."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest(numerics={"residual": float("nan")}).to_bytes()


def test_a_manifest_lies_under_its_number_and_is_checked_against_the_ledger(store: VersionStore) -> None:
    """The sha256 that is returned is the one to record."""
    whole = manifest(number=7)
    digest = store.write_manifest(whole)
    path = store.data / "versions" / "m-0" / "000007.json"
    assert (store.manifest_path(7), sha256_of(path)) == (path, digest)
    assert store.manifest(7, digest) == store.manifest(7, None) == whole
    path.write_bytes(path.read_bytes().replace(b"edit", b"base"))
    with pytest.raises(StoreError, match=r"000007\.json: altered") as error:
        store.manifest(7, digest)
    assert "backup" in error.value.hint


def test_a_manifest_that_was_never_published_is_replaced(store: VersionStore) -> None:
    """After a crash before publication the next version takes the same number."""
    store.write_manifest(manifest(run_id=1))
    digest = store.write_manifest(manifest(run_id=2))
    assert store.manifest(1, digest).run_id == 2


def test_a_missing_or_unreadable_manifest_is_named(store: VersionStore) -> None:
    """With the field that is wrong."""
    with pytest.raises(StoreError, match=r"000001\.json: cannot be read: No such file"):
        store.manifest(1, None)
    store.write_manifest(manifest())
    path = store.manifest_path(1)
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(
        StoreError, match=r"000001\.json: not a manifest that this kbsync reads: format: Input should be 1"
    ):
        store.manifest(1, None)
    path.write_bytes(b"\0\0\0")
    with pytest.raises(StoreError, match="not a manifest"):
        store.manifest(1, None)


def test_a_manifest_of_another_model_or_number_is_refused(store: VersionStore) -> None:
    """On writing, and where a file was put in another's place."""
    with pytest.raises(StoreError, match="does not belong to m-0"):
        store.write_manifest(manifest(model="other"))
    store.write_manifest(manifest(number=1))
    store.manifest_path(1).rename(store.manifest_path(2))
    with pytest.raises(StoreError, match="is the manifest of version 1 of m-0"):
        store.manifest(2, None)


# --- HEAD ---------------------------------------------------------------------------------------------------------


def test_head_is_the_last_number_written(store: VersionStore) -> None:
    """And none before the first."""
    assert store.head() is None
    for number in (0, 12, 3):
        store.write_head(number)
        assert store.head() == number
    assert (store.folder / "HEAD").read_bytes() == b"3\n"


@pytest.mark.parametrize("content", [b"", b"-1", b"1 2", b"\xff\0"])
def test_a_damaged_head_is_named(store: VersionStore, content: bytes) -> None:
    """The ledger has it: the next start writes it anew."""
    store.write_head(1)
    (store.folder / "HEAD").write_bytes(content)
    with pytest.raises(StoreError, match=r"HEAD: .* is no version number"):
        store.head()


# --- verify -------------------------------------------------------------------------------------------------------


def test_a_whole_store_has_no_problems(store: VersionStore) -> None:
    """Version 0 needs no files."""
    records = _published(store)
    assert store.verify(records, head=2) == []
    store.require(2, records[2].manifest_sha256)
    store.require(0, None)


def test_verify_names_every_file_that_is_wrong_and_the_versions_that_need_it(store: VersionStore) -> None:
    """A flipped byte in a delta, a missing delta, an altered manifest, another HEAD."""
    records = _published(store)
    damaged, missing = store.delta_path(records[1].active[0].delta), store.delta_path(records[2].active[1].delta)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    store.manifest_path(1).write_bytes(b"{}")
    store.write_head(1)
    found = {problem.path: problem for problem in store.verify(records, head=2)}
    assert set(found) == {damaged, missing, store.manifest_path(1), store.folder / "HEAD"}
    assert found[damaged].versions == (1, 2)
    assert str(found[damaged]).startswith(f"{damaged}: damaged, its sha256 is now")
    assert str(found[missing]) == f"{missing}: No such file or directory (needed by version 2)"
    assert found[store.manifest_path(1)].reason.startswith("altered")
    assert found[store.folder / "HEAD"] == Problem(store.folder / "HEAD", "names version 1, the ledger version 2")


def test_verify_compares_manifest_and_ledger(store: VersionStore) -> None:
    """A manifest that is whole but lists other deltas than the ledger; a HEAD that cannot be read."""
    first, second, third = _published(store)
    other = VersionRecord(second.number, second.manifest_sha256, third.active)
    (store.folder / "HEAD").write_bytes(b"?")
    problems = store.verify([first, other, third], head=2)
    assert [problem.path.name for problem in problems] == ["000001.json", "HEAD"]
    assert "not those of the ledger" in problems[0].reason


def test_a_version_whose_files_are_not_whole_cannot_be_rolled_back_to(store: VersionStore) -> None:
    """The hint is to take another one."""
    records = _published(store)
    store.delta_path(records[2].active[1].delta).unlink()
    store.require(1, records[1].manifest_sha256)
    with pytest.raises(StoreError, match="No such file") as error:
        store.require(2, records[2].manifest_sha256)
    assert "another version" in error.value.hint


# --- gc -----------------------------------------------------------------------------------------------------------


def test_orphans_are_old_files_that_no_version_names_and_nothing_else(store: VersionStore) -> None:
    """Corrections count as named; young files may belong to an edit in progress; other models' manifests stay."""
    records = _published(store)
    (orphan, young, correction), _ = stored(store.deltas, *(random_delta(1, seed=seed) for seed in (50, 60, 70)))
    active = (*records[2].active, ActiveDelta(delta=records[1].active[0].delta, corrections=correction))
    store.write_manifest(manifest(number=3))
    other = VersionStore(store.data, "other")
    other.write_manifest(manifest(model="other", number=3))
    old = time.time() - 7200
    for path in (*store.deltas.iterdir(), *store.folder.iterdir(), *other.folder.iterdir()):
        if path.stem != young:
            os.utime(path, (old, old))
    live, numbers = named((*records[1].active, *active)), {0, 1, 2}
    wanted = sorted([store.delta_path(orphan), store.manifest_path(3)])
    assert store.orphans(live, numbers) == wanted
    assert all(path.exists() for path in wanted)
    for path in wanted:
        path.unlink()
    assert store.verify(records, head=2) == []
    assert store.orphans(live, numbers, older_than=timedelta(0)) == [store.delta_path(young)]
    assert other.manifest_path(3).exists()


def test_an_old_orphan_that_an_edit_makes_again_is_young_again(store: VersionStore) -> None:
    """Else gc could take it between the edit and its publication."""
    (sha256,), _ = stored(store.deltas, random_delta(1))
    old = time.time() - 7200
    os.utime(store.delta_path(sha256), (old, old))
    assert store.orphans(set(), {0}) == [store.delta_path(sha256)]
    stored(store.deltas, random_delta(1))
    assert store.orphans(set(), {0}) == []


def test_an_empty_store_has_no_orphans(store: VersionStore) -> None:
    """Folders that are not there yet are no error."""
    assert store.orphans(set(), set()) == []


def test_what_a_killed_process_left_half_written_is_an_orphan_too(store: VersionStore) -> None:
    """Once it is old; a young one may still be being written."""
    store.deltas.mkdir(parents=True)
    half = store.deltas / f"{TEMPORARY}x.safetensors"
    half.touch()
    assert store.orphans(set(), set()) == []
    os.utime(half, (0, 0))
    assert store.orphans(set(), set()) == [half]


def test_the_store_loads_no_torch() -> None:
    """So that ledger queries and `--help` stay quick."""
    code = "import sys, kbsync.versions.store, kbsync.versions.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_times_are_kept_in_utc() -> None:
    """Whatever zone they are given in, they mean the same moment after reading."""
    here = datetime(2026, 1, 1, 12, tzinfo=UTC).astimezone()
    assert Manifest.from_bytes(manifest(created_at=here).to_bytes()).created_at == here
