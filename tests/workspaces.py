"""A whole workspace for tests: a tiny real model on disk, a feed, a policy; edits in this process or in the real child.

made = workspace(tmp_path, {"Vega": "Lyra"})
with made.open() as reconciler:
    reconciler.sync()
made.feed({"Vega": "Orion"})

No limit of the strategy is ever reached unless a test sets one: a few facts are a large part of what so small a
model's weights are. A random model learns a fact only where the subject ends the prompt and the object is one token of
its vocabulary (Orion, Lyra, Paris, Rome, French, France, Italy, city, home, star).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from kbsync.editor.job import EditJob, EditResult
from kbsync.editor.worker import perform
from kbsync.errors import Cancelled
from kbsync.facts import digest_of
from kbsync.progress import Progress, silent
from kbsync.reconcile import Reconciler, open_workspace
from tests.ledgers import on_postgresql, url
from tests.tiny import save, tiny_llama

OUT_OF_REACH: dict[str, object] = {"max_relative_norm": 1000, "min_retention": "0%"}
STRATEGY = "max_relative_norm: 1000, min_retention: 0%"
CONFIG = f"""\
model: model
preset: preset.yaml
device: cpu
strategy: {{{STRATEGY}}}
"""
PRESET = """\
name: tiny
layers: [1, 2, 3]
covariance_weight: 0.05
clamp: 6.0
rate: 0.5
steps: 20
weight_decay: 0.0
stop_loss: 0.02
corpus: self
sample_tokens: 600
token_budget: 4096
chat_context: false
"""
SOURCE = """\
source: stars
type: csv
location: stars.csv
row_id: id
columns: {subject: name, object: constellation}
relation: constellation
"""
POLICY = """\
policy: sky
sources: [stars]
schedule: {every: 1h}
relations:
  constellation:
    prompt: "Where is {subject}"
    paraphrases: ["The home of {subject}"]
    controls: controls.txt
%s
guard: {max_changed: 60%%, max_removed: 60%%, max_edits: 50}
gate: {efficacy: 0.0, paraphrase: 0.0, specificity_drop: 100%%, drift: 1000}
"""


def run_here(job: EditJob, *, progress: Progress = silent, cancelled: threading.Event | None = None) -> EditResult:
    """The edit in this process: what the child does, without its start. A cancelled one never begins."""
    if cancelled is not None and cancelled.is_set():
        raise Cancelled("cancelled")
    return perform(EditJob.model_validate_json(job.model_dump_json()), progress)


@dataclass(frozen=True, slots=True)
class TestWorkspace:
    """Where a workspace lies, and what its feed says."""

    __test__ = False

    root: Path

    def feed(self, rows: Mapping[str, str], ids: Mapping[str, str] | None = None) -> None:
        """Write the feed: star -> constellation; the id is the name's first five letters unless given."""
        lines = ["id,name,constellation"]
        lines += [f"{(ids or {}).get(name, name[:5].lower())},{name},{value}" for name, value in rows.items()]
        (self.root / "sources" / "stars.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def strategy(self, **changes: object) -> None:
        """Change the strategy in kbsync.yaml; the limits that are not given stay out of reach."""
        text = ", ".join(f"{key}: {value}" for key, value in (OUT_OF_REACH | changes).items())
        ledger = f"ledger: {url(self.root)}\n" if on_postgresql() else ""
        (self.root / "kbsync.yaml").write_text(CONFIG.replace(STRATEGY, text) + ledger)

    def policy(self, extra: str = "    retract: keep") -> None:
        """Write the policy; `extra` are lines of the relation."""
        (self.root / "policies" / "sky.yaml").write_text(POLICY % extra, encoding="utf-8")

    def poison(self, star: str, constellation: str, factor: float) -> None:
        """Make the stored target vector of a fact so many times as long."""
        request = digest_of([f"Where is {star}", star, constellation])
        for path in (self.root / "data" / "targets").iterdir():
            with safe_open(path, "pt") as file:
                z, meta = file.get_tensor("z"), file.metadata()
            if meta["request"] == request:
                z = z * factor
                save_file({"z": z}, path, metadata=meta | {"sha256": hashlib.sha256(z.numpy().tobytes()).hexdigest()})
                return
        raise AssertionError(f"no target vector of {star}")

    @contextmanager
    def open(self, *, child: bool = False) -> Iterator[Reconciler]:
        """A reconciler; `child`: edits run in the real child process."""
        with open_workspace(self.root, user="test") as reconciler:
            if not child:
                reconciler.run_edit = run_here
            yield reconciler


def workspace(root: Path, rows: Mapping[str, str]) -> TestWorkspace:
    """A workspace below `root` whose feed says `rows`."""
    save(tiny_llama(), root / "model")
    for folder in ("sources", "policies"):
        (root / folder).mkdir()
    (root / "preset.yaml").write_text(PRESET)
    (root / "sources" / "stars.yaml").write_text(SOURCE)
    (root / "policies" / "controls.txt").write_text("Danielle\nItaly\n")
    made = TestWorkspace(root)
    made.strategy()
    made.policy()
    made.feed(rows)
    return made
