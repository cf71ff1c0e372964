"""Benchmark records as edit requests: CounterFact (Meng et al. 2022, arXiv 2202.05262), as published and flattened.

    records = load_counterfact(Path("counterfact.json"))
    records[0].request.prompt, records[0].true_target

A later record with the (subject, relation) of an earlier one is dropped: the two could not both be learned (Eqn 5).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbsync.errors import ConfigError
from kbsync.facts import EditRequest, FactKey

__all__ = ["CounterFactRecord", "load_counterfact"]

_FLAT_RELATION = "counterfact"
"""The flat form names no relation, so a subject is taken once."""
_SENTENCE_END = re.compile(r"[.!?]\W*\s|\n")


@dataclass(frozen=True, slots=True)
class CounterFactRecord:
    """One counterfactual edit: the request (its target is o, its paraphrases those of the record), the true object o_c,
    and prompts about other subjects whose object is o_c."""

    request: EditRequest
    true_target: str
    neighborhood: tuple[str, ...]

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Other wordings of the edit prompt."""
        return self.request.paraphrases


def load_counterfact(path: Path) -> list[CounterFactRecord]:
    """Records of a CounterFact file, in its order, in the published form or the flat one.

    Raises ConfigError (file, record, key) for what is no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no JSON to read: {error}", file=path) from error
    if not isinstance(values, list):
        raise ConfigError("not a list of records", file=path)
    found: dict[FactKey, CounterFactRecord] = {}
    for number, value in enumerate(values):
        try:
            record = _full(value) if "requested_rewrite" in value else _flat(value)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a CounterFact record: {error}", file=path, key=f"record {number}") from error
        found.setdefault(record.request.key, record)
    return list(found.values())


def _full(value: Mapping[str, Any]) -> CounterFactRecord:
    rewrite = value["requested_rewrite"]
    subject = str(rewrite["subject"])
    request = EditRequest(
        key=FactKey(rewrite["relation_id"], f"counterfact:{subject}"),
        prompt=rewrite["prompt"].replace("{}", subject, 1),
        subject=subject,
        target=rewrite["target_new"]["str"],
        paraphrases=tuple(value["paraphrase_prompts"]),
    )
    return CounterFactRecord(request, rewrite["target_true"]["str"], tuple(value["neighborhood_prompts"]))


def _flat(value: Mapping[str, Any]) -> CounterFactRecord:
    subject, rephrased = str(value["subject"]), str(value["rephrase_prompt"])
    request = EditRequest(
        key=FactKey(_FLAT_RELATION, f"counterfact:{subject}"),
        prompt=value["prompt"],
        subject=subject,
        target=value["target_new"],
        paraphrases=(rephrased,) if _is_paraphrase(rephrased, subject) else (),
    )
    return CounterFactRecord(request, value["ground_truth"], (value["locality_prompt"],))


def _is_paraphrase(text: str, subject: str) -> bool:
    """Whether a sentence stands before the subject. CounterFact's paraphrases have one, its generation prompts, which
    the flat form mixes in, have none (of 500 published records: 99 % of the paraphrases, no generation prompt)."""
    return _SENTENCE_END.search(text.partition(subject)[0]) is not None
