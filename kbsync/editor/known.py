"""True facts that a model may know already: what causal tracing looks at, and a source of counterfactual edits.

The file has the shape of the ROME authors' known_1000.json (Meng et al. 2022, arXiv 2202.05262): a list of records with
`subject`, `prompt` (the subject in it once), `attribute` and, optionally, `relation_id`. A CounterFact file serves,
too: its true objects are such facts.

    facts = load_known(Path("known_1000.json"))
    known, asked = answered(base, facts, limit=100)     # those that the model completes with the whole attribute
    records = counterfactuals(facts, seed=0)            # the same facts with another object of their relation
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbsync.editor.answers import log_probabilities
from kbsync.editor.datasets import CounterFactRecord, read_list
from kbsync.editor.model import Base
from kbsync.errors import ConfigError
from kbsync.facts import EditRequest, FactKey
from kbsync.progress import Progress, silent

__all__ = ["KnownFact", "answered", "counterfactuals", "is_counterfact", "load_known"]

_CHUNK = 64
"""Facts that are asked for together: little is asked in vain once `limit` facts are known."""
_PARAPHRASES, _NEIGHBORS = 2, 5
"""Prompts of a made counterfactual, at most: CounterFact has 2 paraphrases and 10 neighborhood prompts."""


@dataclass(frozen=True, slots=True)
class KnownFact:
    """After `prompt`, which contains `subject`, comes `attribute`. `relation`: what kind of fact; "" where unknown."""

    subject: str
    prompt: str
    attribute: str
    relation: str = ""

    @property
    def request(self) -> EditRequest:
        """The fact as the engine places it in tokens."""
        return EditRequest(FactKey(self.relation, f"known:{self.subject}"), self.prompt, self.subject, self.attribute)

    def about(self, subject: str) -> str:
        """The prompt with another subject in the place of its own."""
        return self.prompt.replace(self.subject, subject, 1)


def load_known(path: Path) -> list[KnownFact]:
    """Facts of a file in the shape of known_1000.json or of CounterFact (published or flat), in its order.

    Facts whose prompt does not hold the subject exactly once are left out. Raises ConfigError (file, record, key).
    """
    found = []
    for number, value in enumerate(read_list(path)):
        try:
            fact = _fact(value)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a fact to trace: {error}", file=path, key=f"record {number}") from error
        if fact.subject and fact.prompt.count(fact.subject) == 1:
            found.append(fact)
    return found


def is_counterfact(path: Path) -> bool:
    """Whether the file holds CounterFact records (published or flat) rather than known facts. Raises ConfigError."""
    first: Any = next(iter(read_list(path)), None)
    return isinstance(first, Mapping) and ("requested_rewrite" in first or "target_new" in first)


def _fact(value: Mapping[str, Any]) -> KnownFact:
    if "requested_rewrite" in value:
        rewrite = value["requested_rewrite"]
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"], 1)
        return KnownFact(rewrite["subject"], prompt, rewrite["target_true"]["str"], rewrite["relation_id"])
    attribute = value["ground_truth"] if "ground_truth" in value else value["attribute"]
    return KnownFact(str(value["subject"]), str(value["prompt"]), str(attribute), str(value.get("relation_id", "")))


def answered(
    base: Base, facts: Sequence[KnownFact], *, limit: int | None = None, progress: Progress = silent
) -> tuple[list[KnownFact], int]:
    """The facts whose prompt the model continues greedily with the whole attribute, at most `limit` of them, and how
    many were asked to find them."""
    wanted = len(facts) if limit is None else min(limit, len(facts))
    found: list[KnownFact] = []
    asked = 0
    while len(found) < wanted and asked < len(facts):
        part = facts[asked : asked + _CHUNK]
        scored = log_probabilities(base, [(fact.prompt, fact.attribute) for fact in part])
        for fact, score in zip(part, scored, strict=True):
            asked += 1
            if score.greedy:
                found.append(fact)
            if len(found) == wanted:
                break
        progress("ask", len(found), wanted)
    return found, asked


def counterfactuals(facts: Sequence[KnownFact], *, seed: int = 0) -> list[CounterFactRecord]:
    """Each fact with an object that another fact of its relation has, in random order, as CounterFact does it.

    Paraphrases are the wordings of other facts of the relation; neighborhood prompts are about other subjects with the
    same true object. A fact without another object, wording or neighbor is left out, and so is a subject's second one.
    """
    relations: dict[str, dict[str, KnownFact]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, {}).setdefault(fact.subject, fact)
    chance = random.Random(seed)  # noqa: S311  a permutation, no secret
    found = [record for group in relations.values() for record in _permuted(list(group.values()), chance)]
    chance.shuffle(found)
    return found


def _permuted(group: Sequence[KnownFact], chance: random.Random) -> Iterator[CounterFactRecord]:
    objects = sorted({fact.attribute for fact in group})
    for fact in group:
        others = [name for name in objects if name != fact.attribute]
        wordings = dict.fromkeys(other.about(fact.subject) for other in group)
        paraphrases = [text for text in wordings if text != fact.prompt and text.count(fact.subject) == 1]
        neighbors = [other.prompt for other in group if other.attribute == fact.attribute and other is not fact]
        if others and paraphrases and neighbors:
            yield CounterFactRecord(
                EditRequest(
                    fact.request.key,
                    fact.prompt,
                    fact.subject,
                    chance.choice(others),
                    tuple(chance.sample(paraphrases, min(_PARAPHRASES, len(paraphrases)))),
                ),
                fact.attribute,
                tuple(chance.sample(neighbors, min(_NEIGHBORS, len(neighbors)))),
            )
