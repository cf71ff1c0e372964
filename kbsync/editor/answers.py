"""What a model says after a prompt: its greedy answer, and how probable given continuations are. Batched and exact.

Prompts are sorted by length and packed by token budget. Scoring pads on the right: under causal attention a padded
position reaches no real one. A row that is the beginning of another row is not run by itself, so most pairs of objects
of one prompt cost one row; the vocabulary projection is done only where a continuation's token is predicted.

    answers(base, ["The capital of France is"])[0].text                          # "Paris"
    log_probabilities(base, [("The capital of France is", "Paris")])[0].greedy   # True
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache

from kbsync.editor.model import Base
from kbsync.errors import EditError
from kbsync.progress import Progress, silent

__all__ = [
    "Answer",
    "Scored",
    "answers",
    "check_length",
    "continued",
    "final_states",
    "log_probabilities",
    "logit_chunks",
    "readable",
    "tokenized",
]

TOKENS_PER_BATCH = 2048
"""Tokens of one forward pass, padding included: bounds memory; larger is no faster on a CPU."""
WORTHWHILE_TOKENS = 128
"""A smaller forward pass would cost more by its overhead than it saves of padding."""
LOGITS_PER_CHUNK = 2**24
"""Numbers of one block of logits (64 MiB in float32): the whole answer of [2000, vocabulary] is never in memory."""
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of logits [rows, vocabulary], the next token of each row [rows] and a number about it [rows]."""
_CLAUSE_END = re.compile(r"(?<=[^\s.]{3})\.(?=\s|$)|(?<=\S)[,;:!?](?=\s|$)|\.?\n")
"""Where an answer ends. A full stop after fewer than three letters does not end it: "St. Petersburg"."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's greedy continuation up to the end of the clause, and the joint probability of its tokens."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probability of a continuation in nats: per token, and of the whole. `accuracy`: the share of its tokens that
    are the most probable one, each after those before it."""

    mean_log_probability: float
    log_probability: float
    accuracy: float

    @property
    def greedy(self) -> bool:
        """Whether the greedy continuation of the prompt starts with it: each of its tokens is the most probable one."""
        return self.accuracy == 1.0

    @property
    def probability(self) -> float:
        """Probability of the whole continuation."""
        return math.exp(self.log_probability)


@dataclass(frozen=True, slots=True)
class _Query:
    """The tokens of a prompt with its continuation, which begins at token `start`."""

    tokens: tuple[int, ...]
    start: int

    @property
    def row(self) -> tuple[int, ...]:
        """What the model must read: the last token is only predicted."""
        return self.tokens[:-1]


@torch.no_grad()
def final_states(base: Base, rows: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states after the final norm, [rows, longest, d] in the model's dtype; what lies right of a row's end is
    padding and means nothing."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    found: Tensor = base.network.base_model(
        input_ids=ids.to(base.device), attention_mask=mask.to(base.device), use_cache=False
    ).last_hidden_state
    return found


@torch.no_grad()
def logit_chunks(base: Base, states: Tensor) -> Iterator[Tensor]:
    """Logits [chunk, vocabulary] of final states [m, d], in order, few enough at a time for the memory."""
    for chunk in torch.split(states, max(1, LOGITS_PER_CHUNK // int(base.network.config.vocab_size))):
        yield base.logits(chunk)


def log_probabilities(base: Base, pairs: Sequence[tuple[str, str]], *, progress: Progress = silent) -> list[Scored]:
    """How probable each (prompt, continuation) is, the continuation as it is written after the prompt: with a space
    between unless one of them brings white space, all its tokens, tokenised together with the prompt.

    Raises EditError for an empty continuation, a text longer than the model's context, and probabilities that are not
    numbers (damaged weights).
    """
    queries = _queries(base, pairs)
    rows, row_of = _maximal([query.row for query in queries])
    askers: list[list[int]] = [[] for _ in rows]
    for index, query in enumerate(queries):
        askers[row_of[query.row]].append(index)
    scored: dict[int, Scored] = {}
    for batch in _batches([len(row) for row in rows]):
        states = final_states(base, [rows[index] for index in batch])
        asked = [(place, asker) for place, index in enumerate(batch) for asker in askers[index]]
        found = _score(base, states, [(place, queries[asker]) for place, asker in asked])
        scored.update(zip((asker for _, asker in asked), found, strict=True))
        progress("score", len(scored), len(queries))
    return [scored[index] for index in range(len(queries))]


def answers(base: Base, prompts: Sequence[str], *, tokens: int = 8, progress: Progress = silent) -> list[Answer]:
    """The greedy continuation of each prompt, at most `tokens` tokens, cut at the end of its clause.

    Plain argmax at every step, whatever generation settings came with the model. Raises EditError for an empty prompt,
    one that leaves no room in the model's context, and probabilities that are not numbers.
    """
    rows = [row for row, _ in tokenized(base, prompts)]
    for prompt, row in zip(prompts, rows, strict=True):
        check_length(base, len(row) + tokens, prompt)
        if not row:
            raise EditError(f"prompt {prompt!r} has no tokens", hint="write something for the model to continue")
    found: dict[int, Answer] = {}
    for batch in _batches([len(row) + tokens for row in rows]):
        ids, log_probs = continued(base, [rows[index] for index in batch], tokens, _best)
        for place, index in enumerate(batch):
            found[index] = _answer(base, ids[place].tolist(), log_probs[place].tolist())
        progress("answer", len(found), len(rows))
    return [found[index] for index in range(len(rows))]


def tokenized(base: Base, texts: Sequence[str]) -> list[tuple[tuple[int, ...], list[int]]]:
    """For each text its tokens and the character that each ends before; special tokens after the text are left off."""
    if not texts:
        return []
    encoded = base.tokenizer(list(texts), return_offsets_mapping=True)
    found = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ends = [end for _, end in offsets]
        while ids and ends and ends[-1] == 0 and max(ends) > 0:
            ends.pop()
        found.append((tuple(ids[: len(ends)]), ends))
    return found


def readable(base: Base, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the model reads each prompt together with its continuation: they are not longer than its context."""
    texts = [_written(prompt, continuation) for prompt, continuation in pairs]
    return [len(ids) <= base.max_tokens for ids, _ in tokenized(base, texts)] if texts else []


def _queries(base: Base, pairs: Sequence[tuple[str, str]]) -> list[_Query]:
    queries: list[_Query] = []
    texts = [_written(prompt, continuation) for prompt, continuation in pairs]
    for (prompt, continuation), (ids, ends) in zip(pairs, tokenized(base, texts), strict=True):
        start = next((index for index, end in enumerate(ends) if end > len(prompt)), len(ids))
        if not continuation.strip() or start == len(ids):
            raise EditError(f"nothing to score after {prompt!r}", hint="the continuation must have a token")
        if start == 0:
            raise EditError(f"no prompt before {continuation!r}", hint="the prompt must have a token")
        check_length(base, len(ids), texts[len(queries)])
        queries.append(_Query(ids, start))
    return queries


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows in batches, longest first, each with rows x longest <= TOKENS_PER_BATCH (a longer row goes
    alone). A batch that is worthwhile also ends where rows get a tenth shorter, so that little is padding (2 % on
    CounterFact)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        size, longest = len(batch), lengths[batch[0]] if batch else 0
        shorter = lengths[index] < 0.9 * longest and size * longest >= WORTHWHILE_TOKENS
        if batch and (shorter or (size + 1) * longest > TOKENS_PER_BATCH):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _written(prompt: str, continuation: str) -> str:
    spaced = prompt[-1:].isspace() or continuation[:1].isspace()
    return prompt + ("" if spaced else " ") + continuation


def check_length(base: Base, length: int, text: str) -> None:
    """Raises EditError where a text of `length` tokens is longer than the model reads."""
    if length > (limit := base.max_tokens):
        raise EditError(
            f"{text[:60]!r}… needs {length} tokens and the model reads {limit}", hint="shorten the prompt's template"
        )


def _maximal(rows: Iterable[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The rows that begin no other row, and for every row the index of one that begins with it (or is it).

    In sorted order all rows that begin with x follow x at once, so the next one tells.
    """
    kept: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}
    for row in sorted(set(rows), reverse=True):
        if not kept or kept[-1][: len(row)] != row:
            kept.append(row)
        place[row] = len(kept) - 1
    return kept, place


def _score(base: Base, states: Tensor, asked: Sequence[tuple[int, _Query]]) -> list[Scored]:
    """Scores of queries, each with its row in `states` [rows, longest, d]."""
    places = [(row, at - 1) for row, query in asked for at in range(query.start, len(query.tokens))]
    targets = torch.tensor([token for _, query in asked for token in query.tokens[query.start :]], device=base.device)
    index = torch.tensor(places, device=base.device)  # [m, 2]
    wanted = states[index[:, 0], index[:, 1]]  # [m, d]
    values: list[float] = []
    greedy: list[bool] = []
    for logits in logit_chunks(base, wanted):
        target = targets[len(values) : len(values) + len(logits)]
        values += (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).tolist()
        greedy += (logits.argmax(1) == target).tolist()
    found = []
    at = 0
    for _, query in asked:
        end = at + len(query.tokens) - query.start
        found.append(_scored(values[at:end], greedy[at:end]))
        at = end
    return found


def _scored(values: Sequence[float], greedy: Sequence[bool]) -> Scored:
    total = math.fsum(values)
    _check_number(total)
    return Scored(mean_log_probability=total / len(values), log_probability=total, accuracy=sum(greedy) / len(greedy))


def _check_number(log_probability: float) -> None:
    if math.isnan(log_probability):
        raise EditError("the model's probabilities are not numbers", hint="kbsync verify")


@torch.no_grad()
def continued(base: Base, rows: Sequence[Sequence[int]], tokens: int, choose: Choose) -> tuple[Tensor, Tensor]:
    """The next `tokens` tokens of each row and what `choose` says of them, both [rows, tokens].

    Padded on the left, so that all rows go on in the same column; positions count from each row's own first token.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    ids, mask = ids.to(base.device), mask.to(base.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Memory for all tokens at once: a cache that grows would be copied whole at every step.
    past = {base.cache_name: StaticCache(config=base.network.config, max_cache_len=longest + tokens)}
    chosen, said = [], []
    for _ in range(tokens):
        states = base.network.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **past
        ).last_hidden_state
        token, value = choose(torch.cat(list(logit_chunks(base, states[:, -1]))))
        ids = token[:, None]  # [rows, 1]
        chosen.append(ids)
        said.append(value[:, None])
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(chosen, dim=1), torch.cat(said, dim=1)


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each row [n, vocabulary] and its log-probability."""
    value, token = logits.max(1)
    return token, value - logits.logsumexp(1)


def _answer(base: Base, ids: list[int], log_probs: list[float]) -> Answer:
    _check_number(math.fsum(log_probs))
    special = set(base.tokenizer.all_special_ids)
    length = next((at for at, token in enumerate(ids) if token in special), len(ids))
    text = _decode(base, ids[:length])
    first = re.search(r"\w", text)
    if first and (end := _CLAUSE_END.search(text, first.start())):
        text = text[: end.start()]
        length = next(at for at in range(1, length + 1) if len(_decode(base, ids[:at])) >= len(text))
    return Answer(text=text.strip(), probability=math.exp(math.fsum(log_probs[:length])))


def _decode(base: Base, ids: list[int]) -> str:
    text: str = base.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
