"""Benchmark records as edit requests: CounterFact (arXiv 2202.05262) as published and flattened, zsRE (as MEND uses it,
arXiv 2110.11309), and facts in a CSV file.

    records = load_counterfact(Path("counterfact.json"))
    records[0].request.prompt, records[0].true_target
    load_zsre(Path("zsre_mend_eval.json")), load_facts(Path("stars.csv"))
    kind, path = dataset_of("zsre:zsre_mend_eval.json")

A later record with the (subject, relation) of an earlier one is dropped: the two could not both be learned (Eqn 5).
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from kbsync.errors import ConfigError, UsageError
from kbsync.facts import EditRequest, FactKey

__all__ = [
    "CounterFactRecord",
    "DatasetKind",
    "ZsreRecord",
    "dataset_of",
    "load_counterfact",
    "load_facts",
    "load_references",
    "load_zsre",
    "read_list",
]

DatasetKind = Literal["counterfact", "zsre", "csv"]
References = Mapping[tuple[str, str], Sequence[str]]

_FLAT_RELATION = "counterfact"
"""The flat form names no relation, so a subject is taken once."""
_ZSRE_RELATION = "zsre"
"""Nor does zsRE."""
_SENTENCE_END = re.compile(r"[.!?]\W*\s|\n")
_PLACES = ("{subject}", "{}")
_BETWEEN_PARAPHRASES = "|"


@dataclass(frozen=True, slots=True)
class CounterFactRecord:
    """One counterfactual edit: the request (its target is o, its paraphrases those of the record), the true object o_c,
    and prompts about other subjects whose object is o_c. The full form has more: prompts to write a text from, prompts
    about subjects whose object is o (`attributes`), and, where given, texts about such subjects (`references`)."""

    request: EditRequest
    true_target: str
    neighborhood: tuple[str, ...]
    generation: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def paraphrases(self) -> tuple[str, ...]:
        """Other wordings of the edit prompt."""
        return self.request.paraphrases


@dataclass(frozen=True, slots=True)
class ZsreRecord:
    """One question with its answer (the request's target), its rephrased form (the request's paraphrase), and a
    question that has nothing to do with it, with its answer."""

    request: EditRequest
    unrelated_prompt: str
    unrelated_answer: str


Record = TypeVar("Record", CounterFactRecord, ZsreRecord, EditRequest)


def dataset_of(text: str) -> tuple[DatasetKind, Path]:
    """`kind:FILE` in its parts. Raises UsageError for another kind."""
    kind, _, file = text.partition(":")
    for known in get_args(DatasetKind):
        if kind == known and file:
            return known, Path(file)
    raise UsageError(f"data set {text!r} is not known", hint="counterfact:FILE, zsre:FILE or csv:FILE")


def load_counterfact(path: Path, references: References | None = None) -> list[CounterFactRecord]:
    """Records of a CounterFact file, in its order, in the published form or the flat one; `references` as
    `load_references` gives them.

    Raises ConfigError (file, record, key) for what is no such file.
    """

    def record(value: Mapping[str, Any]) -> CounterFactRecord:
        return _full(value, references or {}) if "requested_rewrite" in value else _flat(value)

    return _records(path, "CounterFact", record)


def load_references(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Reference texts by (relation id, object id), from CounterFact's `attribute_snippets.json`.

    Raises ConfigError for what is no such file.
    """
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for number, value in enumerate(read_list(path)):
        try:
            texts[value["relation_id"], value["target_id"]] += [str(one["text"]) for one in value["samples"]]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"no reference texts: {error}", file=path, key=f"record {number}") from error
    return {key: tuple(found) for key, found in texts.items()}


def load_zsre(path: Path) -> list[ZsreRecord]:
    """Records of a zsRE file in MEND's form, in its order. The target is `answers[0]`, as in MEMIT.

    Raises ConfigError (file, record, key) for what is no such file.
    """
    return _records(path, "zsRE", _zsre)


def load_facts(path: Path) -> list[EditRequest]:
    """Facts of a CSV file with a header, in its order: columns `subject`, `object` (or `target`), and `prompt` or
    `relation`; optional `paraphrases`, parted by `|`.

    `prompt` is a template with `{subject}` or `{}`, or the rendered prompt; without it, `relation` is a template or the
    words that follow the subject. Raises ConfigError (file, line) for what cannot be read so.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(f"line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"no CSV to read: {error}", file=path) from error
    return _parsed(path, "fact", rows, _fact)


def _records(path: Path, name: str, parse: Callable[[Mapping[str, Any]], Record]) -> list[Record]:
    values = [(f"record {number}", value) for number, value in enumerate(read_list(path))]
    return _parsed(path, f"{name} record", values, parse)


def read_list(path: Path) -> list[Any]:
    """The JSON list in a file. Raises ConfigError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no JSON to read: {error}", file=path) from error
    if not isinstance(values, list):
        raise ConfigError("not a list of records", file=path)
    return values


def _parsed(
    path: Path, name: str, values: Iterable[tuple[str, Any]], parse: Callable[[Mapping[str, Any]], Record]
) -> list[Record]:
    """The records behind (place, value), the first one of each key."""
    found: dict[FactKey, Record] = {}
    for place, value in values:
        try:
            record = parse(value)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ConfigError(f"not a {name}: {error}", file=path, key=place) from error
        found.setdefault((record if isinstance(record, EditRequest) else record.request).key, record)
    return list(found.values())


def _full(value: Mapping[str, Any], references: References) -> CounterFactRecord:
    rewrite = value["requested_rewrite"]
    subject, new = str(rewrite["subject"]), rewrite["target_new"]
    request = EditRequest(
        key=FactKey(rewrite["relation_id"], f"counterfact:{subject}"),
        prompt=rewrite["prompt"].replace("{}", subject, 1),
        subject=subject,
        target=new["str"],
        paraphrases=tuple(value["paraphrase_prompts"]),
    )
    return CounterFactRecord(
        request,
        rewrite["target_true"]["str"],
        tuple(value["neighborhood_prompts"]),
        generation=tuple(value.get("generation_prompts", ())),
        attributes=tuple(value.get("attribute_prompts", ())),
        references=tuple(references.get((rewrite["relation_id"], new.get("id")), ())),
    )


def _flat(value: Mapping[str, Any]) -> CounterFactRecord:
    subject, rephrased = str(value["subject"]), str(value["rephrase_prompt"])
    paraphrase = _is_paraphrase(rephrased, subject)
    request = EditRequest(
        key=FactKey(_FLAT_RELATION, f"counterfact:{subject}"),
        prompt=value["prompt"],
        subject=subject,
        target=value["target_new"],
        paraphrases=(rephrased,) if paraphrase else (),
    )
    generation = () if paraphrase else (rephrased,)
    return CounterFactRecord(request, value["ground_truth"], (value["locality_prompt"],), generation=generation)


def _is_paraphrase(text: str, subject: str) -> bool:
    """Whether a sentence stands before the subject. CounterFact's paraphrases have one, its generation prompts, which
    the flat form mixes in, have none (of 500 published records: 99 % of the paraphrases, no generation prompt)."""
    return _SENTENCE_END.search(text.partition(subject)[0]) is not None


def _zsre(value: Mapping[str, Any]) -> ZsreRecord:
    subject = str(value["subject"])
    request = EditRequest(
        key=FactKey(_ZSRE_RELATION, f"zsre:{subject}"),
        prompt=value["src"],
        subject=subject,
        target=value["answers"][0],
        paraphrases=(value["rephrase"],),
    )
    # The questions of Natural Questions have no mark at the end; MEMIT's authors put one there.
    return ZsreRecord(request, f"{value['loc']}?", value["loc_ans"])


def _fact(row: Mapping[str, Any]) -> EditRequest:
    subject = str(row["subject"] or "")
    target = row["object"] if "object" in row else row["target"]
    template = row.get("prompt") or row.get("relation")
    if not (subject and target and template):
        raise ValueError("subject, object (or target) and prompt (or relation) must say something")
    prompt = _filled(template, subject)
    if not row.get("prompt") and subject not in prompt:
        prompt = f"{subject} {template}"
    if subject not in prompt:
        raise ValueError(f"the subject {subject!r} is not in the prompt {prompt!r}")
    wordings = (row.get("paraphrases") or "").split(_BETWEEN_PARAPHRASES)
    return EditRequest(
        key=FactKey(row.get("relation") or template, f"csv:{subject}"),
        prompt=prompt,
        subject=subject,
        target=str(target),
        paraphrases=tuple(_filled(text.strip(), subject) for text in wordings if text.strip()),
    )


def _filled(template: str, subject: str) -> str:
    """The template with the subject in its place; a rendered prompt as it is."""
    place = next((place for place in _PLACES if place in template), None)
    return template.replace(place, subject, 1) if place else template
