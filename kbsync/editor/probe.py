"""The probe: is what was edited known, is the rest as it was? Measured on the weights as they will be served.

    report = probe(base, matrices, requests, controls=shipped_controls(subjects), holdout=statistics.holdout)
    report.efficacy, report.specificity_drop, report.failed

Definitions: ARCHITECTURE "Probe and gate". What is unrelated is compared with the pristine base, never with an earlier
edit, so that drift cannot add up unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kbsync.editor.answers import Scored, answers, log_probabilities, readable
from kbsync.editor.controls import NO_CONTROLS, Controls, shipped_controls, subject_controls
from kbsync.editor.drift import Gauge, HeldOut
from kbsync.editor.model import Base, weights_in
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = [
    "NO_CONTROLS",
    "ChangedControl",
    "Controls",
    "FactProbe",
    "ProbeReport",
    "probe",
    "readable_paraphrases",
    "shipped_controls",
    "subject_controls",
    "weights_in",
]


CONTROL_TOKENS = 4
"""Length of a control answer: a name is said by then, and what follows it in running text is not the answer."""


@dataclass(frozen=True, slots=True)
class FactProbe:
    """One fact on the edited weights. `efficacy`: the greedy continuation of the prompt starts with the object;
    `hits` of `paraphrases` wordings do the same (`unasked` others are longer than the model reads); `answer` is what
    the model says, `probability` is that of the whole object after the prompt."""

    digest: str
    efficacy: bool
    hits: int
    paraphrases: int
    answer: str
    probability: float
    unasked: int = 0


@dataclass(frozen=True, slots=True)
class ChangedControl:
    """A control prompt that the edited weights answer otherwise: the evidence behind `specificity_drop`."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Shares in 0..1 and drift in nats per token (ARCHITECTURE "Probe and gate"); None where nothing was measured.

    `specificity_drop`: share of the control prompts whose greedy answer differs from the base's (`changed`); an answer
    that only goes on longer is the same. `drift`: mean KL(base || edited) of the token that follows, over
    `drift_tokens` tokens of held-out text. `controls` says which prompts were used.
    """

    efficacy: float | None
    paraphrase: float | None
    specificity_drop: float | None
    drift: float | None
    facts: tuple[FactProbe, ...]
    control_prompts: int
    controls: str
    drift_tokens: int
    changed: tuple[ChangedControl, ...] = ()

    @property
    def failed(self) -> tuple[FactProbe, ...]:
        """Facts that the edited weights do not answer."""
        return tuple(fact for fact in self.facts if not fact.efficacy)

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back."""
        facts, changed = [asdict(fact) for fact in self.facts], [asdict(control) for control in self.changed]
        return asdict(self) | {"facts": facts, "changed": changed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProbeReport:
        """The inverse of `to_json`. Raises KeyError or TypeError where a field is missing or unknown."""
        facts = tuple(FactProbe(**fact) for fact in value["facts"])
        changed = tuple(ChangedControl(**control) for control in value.get("changed", ()))
        return cls(**{**value, "facts": facts, "changed": changed})


def probe(
    base: Base,
    matrices: Mapping[str, Tensor],
    requests: Sequence[EditRequest],
    *,
    controls: Controls,
    holdout: Tensor,
    progress: Progress = silent,
) -> ProbeReport:
    """Measure the served weights `matrices` (module name -> [d_out, d_in]) on `requests`, on `controls` and on
    `holdout` [rows, T], token ids of held-out text. `base` holds the pristine weights before and after.

    Raises EditError for weights or probabilities that are not finite.
    """
    before = _controls(base, controls, progress)
    gauge = Gauge(base, [HeldOut("holdout", holdout)] if holdout.numel() else [])
    with weights_in(base, matrices):
        facts = _facts(base, requests, progress)
        after = _controls(base, controls, progress)
        drift = gauge.measure().get("holdout")
    told = zip(controls.prompts, before, after, strict=True)
    changed = tuple(
        ChangedControl(prompt, old, new) for prompt, old, new in told if not f"{new} ".startswith(f"{old} ")
    )
    return ProbeReport(
        efficacy=_ratio(sum(fact.efficacy for fact in facts), len(facts)),
        paraphrase=_ratio(sum(fact.hits for fact in facts), sum(fact.paraphrases for fact in facts)),
        specificity_drop=_ratio(len(changed), len(before)),
        drift=drift.kl if drift else None,
        facts=tuple(facts),
        control_prompts=len(before),
        controls=controls.description,
        drift_tokens=drift.tokens if drift else 0,
        changed=changed,
    )


def _controls(base: Base, controls: Controls, progress: Progress) -> list[str]:
    """The answers to the control prompts on the weights that `base` holds."""
    return [answer.text for answer in answers(base, controls.prompts, tokens=CONTROL_TOKENS, progress=progress)]


def _facts(base: Base, requests: Sequence[EditRequest], progress: Progress) -> list[FactProbe]:
    """Each request on the weights that `base` holds. Only a fact that failed needs its answer generated: the greedy
    continuation of the others starts with the object."""
    wordings = readable_paraphrases(base, requests)
    asked = list(zip(requests, wordings, strict=True))
    pairs = [(prompt, request.target) for request, others in asked for prompt in (request.prompt, *others)]
    scored = iter(log_probabilities(base, pairs, progress=progress))
    own: list[Scored] = []
    hits: list[int] = []
    for others in wordings:
        own.append(next(scored))
        hits.append(sum(next(scored).greedy for _ in others))
    failed = [request.prompt for request, score in zip(requests, own, strict=True) if not score.greedy]
    said = iter(answers(base, failed, progress=progress))
    return [
        FactProbe(
            digest=request.digest,
            efficacy=score.greedy,
            hits=hit,
            paraphrases=len(others),
            answer=request.target if score.greedy else next(said).text,
            probability=score.probability,
            unasked=len(request.paraphrases) - len(others),
        )
        for (request, others), score, hit in zip(asked, own, hits, strict=True)
    ]


def readable_paraphrases(base: Base, requests: Sequence[EditRequest]) -> list[tuple[str, ...]]:
    """Each request's paraphrases that the model can read with the object after them."""
    pairs = [(prompt, request.target) for request in requests for prompt in request.paraphrases]
    fits = iter(readable(base, pairs))
    return [tuple(prompt for prompt in request.paraphrases if next(fits)) for request in requests]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
