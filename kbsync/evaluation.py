"""What `kbsync evaluate` measures: a version of a workspace, or a model edited in memory, against its base.

    subject = open_version(workspace, ledger, "live")
    result = evaluate(subject, Dataset("facts", subject.facts))            # a JSON document

    subject = open_model("smollm2-135m")
    edit(subject, records.requests)                                        # one batch; nothing is published
    result = evaluate(subject, records)

Loads torch only when called.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbsync.bench.settings import changed
from kbsync.config import Workspace
from kbsync.editor.datasets import dataset_of, load_counterfact, load_facts, load_references, load_zsre
from kbsync.editor.preset import Preset, load_preset, packaged_presets
from kbsync.errors import ModelError, UsageError
from kbsync.hub import fingerprint, resolve_model
from kbsync.ledger import Ledger
from kbsync.progress import Progress, silent
from kbsync.serving import Versions

if TYPE_CHECKING:
    from kbsync.editor.assess import Dataset, Edited, Options
    from kbsync.editor.drift import HeldOut
    from kbsync.editor.model import Base
    from kbsync.facts import EditRequest

__all__ = ["Subject", "edit", "evaluate", "open_model", "open_version", "read_dataset", "watch"]


@dataclass(slots=True)
class Subject:
    """What is measured. `base` holds its pristine weights; `edited` puts those of a version or of an edit in. `facts`
    are what the version holds, `about` what a reader of the numbers must know of it."""

    name: str
    base: Base
    preset: Preset | None = None
    facts: Sequence[EditRequest] = ()
    edited: Edited | None = None
    texts: Sequence[HeldOut] = ()
    about: dict[str, Any] = field(default_factory=dict)


def open_model(name: str, preset: str | None = None, *, device: str = "auto") -> Subject:
    """An embedded model, a folder or a Hugging Face id that was pulled. Without `preset` a model that has none of its
    own can be measured, not edited. Raises ModelError."""
    from kbsync.editor.model import load_base

    folder = resolve_model(name)
    chosen = preset or (folder.name if folder.name in packaged_presets() else None)
    base = load_base(folder.path, fingerprint=fingerprint(folder.path), device=device)
    return Subject(folder.name, base, load_preset(chosen) if chosen else None, about={"version": None})


def open_version(workspace: Workspace, ledger: Ledger, version: int | str, *, progress: Progress = silent) -> Subject:
    """A version of the workspace's model and the facts that it holds. Raises what `Versions.load` raises."""
    from kbsync.editor.drift import HeldOut
    from kbsync.editor.model import weights_in
    from kbsync.editor.statistics import statistics_for
    from kbsync.versions.delta import read_delta
    from kbsync.versions.export import version_matrices

    versions = Versions.open(workspace, ledger)
    row = versions.row(version)
    base, preset = versions.load(0), workspace.preset(versions.folder.name)
    subject = Subject(versions.folder.name, base, preset, about={"version": row.number if row else 0})
    if row is None or row.manifest_sha256 is None:
        return subject
    manifest = versions.store.manifest(row.number, row.manifest_sha256)
    matrices = version_matrices(base, manifest, partial(read_delta, versions.store.deltas))
    subject.edited = partial(weights_in, base, matrices)
    subject.about |= {"weights_sha256": row.weights_sha256}
    with ledger.read() as db:
        applied = db.applied(versions.model, row.number)
    subject.facts = [applied[key].request for key in sorted(applied)]
    subject.texts = [HeldOut("holdout", statistics_for(base, preset, progress=progress).holdout)]
    return subject


def read_dataset(text: str, *, limit: int | None = None, references: Path | None = None) -> Dataset:
    """The records of `kind:FILE`, the first `limit` of them. Raises UsageError, ConfigError, as the loaders do."""
    from kbsync.editor.assess import Dataset

    kind, path = dataset_of(text)
    if references is not None and kind != "counterfact":
        raise UsageError("reference texts go with CounterFact alone", hint="--dataset counterfact:FILE")
    path = path.expanduser()
    if kind == "counterfact":
        records = load_counterfact(path, load_references(references) if references else None)
        return Dataset("counterfact", records[:limit], len(records))
    if kind == "zsre":
        questions = load_zsre(path)
        return Dataset("zsre", questions[:limit], len(questions))
    facts = load_facts(path)
    return Dataset("facts", facts[:limit], len(facts))


def edit(
    subject: Subject,
    requests: Sequence[EditRequest],
    *,
    method: str = "memit",
    changes: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Let `subject.edited` be its base with `requests` put in, in memory: by MEMIT as one batch, or by a baseline
    (`ft-w`, `rome`). `changes` are other values for keys of the preset (ft-w: of its own settings). Requests that
    cannot be placed in their tokens are left out and named in `about`.

    Raises UsageError for another method or key, ModelError for a model without a preset, EditError as the engine does.
    """
    from kbsync.bench.lab import laboratory
    from kbsync.bench.methods import METHODS, fine_tuning
    from kbsync.editor.tokens import placeable

    if method not in METHODS:
        raise UsageError(f"method {method!r} is not known", hint=f"one of: {', '.join(METHODS)}")
    if subject.preset is None:
        raise ModelError(
            f"model {subject.name}: no preset, so it cannot be edited",
            hint="kbsync calibrate, or name a YAML file with --preset",
        )
    chosen = fine_tuning(changes or {}) if method == "ft-w" else METHODS[method]
    preset = subject.preset = changed(subject.preset, {} if method == "ft-w" else changes or {})
    lab = laboratory(subject.name, subject.base, preset, progress=progress)
    fit, left_out = placeable(subject.base, requests, lab.statistics.contexts)
    start = time.perf_counter()
    (weights,) = chosen(lab, fit, [len(fit)])
    seconds = time.perf_counter() - start
    subject.edited = partial(lab.holding, weights)
    subject.texts = lab.held_out()
    subject.about |= {
        "method": method,
        "changes": dict(changes or {}),
        "batch": len(fit),
        "left_out": list(left_out.values()),
        "norms": lab.norms(weights),
        "edit_seconds": round(seconds, 2),
    }


def watch(subject: Subject, text: Path) -> None:
    """Measure drift on the first 4,096 tokens of a text file too. Raises UsageError where there is no text to read."""
    from kbsync.bench.lab import TEXT_TOKENS
    from kbsync.editor.drift import windows

    subject.texts = [*subject.texts, windows(subject.base, text, tokens=TEXT_TOKENS)]


def evaluate(
    subject: Subject, dataset: Dataset, *, options: Options | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """The measurement with the conditions that it was made under, as a JSON value. Raises EditError as metrics do."""
    from kbsync.bench.conditions import machine
    from kbsync.editor.assess import Options, assess

    asked = replace(options or Options(), texts=subject.texts)
    found = assess(subject.base, dataset, subject.edited, options=asked, progress=progress).to_json()
    about = {
        "model": subject.name,
        "fingerprint": subject.base.fingerprint,
        "dtype": str(subject.base.dtype).removeprefix("torch."),
        "device": str(subject.base.device),
        "settings": subject.preset.digest if subject.preset else None,
        "total": dataset.total,
    }
    return about | subject.about | found | {"machine": machine()}
