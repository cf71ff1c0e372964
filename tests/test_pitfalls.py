"""Mistakes that other editing engines made, each shown not to be made here; docs/pitfalls.md lists them all."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kbsync.editor import corpus, worker
from kbsync.editor.answers import final_states, log_probabilities, logit_chunks
from kbsync.editor.contexts import sample_contexts
from kbsync.editor.model import Base, weights_in
from kbsync.editor.preset import Preset
from kbsync.editor.statistics import _key, collect
from kbsync.editor.target_store import TargetStore
from kbsync.errors import EditError
from kbsync.versions.delta import read_delta
from kbsync.versions.weights import served
from tests.gpu import main as gpu_main
from tests.gpu import measure
from tests.tiny import CONTEXTS, FACTS, request, tiny_gpt2, tiny_llama, tiny_preset, tiny_statistics
from tests.workspaces import TestWorkspace, workspace

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")

OTHERWISE: dict[str, Any] = {
    "name": "other",
    "layers": (1, 2, 4),
    "betas": (0.5, 0.9),
    "covariance_weight": 4.0,
    "corpus": "hf:owner/name",
    "sample_tokens": 123,
    "seed": 9,
    "chat_context": True,
    "token_budget": 77,
    "key_average": "mean",
    "null_space": 0.01,
    "stop_top": True,
    "early_contexts": 2,
    "scores": {"S": 1},
    "note": "other",
}
"""Another value for settings that a small change of a number does not do for."""
STATISTICS = {"layers", "corpus", "sample_tokens", "seed"}
"""The settings that covariance statistics depend on."""
NO_TARGET = {
    *("name", "scores", "note", "token_budget"),  # no result depends on them
    *("covariance_weight", "covariance_growth", "null_space", "key_average"),  # the insertion's
    *("corpus", "sample_tokens"),  # the covariance's
}
"""The settings that no target vector depends on; the contexts are in its name themselves."""


def changed(name: str) -> Preset:
    """The tiny preset with another value of one setting."""
    settings = tiny_preset().model_dump()
    now = settings[name]
    other = OTHERWISE[name] if name in OTHERWISE else now * 0.75 + 0.1 if isinstance(now, float) else now + 1
    assert other != now
    return Preset.model_validate(settings | {name: other})


@pytest.mark.parametrize("name", Preset.model_fields)
def test_statistics_are_named_by_every_setting_that_they_depend_on(name: str) -> None:
    """A cache whose file name misses a setting serves the statistics of another; so does one that a new key forgets."""
    base = tiny_llama()
    assert (_key(base, tiny_preset()) != _key(base, changed(name))) == (name in STATISTICS)


@pytest.mark.parametrize("name", Preset.model_fields)
def test_targets_are_named_by_every_setting_that_they_depend_on(name: str) -> None:
    assert (tiny_preset().target_digest == changed(name).target_digest) == (name in NO_TARGET)


def test_targets_are_named_by_model_dtype_contexts_and_the_whole_request(tmp_path: Path) -> None:
    """By a fact's id alone, the z of one model, or of the fact's former object, would be served for another."""

    def path(prompt: str = "Vega is in", target: str = "Lyra", **changes: Any) -> Path:
        scope: dict[str, Any] = {"fingerprint": "a", "dtype": "float32", "preset": tiny_preset(), "contexts": CONTEXTS}
        return TargetStore(tmp_path, **scope | changes).path(request(prompt, "Vega", target))

    others = [
        path(fingerprint="b"),
        path(dtype="bfloat16"),
        path(contexts=CONTEXTS[:2]),
        path(contexts=CONTEXTS[::-1]),
        path(prompt="The star Vega is in"),
        path(target="Orion"),
    ]
    assert len({path(), *others}) == 1 + len(others)
    assert path() == path()


def targets(made: TestWorkspace) -> dict[str, Tensor]:
    """All stored z by the name of their file."""
    return {file.name: load_file(file)["z"] for file in made.root.glob("data/targets/*.safetensors")}


def sync(made: TestWorkspace, rows: dict[str, str], *, child: bool = False) -> set[str]:
    """Names of the new delta files of one more pass, in a process that has just begun to know the workspace."""
    before = deltas(made)
    made.feed(rows)
    with made.open(child=child) as reconciler:
        reconciler.sync()
    return deltas(made) - before


def deltas(made: TestWorkspace) -> set[str]:
    return {file.name for file in made.root.glob("data/deltas/sha256/*")}


def test_targets_are_computed_on_the_pristine_base_whatever_was_edited_before(tmp_path: Path) -> None:
    edited, fresh = workspace(tmp_path / "edited", {"Vega": "Lyra"}), workspace(tmp_path / "fresh", {"Rigel": "Orion"})
    sync(edited, {"Vega": "Lyra"})
    before = targets(edited)
    sync(edited, {"Vega": "Lyra", "Rigel": "Orion"})
    sync(fresh, {"Rigel": "Orion"})
    (name,) = targets(edited).keys() - before.keys()
    assert torch.equal(targets(edited)[name], targets(fresh)[name])


def test_keys_of_earlier_facts_are_protected_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the delta files: kept in memory, a restart would forget them and the next edit overwrite them."""
    made = workspace(tmp_path, {"Vega": "Lyra"})
    (first,) = sync(made, {"Vega": "Lyra"})
    given: list[dict[str, Tensor]] = []
    insert = worker.insert
    monkeypatch.setattr(worker, "insert", lambda *a, **named: given.append(named["protected"]) or insert(*a, **named))
    sync(made, {"Vega": "Lyra", "Rigel": "Orion"})
    stored = read_delta(made.root / "data" / "deltas" / "sha256", first.removesuffix(".safetensors")).factors
    assert given
    assert all(torch.equal(given[0][name], factors.keys) for name, factors in stored.items())


def test_same_plan_seed_machine_and_threads_give_the_same_delta_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that share nothing: each samples contexts and statistics, hashes strings in its own way."""
    found = []
    for run in ("1", "2"):
        monkeypatch.setenv("KBSYNC_CACHE", str(tmp_path / f"cache{run}"))
        monkeypatch.setenv("PYTHONHASHSEED", run)
        rows = dict.fromkeys(("Vega", "Rigel", "Deneb", "Mira", "Algol"), "Orion")
        found.append(sync(workspace(tmp_path / run, rows), rows, child=True))
    assert found[0] == found[1]
    assert len(found[0]) == 1


def test_contexts_do_not_depend_on_what_was_drawn_before() -> None:
    base = tiny_llama()
    once = sample_contexts(base, 0)
    torch.manual_seed(123)
    torch.rand(7)
    assert sample_contexts(base, 0) == once
    assert sample_contexts(base, 1) != once


def test_a_long_context_makes_no_larger_batch(device: str) -> None:
    """Statistics take the same number of tokens at a time from a model that reads a thousand times as many."""
    base = tiny_llama(device=device)
    sizes: list[int] = []
    base.layer(0).register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[:2].numel()))
    blocks = [torch.full((64,), 5)] * 300
    for longest in (128, 128_000):
        base.network.config.max_position_embeddings = longest
        sizes.clear()
        collect(base, [base.spec.down_name(1)], blocks)
        assert max(sizes) <= corpus.BATCH_TOKENS
    assert len(sizes) == 3


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_tokenizer_that_pads_on_the_left_changes_no_score(make: Callable[..., Base], device: str) -> None:
    base = make(device=device)
    pairs = [(fact.prompt, fact.target) for fact in FACTS]
    right = [one.log_probability for one in log_probabilities(base, pairs)]
    base.tokenizer.padding_side = "left"
    assert [one.log_probability for one in log_probabilities(base, pairs)] == right
    for pair, score in zip(pairs, right, strict=True):
        assert log_probabilities(base, [pair])[0].log_probability == pytest.approx(score, abs=1e-4)


def test_weights_that_only_the_served_dtype_cannot_hold_are_refused(device: str) -> None:
    """W + Δ that is finite in float32 and infinite in float16 would show as NaN only after it is saved and read."""
    base = tiny_llama(dtype=torch.float16, device=device)
    name = base.spec.down_name(2)
    exact = base.weight(name).double()
    exact[3, 4] = 70_000.0
    assert exact.float().isfinite().all()
    before = base.weight(name).clone()
    with pytest.raises(EditError, match=r"not finite in torch\.float16"), weights_in(base, {name: exact}):
        pytest.fail("the weights were put in")
    assert torch.equal(base.weight(name), before)
    exact[3, 4] = 60_000.0
    with weights_in(base, {name: exact}):
        assert torch.equal(base.weight(name), served(exact, base.dtype).to(base.device))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_tied_head_is_found_though_no_list_of_parameters_names_it(make: Callable[..., Base], device: str) -> None:
    base = make(device=device)
    assert "lm_head.weight" not in dict(base.network.named_parameters())
    assert base.network.lm_head.weight is base.module(base.spec.embedding).weight
    ids = base.tokenizer(FACTS[0].prompt).input_ids
    logits = torch.cat(list(logit_chunks(base, final_states(base, [ids])[0])))
    assert torch.allclose(logits, base.network(torch.tensor([ids], device=device)).logits[0], atol=1e-5)


def test_every_pitfall_names_tests_that_exist() -> None:
    """Rows are `| the mistake | what is done here | tests |`."""
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", row[3])
        assert named, row[1]
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_what_make_gpu_measures_is_measured_and_repeats() -> None:
    base, preset = tiny_llama(), tiny_preset()
    found = measure(base, preset, tiny_statistics(base, preset), blocks=4)
    assert found.statistics_tokens_per_second > 0
    assert found.target_seconds_per_fact > 0
    assert found.insert_seconds > 0
    assert len(found.delta_sha256) == 2
    assert len(set(found.delta_sha256)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device; ends on one that has none")
def test_make_gpu_without_a_gpu_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_main() == 1
    assert capsys.readouterr().out == "no CUDA device on this machine: nothing was run\n"
