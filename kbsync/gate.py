"""The gate: is what the probe measured good enough to publish, and by which terms was that judged? Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kbsync.facts import EditRequest, digest_of
from kbsync.policy import Gate, Policy

__all__ = ["Terms", "shortfalls", "shortfalls_by_policy"]

AT_LEAST = ("efficacy", "paraphrase")
AT_MOST = ("specificity_drop", "drift")


@dataclass(frozen=True, slots=True)
class Terms:
    """What it depends on, beside its facts, whether a version of a model is published: the digest of its preset, the
    strategy, each policy's gate. What was rejected or held may be tried again once the digest of its terms is another.
    """

    preset: str
    strategy: Mapping[str, Any]
    gates: Mapping[str, Gate]

    def edit(self, policy: str) -> str:
        """Digest of the terms of an edit: of the gates, that of its policy. How long is searched is no term."""
        return digest_of([self.preset, self.strategy, _limits(self.gates[policy])])

    @property
    def rebase(self) -> str:
        """Digest of the terms of a rebase, which mixes policies: the gates of all."""
        return digest_of([self.preset, self.strategy, {name: _limits(gate) for name, gate in self.gates.items()}])


def shortfalls(probe: Mapping[str, Any], gate: Gate) -> list[str]:
    """Why a version with this probe report may not be published; empty: it may.

    A number that was not measured (None: nothing to measure it on) passes; one that is not a number never does.
    """
    return [*_too_low(probe, gate), *_too_high(probe, gate)]


def shortfalls_by_policy(
    probe: Mapping[str, Any], requests: Collection[EditRequest], policies: Collection[Policy]
) -> list[str]:
    """The same for a version that mixes policies: each one's gate, on its own facts among `requests`.

    What is measured on the version as a whole has to pass the strictest gate of those policies, or, where none of the
    facts is theirs, of all.
    """
    reasons, judging = [], []
    for policy in policies:
        ours = {request.digest for request in requests if request.key.relation in policy.wording()}
        facts = [fact for fact in probe["facts"] if fact["digest"] in ours]
        if not facts:
            continue
        judging.append(policy.gate)
        wordings = sum(fact["paraphrases"] for fact in facts)
        own = {
            "efficacy": sum(fact["efficacy"] for fact in facts) / len(facts),
            "paraphrase": sum(fact["hits"] for fact in facts) / wordings if wordings else None,
        }
        reasons += [f"{policy.policy}: {reason}" for reason in _too_low(own, policy.gate)]
    gates = judging or [policy.gate for policy in policies] or [Gate()]
    limits = {name: min(getattr(gate, name) for gate in gates) for name in AT_MOST}
    return [*reasons, *_too_high(probe, Gate(**limits))]


def _limits(gate: Gate) -> dict[str, float]:
    return {name: getattr(gate, name) for name in (*AT_LEAST, *AT_MOST)}


def _too_low(probe: Mapping[str, Any], gate: Gate) -> Iterator[str]:
    for name in AT_LEAST:
        value, limit = probe.get(name), getattr(gate, name)
        if value is not None and not value >= limit:
            yield f"{name} {value:.3f} is below {limit:g}"


def _too_high(probe: Mapping[str, Any], gate: Gate) -> Iterator[str]:
    for name in AT_MOST:
        value, limit = probe.get(name), getattr(gate, name)
        if value is not None and not value <= limit:
            yield f"{name} {value:.3f} is above {limit:g}"
