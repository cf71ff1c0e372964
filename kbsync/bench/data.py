"""The facts of a benchmark: the first records of a data set that are about different subjects, in the file's order."""

from __future__ import annotations

from kbsync.editor.datasets import CounterFactRecord, dataset_of, load_counterfact
from kbsync.errors import UsageError

__all__ = ["counterfact_records", "distinct"]


def counterfact_records(dataset: str, least: int = 1) -> list[CounterFactRecord]:
    """The records of `counterfact:FILE`, each about a subject of its own, since two facts about one
    subject share a key.

    Raises UsageError for another kind of data set or one with fewer than `least` such records, ConfigError for a file
    that is wrong.
    """
    kind, path = dataset_of(dataset)
    if kind != "counterfact":
        raise UsageError(f"data set {dataset!r} cannot be used here", hint="--dataset counterfact:FILE")
    records = distinct(load_counterfact(path))
    if len(records) < least:
        raise UsageError(
            f"{path}: has {len(records)} records about different subjects, {least} were asked for",
            hint=f"ask for at most {len(records)} facts",
        )
    return records


def distinct(records: list[CounterFactRecord]) -> list[CounterFactRecord]:
    """Without records about a subject that an earlier one is about, however it is written."""
    first: dict[str, CounterFactRecord] = {}
    for record in records:
        first.setdefault(record.request.subject.casefold().strip(), record)
    return list(first.values())
