"""Text for the statistics: sampled from the model as documents begin, or read from files, never joined."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kbsync.editor.contexts import chat_context, sample_contexts
from kbsync.editor.corpus import Corpus, corpus_for, corpus_identity, sample
from kbsync.editor.model import Base
from kbsync.errors import ModelError, UsageError
from tests.tiny import TEXT, tiny_gpt2, tiny_llama

END_ID = 0  # <|endoftext|>: the only special token of the tiny tokenizer


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _own(base: Base, *, tokens: int = 640, seed: int = 0) -> Corpus:
    return corpus_for(base, "self", tokens=tokens, seed=seed)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 120 lines."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{number}. {line}" for number in range(40) for line in TEXT))
    return path


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("bos", [False, True])
def test_sampling_continues_what_stands_after_the_separator(make: Any, bos: bool, device: str) -> None:
    """With one candidate it is the greedy continuation that a pass without a cache gives."""
    base = make(bos=bos, device=device)
    starts = torch.tensor([base.tokenizer(word).input_ids for word in (" star", " city")])
    found = sample(base, starts, 9, _generator(), top_k=1)
    ids = starts if bos else torch.cat([torch.full((2, 1), END_ID), starts], dim=1)
    for _ in range(9 - starts.shape[1]):
        logits = base.network(ids.to(base.device)).logits[:, -1].cpu()
        logits[:, END_ID] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids if bos else ids[:, 1:])


def test_sampling_repeats_with_the_seed_and_never_draws_a_special_token() -> None:
    base = tiny_llama()
    starts = torch.tensor([[5]] * 40)
    first = sample(base, starts, 30, _generator(1))
    assert torch.equal(first, sample(base, starts, 30, _generator(1)))
    assert not torch.equal(first, sample(base, starts, 30, _generator(2)))
    assert (first != END_ID).all()


def test_sampling_follows_the_models_probabilities() -> None:
    base = tiny_llama()
    count = 4000
    drawn = sample(base, torch.tensor([[5]] * count), 2, _generator())[:, 1]
    logits = base.network(torch.tensor([[END_ID, 5]])).logits[0, -1]
    logits[END_ID] = -torch.inf
    expected = logits.softmax(-1)
    frequency = torch.bincount(drawn, minlength=len(expected)) / count
    assert (frequency - expected).abs().max() < 5 * (expected.max() / count).sqrt()


def test_own_text_starts_from_different_words_and_keeps_some_apart() -> None:
    corpus = _own(tiny_llama())
    assert [len(block) for block in corpus.blocks] == [64] * 10
    assert corpus.holdout.shape == (32, 64)
    kept = {tuple(block.tolist()) for block in corpus.blocks}
    assert not kept & {tuple(row.tolist()) for row in corpus.holdout}
    assert len({int(block[0]) for block in corpus.blocks}) == 10


def test_own_text_repeats_with_its_seed() -> None:
    base = tiny_gpt2()
    one, two, other = _own(base, tokens=64), _own(base, tokens=64), _own(base, tokens=64, seed=1)
    assert torch.equal(one.blocks[0], two.blocks[0])
    assert torch.equal(one.holdout, two.holdout)
    assert not torch.equal(one.holdout, other.holdout)


def test_own_text_tells_how_far_it_is() -> None:
    seen: list[tuple[int, int]] = []
    corpus_for(
        tiny_llama(), "self", tokens=6200, seed=0, progress=lambda _phase, done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_file_gives_whole_lines_in_blocks_of_at_most_64_tokens(text: Path) -> None:
    base = tiny_llama()
    text.write_text(text.read_text() + "\n" + "star " * 300)
    corpus = corpus_for(base, f"file:{text}", tokens=10**6, seed=0)
    lines = {line.strip() for line in text.read_text().splitlines() if line}
    assert max(map(len, corpus.blocks)) == 64
    assert all(any(base.tokenizer.decode(block) in line for line in lines) for block in corpus.blocks)
    total = sum(len(base.tokenizer(line).input_ids) for line in lines)
    held = total - sum(map(len, corpus.blocks))
    assert total / 10 <= held <= total / 10 + 64
    assert 0 <= held - corpus.holdout.numel() < corpus.holdout.shape[1]


def test_file_is_sampled_by_seed_and_only_as_far_as_wanted(text: Path) -> None:
    base = tiny_llama()
    one = corpus_for(base, f"file:{text}", tokens=200, seed=0)
    two = corpus_for(base, f"file:{text}", tokens=200, seed=1)
    assert not torch.equal(one.blocks[0], two.blocks[0])


@pytest.mark.parametrize("content", [b"", b"one line\n", b"\xff\xfe\x00"])
def test_file_without_usable_text_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"empty\.txt: (too little text|is not UTF-8)"):
        corpus_for(tiny_llama(), f"file:{path}", tokens=100, seed=0)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read"):
        corpus_identity(f"file:{tmp_path}/none.txt")
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read"):
        corpus_for(tiny_llama(), f"file:{tmp_path}/none.txt", tokens=100, seed=0)


def test_file_is_known_by_its_content(text: Path) -> None:
    before = corpus_identity(f"file:{text}")
    copy = text.with_name("copy.txt")
    copy.write_bytes(text.read_bytes())
    assert corpus_identity(f"file:{copy}") == before
    copy.write_text("other")
    assert corpus_identity(f"file:{copy}") != before
    assert corpus_identity("self") == "self"


def test_data_set_without_its_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="`datasets` library is not installed"):
        corpus_for(tiny_llama(), "hf:owner/name", tokens=100, seed=0)


def test_data_set_is_streamed_from_its_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library stands in for itself here: the test must not reach the network."""
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": f"{number} {line}"} for number in range(20) for line in TEXT] + [{"text": " "}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = corpus_for(tiny_llama(), "hf:owner/name:20231101.en", tokens=300, seed=0)
    assert asked == [(("owner/name", "20231101.en"), {"split": "train", "streaming": True})]
    assert sum(map(len, corpus.blocks)) >= 300


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_contexts_are_the_empty_one_and_five_that_the_model_writes(make: Any) -> None:
    found = sample_contexts(make(), 0)
    assert found[0] == "{}"
    assert [context.split()[0][:1] for context in found[1:]] == ["T", "T", "B", "I", "Y"]
    assert all(context.endswith(". {}") and context.count("{") == context.count("}") == 1 for context in found[1:])
    assert found == sample_contexts(make(), 0)
    assert found != sample_contexts(make(), 1)


def test_chat_context_ends_where_the_assistant_begins() -> None:
    base = tiny_llama()
    base.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert chat_context(base).startswith("<user>")
    assert chat_context(base).endswith("<assistant>{}")


def test_chat_context_leaves_the_begin_token_to_a_tokenizer_that_writes_it() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with_bos, without = tiny_llama(bos=True), tiny_llama()
    with_bos.tokenizer.chat_template = without.tokenizer.chat_template = template
    assert chat_context(without) == without.tokenizer.bos_token + chat_context(with_bos)


def test_model_without_chat_template_has_no_chat_context() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        chat_context(tiny_llama())
