"""`make audit`: known vulnerabilities of what is deployed (deploy/requirements.lock), and its bill of materials.

    python -m tests.audit          # says what was asked and what was not; writes dist/sbom.cdx.json

pip-audit asks the advisory service of PyPI, then OSV. A package that a service does not know was not audited, and where
neither can be reached nothing was: that is said, and is no failure, so that the check works without a network. A known
vulnerability is one. The bill of materials (CycloneDX 1.6, https://cyclonedx.org) is made from the lock alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "deploy" / "requirements.lock"
SBOM = ROOT / "dist" / "sbom.cdx.json"
SERVICES = ("pypi", "osv")
SECONDS = 300

_PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?==([^\s;\\]+)", re.MULTILINE)

Pin = tuple[str, str]
"""Name, in its one spelling, and version. A package has several where Python's version or the system decides."""


def pins(lock: str) -> set[Pin]:
    """What a lock file pins."""
    return {(spelled(name), version) for name, version in _PIN.findall(lock)}


def spelled(name: str) -> str:
    """A package's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one service said: how many packages it judged, which not and why, and what it found (`name 1.0: CVE-…`)."""

    judged: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    found: Sequence[str] = ()

    @property
    def whole(self) -> bool:
        """Whether every package was judged."""
        return bool(self.judged) and not self.skipped


def verdict(report: str, failure: str) -> Verdict:
    """What pip-audit's JSON says; where it is none, nothing was judged, because of `failure`."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Verdict(skipped={"all": failure or "pip-audit gave no report"})
    return Verdict(
        judged=sum("skip_reason" not in one for one in packages),
        skipped={one["name"]: one["skip_reason"] for one in packages if "skip_reason" in one},
        found=[f"{one['name']} {one['version']}: {vuln['id']}" for one in packages for vuln in one.get("vulns", ())],
    )


def ask(service: str) -> Verdict:
    """Let pip-audit ask one advisory service about every pin; nothing is installed or resolved."""
    command = ["pip_audit", "--requirement", str(LOCK), "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--vulnerability-service", service, "--progress-spinner", "off"]
    done = _tool(command)
    words = done.stderr.strip().splitlines()
    return verdict(done.stdout, words[-1] if words else "")


def bill_of_materials() -> int:
    """Write the bill of materials, checked against CycloneDX's schema; how many components it has."""
    SBOM.parent.mkdir(exist_ok=True)
    command = ["cyclonedx_py", "requirements", str(LOCK), "--pyproject", str(ROOT / "pyproject.toml")]
    done = _tool([*command, "--validate", "--output-reproducible", "--of", "JSON", "--output-file", str(SBOM)])
    if done.returncode:
        sys.exit(f"no bill of materials: {done.stderr.strip()}")
    bill = json.loads(SBOM.read_text(encoding="utf-8"))
    named = {(spelled(one["name"]), one["version"]) for one in bill["components"]}
    if named != pins(LOCK.read_text(encoding="utf-8")):
        sys.exit("the bill of materials is not what the lock says")
    return len(named)


def _tool(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *command], capture_output=True, text=True, timeout=SECONDS, check=False
    )


def said(verdicts: Mapping[str, Verdict]) -> tuple[list[str], bool]:
    """What to print about the services that were asked, and whether it is a failure."""
    lines = []
    for service, one in verdicts.items():
        lines += [f"{service}: {finding}" for finding in one.found]
        if one.whole:
            lines.append(f"audit: {service} judged all {one.judged} packages, {len(one.found)} known vulnerabilities")
    bad = any(one.found for one in verdicts.values())
    if not any(one.whole for one in verdicts.values()):
        lines.append("audit: NOT DONE, or not wholly:")
        for service, one in verdicts.items():
            name, reason = next(iter(one.skipped.items()), ("all", "no answer"))
            lines.append(f"  {service}: {one.judged} packages judged, {len(one.skipped)} not; {name}: {reason}")
        lines.append("  run `make audit` where pypi.org or api.osv.dev can be reached")
    return lines, bad


def main() -> None:
    """Ask until one service has judged every package; then make the bill of materials."""
    verdicts: dict[str, Verdict] = {}
    for service in SERVICES:
        verdicts[service] = ask(service)
        if verdicts[service].whole:
            break
    lines, bad = said(verdicts)
    print("\n".join(lines))  # noqa: T201 - a command
    print(f"bill of materials: {bill_of_materials()} components, valid, {SBOM.relative_to(ROOT)}")  # noqa: T201
    sys.exit(bad)


if __name__ == "__main__":
    main()
