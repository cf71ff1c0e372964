"""What is deployed is pinned, is what pyproject.toml allows, and an audit that was not done says so."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.audit import LOCK, ROOT, Verdict, pins, said, spelled, verdict

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = LOCK.read_text(encoding="utf-8")
DEPLOYED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["postgres"]]


@pytest.mark.parametrize("wanted", DEPLOYED)
def test_the_lock_has_only_versions_that_pyproject_allows(wanted: str) -> None:
    requirement = Requirement(wanted)
    versions = [version for name, version in pins(TEXT) if name == spelled(requirement.name)]
    assert versions, f"make lock: {requirement.name} is not in {LOCK.name}"
    assert all(map(requirement.specifier.contains, versions)), f"make lock: {versions} is outside {wanted}"


def test_every_line_of_the_lock_is_a_pin_with_hashes() -> None:
    """No address, no path, no option that would take a package from anywhere else."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")))
    assert len(blocks) == len(pins(TEXT)) > len(DEPLOYED)
    for block in blocks:
        first, *hashes = [line.strip().removesuffix("\\").strip() for line in block.strip().splitlines()]
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.!+-]+( ;.*)?", first), first
        assert hashes, f"{first} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first


def test_an_audit_that_asked_nobody_is_said_and_is_no_failure() -> None:
    """The service does not answer; or it answers that it knows none of them."""
    unreachable = verdict("", "ConnectionError: api.osv.dev")
    unknown = verdict(json.dumps({"dependencies": [{"name": "torch", "skip_reason": "not found"}]}), "")
    lines, bad = said({"pypi": unknown, "osv": unreachable})
    assert not bad
    assert "NOT DONE" in lines[0]
    assert "torch: not found" in lines[1]
    assert "ConnectionError: api.osv.dev" in lines[2]


def test_one_package_that_was_not_judged_is_said_too() -> None:
    half = {"dependencies": [{"name": "torch", "version": "2.9", "vulns": []}, {"name": "x", "skip_reason": "local"}]}
    lines, bad = said({"pypi": verdict(json.dumps(half), "")})
    assert not bad
    assert "NOT DONE, or not wholly" in lines[0]


def test_a_known_vulnerability_is_a_failure_and_is_named() -> None:
    report = {"dependencies": [{"name": "torch", "version": "2.5", "vulns": [{"id": "CVE-2025-32434"}]}]}
    lines, bad = said({"pypi": verdict(json.dumps(report), "")})
    assert bad
    assert lines == ["pypi: torch 2.5: CVE-2025-32434", "audit: pypi judged all 1 packages, 1 known vulnerabilities"]


def test_a_clean_audit_says_how_many_were_judged() -> None:
    assert said({"pypi": Verdict(judged=97)}) == (
        ["audit: pypi judged all 97 packages, 0 known vulnerabilities"],
        False,
    )
