"""A data set, or facts, measured before and after an edit: each metric with its interval, by relation, and the drift.

    found = assess(base, Dataset("zsre", load_zsre(path)), edited, options=Options(seed=0))
    found.to_json()["all"]["difference"]["score"]

`edited` puts the edited weights into `base` for the length of a `with` block, as `partial(weights_in, base, matrices)`
does; without it only the weights that `base` holds are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kbsync.editor.accuracy import ZSRE_HARMONIC, score_chat, score_facts, score_zsre
from kbsync.editor.datasets import CounterFactRecord, ZsreRecord
from kbsync.editor.drift import Drift, Gauge, HeldOut
from kbsync.editor.evaluate import HARMONIC, columns, score_records
from kbsync.editor.generation import TEXT_TOKENS, TOP_K, score_generation
from kbsync.editor.intervals import RESAMPLES, Interval, Run, differences, intervals
from kbsync.editor.model import Base
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = ["Assessment", "Dataset", "Options", "Protocol", "assess"]

Protocol = Literal["counterfact", "zsre", "facts"]
Edited = Callable[[], AbstractContextManager[object]]
Summary = dict[str, dict[str, Interval | None]]

_HARMONIC: dict[Protocol, tuple[str, ...]] = {"counterfact": HARMONIC, "zsre": ZSRE_HARMONIC, "facts": ()}
_DEFINITIONS: dict[Protocol, str] = {
    "counterfact": "ES, PS, NS by mean log-probability per token of o and o_c; S their harmonic mean",
    "zsre": "share of argmax tokens of answers[0] and of the unrelated answer, teacher forced; score: harmonic mean",
    "facts": "share of argmax tokens of the object, teacher forced",
}
_WHOLE = "accuracy: the greedy continuation starts with the whole object"
_INTERVALS = f"95 %, percentile bootstrap over records, {RESAMPLES} resamples; differences paired"
_TEXTS = f"texts of {TEXT_TOKENS} tokens with the prompt, top-{TOP_K} sampling, each different prompt once"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Records to measure, all of one kind; `total` counts those that there are."""

    protocol: Protocol
    records: Sequence[CounterFactRecord] | Sequence[ZsreRecord] | Sequence[EditRequest]
    total: int

    @property
    def requests(self) -> list[EditRequest]:
        """What an edit would be asked for, record by record."""
        return [record if isinstance(record, EditRequest) else record.request for record in self.records]


@dataclass(frozen=True, slots=True)
class Options:
    """`write`: also let the model write texts (CounterFact's generation metrics). `seed` is of the texts and the
    bootstrap. `texts` is held-out text to measure drift on."""

    write: bool = False
    seed: int = 0
    texts: Sequence[HeldOut] = ()


@dataclass(slots=True)
class Assessment:
    """The numbers of each record before and after (None: nothing was edited), and how much work they were."""

    dataset: Dataset
    options: Options
    before: Run
    after: Run | None = None
    drift: Mapping[str, Drift] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def relations(self) -> dict[str, list[int]]:
        """The records of each relation, most frequent first."""
        found: dict[str, list[int]] = {}
        for index, request in enumerate(self.dataset.requests):
            found.setdefault(request.key.relation, []).append(index)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def summary(self, records: Sequence[int] | None = None) -> Summary:
        """`before`, and with an edit `after` and `difference`, of all records or of those with these indices."""
        harmonic, seed = _HARMONIC[self.dataset.protocol], self.options.seed
        before = _chosen(self.before, records)
        found = {"before": intervals(before, harmonic=harmonic, seed=seed)}
        if self.after is not None:
            after = _chosen(self.after, records)
            found["after"] = intervals(after, harmonic=harmonic, seed=seed)
            found["difference"] = differences(before, after, harmonic=harmonic, seed=seed)
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON value: `all` records, then `relations` where there are several."""
        protocol = self.dataset.protocol
        relations = self.relations if len(self.relations) > 1 else {}
        return {
            "protocol": {
                "metrics": f"{_DEFINITIONS[protocol]}; {_WHOLE}",
                "intervals": _INTERVALS,
                "seed": self.options.seed,
                "texts": _TEXTS if self.options.write else None,
            },
            "records": len(self.dataset.records),
            "all": _plain(self.summary()),
            "relations": {name: {"records": len(own), **_plain(self.summary(own))} for name, own in relations.items()},
            "drift": {name: asdict(drift) for name, drift in self.drift.items()},
            "speed": {
                "tokens": self.tokens,
                "seconds": round(self.seconds, 2),
                "tokens_per_second": round(self.tokens / self.seconds) if self.seconds else None,
            },
        }


def assess(
    base: Base,
    dataset: Dataset,
    edited: Edited | None = None,
    *,
    options: Options | None = None,
    progress: Progress = silent,
) -> Assessment:
    """Measure `dataset` on the weights that `base` holds, then, with `edited`, on those that it puts in.

    Raises EditError where the metrics do.
    """
    options = options or Options()
    start = time.perf_counter()
    with _counted(base) as count:
        found = Assessment(dataset, options, _measure(base, dataset, options, progress))
        if edited is not None:
            gauge = Gauge(base, options.texts)
            with edited():
                found.after = _measure(base, dataset, options, progress)
                found.drift = gauge.measure()
    found.tokens, found.seconds = count[0], time.perf_counter() - start
    return found


def _measure(base: Base, dataset: Dataset, options: Options, progress: Progress) -> Run:
    records: Any = dataset.records
    run = dict(_own(base, dataset.protocol, records, progress))
    run |= score_chat(base, dataset.requests, progress=progress)
    if options.write and dataset.protocol == "counterfact":
        run |= score_generation(base, records, seed=options.seed, progress=progress)
    return run


def _own(base: Base, protocol: Protocol, records: Any, progress: Progress) -> Run:
    """The metrics of the data set's own protocol."""
    if protocol == "zsre":
        return score_zsre(base, records, progress=progress)
    if protocol == "facts":
        return score_facts(base, records, progress=progress)
    return columns(score_records(base, records, progress=progress))


@contextmanager
def _counted(base: Base) -> Iterator[list[int]]:
    """How many tokens the network reads in the block, padding included, as the one element of a list."""
    count = [0]

    def read(_module: object, _inputs: object, given: Mapping[str, Any]) -> None:
        count[0] += given["input_ids"].numel()

    handle = base.network.base_model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def _chosen(run: Run, records: Sequence[int] | None) -> Run:
    return run if records is None else {name: [values[at] for at in records] for name, values in run.items()}


def _plain(summary: Summary) -> dict[str, Any]:
    return {
        state: {name: None if one is None else asdict(one) for name, one in found.items()}
        for state, found in summary.items()
    }
