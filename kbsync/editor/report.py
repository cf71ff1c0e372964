"""What a probe measured on the weights as they will be served, and whether it is good enough. Torch-free values.

report = ProbeReport.from_json(manifest.probe)
report.shortfalls(policy.gate)          # [] where the version may be published
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kbsync.policy import Gate

__all__ = ["FactProbe", "ProbeReport"]


@dataclass(frozen=True, slots=True)
class FactProbe:
    """One fact on the edited weights. `efficacy`: the greedy continuation of the prompt starts with the object;
    `hits` of `paraphrases` wordings do the same; `answer` is what the model says, `probability` is that of the whole
    object after the prompt."""

    digest: str
    efficacy: bool
    hits: int
    paraphrases: int
    answer: str
    probability: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Shares in 0..1 and drift in nats per token (ARCHITECTURE "Probe and gate"); None where nothing was measured.

    `specificity_drop`: share of the control prompts whose greedy answer differs from the base's. `drift`: mean
    KL(base || edited) of the next token over `drift_tokens` held-out tokens. `controls` says which prompts were used.
    """

    efficacy: float | None
    paraphrase: float | None
    specificity_drop: float | None
    drift: float | None
    facts: tuple[FactProbe, ...]
    control_prompts: int
    controls: str
    drift_tokens: int

    @property
    def failed(self) -> tuple[FactProbe, ...]:
        """Facts that the edited weights do not answer."""
        return tuple(fact for fact in self.facts if not fact.efficacy)

    def shortfalls(self, gate: Gate) -> list[str]:
        """Why the gate stays shut, one reason per limit missed; what was not measured misses none."""
        least = (("efficacy", self.efficacy, gate.efficacy), ("paraphrase", self.paraphrase, gate.paraphrase))
        most = (
            ("specificity_drop", self.specificity_drop, gate.specificity_drop),
            ("drift", self.drift, gate.drift),
        )
        return [
            f"{name} {got:.3f} is below {limit:g}" for name, got, limit in least if got is not None and got < limit
        ] + [f"{name} {got:.3f} is above {limit:g}" for name, got, limit in most if got is not None and got > limit]

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back."""
        return asdict(self) | {"facts": [asdict(fact) for fact in self.facts]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProbeReport:
        """The inverse of `to_json`. Raises TypeError where a field is missing or unknown."""
        return cls(**{**value, "facts": tuple(FactProbe(**fact) for fact in value["facts"])})
