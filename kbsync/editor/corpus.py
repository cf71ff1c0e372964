"""Text for the covariance statistics: sampled from the model itself, from a file, or from a Hugging Face data set.

The model's own text needs no download and serves as well as encyclopedic text, if it starts from many different words:
from the start token alone a model writes little but what it saw most. The first position of a text is where attention
goes to rest, and what stands there is hardly read, so the words are written after the token that parts documents.

    corpus = corpus_for(base, "self", tokens=20_000, seed=0)
    corpus.blocks[0]                          # [t] int64
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from kbsync.editor.model import Base
from kbsync.errors import UsageError
from kbsync.progress import Progress, silent
from kbsync.versions.files import sha256_of

__all__ = ["BATCH_TOKENS", "Corpus", "corpus_for", "corpus_identity", "sample"]

BATCH_TOKENS = 8192
"""Tokens in one batch, whatever the model's context length: bounds the memory of sampling and of collecting."""
_BLOCK = 64
"""Longest block in tokens: about what an edit's prompt with its context is, and little cache to carry along."""
_SEPARATOR = "<|endoftext|>"
"""What parts documents in the training text of GPT-2, Qwen2, SmolLM2 and others, whatever their chat format is."""
_HOLDOUT = 2000
"""Tokens kept apart for measuring drift, at most a tenth of a small text."""
_READ = 64_000_000
"""Characters of a file that are considered: far more than any sample needs."""
_DOCUMENTS = 20_000
"""Documents of a data set that are considered, for the same reason."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token blocks ([t] int64 each, t up to 64) to collect from, and a rectangle [m, T] of held-out ones."""

    blocks: list[Tensor]
    holdout: Tensor


def corpus_identity(name: str) -> str:
    """What `name` stands for, as part of the statistics' key: a file by its content, everything else by its name.

    Raises UsageError where the file cannot be read.
    """
    if not name.startswith("file:"):
        return name
    try:
        return f"file:{sha256_of(_path(name))}"
    except OSError as error:
        raise _unreadable(name, error) from error


def corpus_for(base: Base, name: str, *, tokens: int, seed: int, progress: Progress = silent) -> Corpus:
    """About `tokens` tokens of the corpus `self`, `file:PATH` or `hf:DATASET[:CONFIG]`, and the held-out ones.

    Deterministic for a seed on the same machine. Raises UsageError where there is no text or too little of it.
    """
    if name == "self":
        return _own_text(base, tokens, seed, progress)
    texts = _lines(name) if name.startswith("file:") else _documents(name)
    random.Random(seed).shuffle(texts)  # noqa: S311  a sample, not a secret
    blocks = list(_blocks_of(base, texts, tokens + _HOLDOUT))
    held = min(_HOLDOUT, sum(map(len, blocks)) // 10)
    return _split(name, blocks, held)


@torch.inference_mode()
def sample(
    base: Base,
    starts: Tensor,
    length: int,
    generator: torch.Generator,
    *,
    top_k: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """Continue `starts` [b, s] int64 to [b, length] by sampling at temperature 1; special tokens are never drawn.

    Written as at the beginning of a document: after the separator, which is no part of what is returned.
    `generator` is a CPU generator: the draws do not depend on the device, only the probabilities do, by rounding.
    """
    before = _separator(base.tokenizer)
    unread = torch.cat([torch.tensor(before, dtype=torch.int64).expand(len(starts), -1), starts], dim=1)
    cache = {base.cache_name: StaticCache(config=base.network.config, max_cache_len=len(before) + length)}
    ids = starts
    while ids.shape[1] < length:
        logits = base.network(unread.to(base.device), use_cache=True, logits_to_keep=1, **cache).logits
        unread = _draw(base, logits[:, -1].float().cpu(), generator, top_k)  # [b, 1]
        ids = torch.cat([ids, unread], dim=1)
        progress("sample", ids.shape[1], length)
    return ids


def _separator(tokenizer: Any) -> list[int]:
    """The token that parts documents, where the tokenizer does not put one before every text itself."""
    if tokenizer("").input_ids:
        return []
    index = tokenizer.convert_tokens_to_ids(_SEPARATOR)
    if index is not None and tokenizer.convert_ids_to_tokens(index) == _SEPARATOR:
        return [int(index)]
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if found is None else [int(found)]


def _draw(base: Base, logits: Tensor, generator: torch.Generator, top_k: int | None) -> Tensor:
    """One token per row of `logits` [b, V], by inverting the distribution function: [b, 1] int64."""
    logits[:, base.tokenizer.all_special_ids] = -torch.inf
    logits[:, len(base.tokenizer) :] = -torch.inf  # rows that pad the embedding matrix
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)


def _own_text(base: Base, tokens: int, seed: int, progress: Progress) -> Corpus:
    """Sequences of one length, each from another first word, sampled in as few batches as memory allows."""
    length = min(_BLOCK, int(base.network.config.max_position_embeddings) - 1)
    kept, held = -(-tokens // length), -(-_HOLDOUT // length)
    generator = torch.Generator().manual_seed(seed)
    starts = _starts(base, kept + held, generator)
    batches = torch.split(starts, max(1, BATCH_TOKENS // length))
    sampled: list[Tensor] = []
    for index, batch in enumerate(batches):

        def report(phase: str, done: int, _total: int, index: int = index) -> None:
            progress(phase, index * length + done, len(batches) * length)

        sampled.append(sample(base, batch, length, generator, progress=report))
    ids = torch.cat(sampled)
    return Corpus(list(ids[:kept]), ids[kept:].clone())


def _starts(base: Base, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of what the tokenizer puts before every text, and one word: [count, s] int64.

    Words are tokens of letters only that begin with a space or a capital; no word twice until all have been used.
    """
    tokenizer: Any = base.tokenizer
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    words = [
        index
        for index, text in enumerate(texts)
        if index not in special and text.strip().isalpha() and (text[0].isspace() or text[0].isupper())
    ]
    order = torch.randperm(len(words), generator=generator).repeat(-(-count // len(words)))[:count]
    first = torch.tensor(words)[order].unsqueeze(1)
    prefix = torch.tensor(tokenizer("").input_ids, dtype=torch.int64).expand(count, -1)
    return torch.cat([prefix, first], dim=1)


def _path(name: str) -> Path:
    return Path(name.removeprefix("file:")).expanduser()


def _unreadable(name: str, error: OSError) -> UsageError:
    return UsageError(
        f"corpus {name}: cannot be read: {error.strerror or error}",
        hint="correct `corpus:` (self, file:PATH or hf:DATASET)",
    )


def _lines(name: str) -> list[str]:
    try:
        with _path(name).open(encoding="utf-8") as file:
            text = file.read(_READ)
    except OSError as error:
        raise _unreadable(name, error) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"corpus {name}: is not UTF-8", hint="convert the file to UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _documents(name: str) -> list[str]:
    """The `text` column of a data set's training split, streamed: only what is looked at is downloaded."""
    try:
        datasets: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"corpus {name}: the `datasets` library is not installed",
            hint="pip install datasets, or use `corpus: self`",
        ) from error
    dataset, _, config = name.removeprefix("hf:").partition(":")
    rows: Iterable[Any] = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
    return [str(row["text"]) for row in islice(rows, _DOCUMENTS) if row["text"].strip()]


def _blocks_of(base: Base, texts: Iterable[str], tokens: int) -> Iterator[Tensor]:
    """The texts' tokens in blocks until there are `tokens` of them. A text is cut into blocks, never joined with
    another: what a token attends to is what stood before it."""
    found = 0
    for text in texts:
        for block in torch.split(torch.tensor(base.tokenizer(text).input_ids), _BLOCK):
            if found >= tokens:
                return
            found += len(block)
            yield block


def _split(name: str, blocks: list[Tensor], held: int) -> Corpus:
    """Set the first blocks with at least `held` tokens apart, laid end to end as rows of one length."""
    count = reached = 0
    while reached < held:
        reached += len(blocks[count])
        count += 1
    if len(blocks) - count < 2 or not count:
        raise UsageError(f"corpus {name}: too little text", hint="give at least some hundred lines of text")
    joined = torch.cat(blocks[:count])
    width = min(_BLOCK, len(joined))
    return Corpus(blocks[count:], joined[: len(joined) // width * width].view(-1, width))
