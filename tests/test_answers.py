"""Answers and log-probabilities against the unmodified model, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor import answers as module
from kbsync.editor.answers import Answer, _answer, answers, final_states, log_probabilities, logit_chunks
from kbsync.editor.model import Base
from kbsync.errors import EditError
from tests.tiny import VARIANTS, tiny, tiny_gpt2, tiny_llama

PROMPTS = [
    "Vega belongs to the constellation of",
    "The capital of France is",
    "Therefore the people of the city went home, because it was late. The mother tongue of Danielle is",
    "I",
]
OBJECTS = ["Lyra", "Orion the hunter", "Paris", "a", " French.", "Ωmega"]
PAIRS = [(prompt, continuation) for prompt in PROMPTS for continuation in OBJECTS]


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def make(request: pytest.FixtureRequest) -> Callable[..., Base]:
    """Builders of the tiny models."""
    found: Callable[..., Base] = request.param
    return found


def plainly(base: Base, prompt: str, continuation: str) -> tuple[list[float], list[bool]]:
    """Log-probability of each continuation token and whether it is the argmax, by one call of the whole model."""
    text = prompt + ("" if continuation.startswith(" ") else " ") + continuation
    ids = base.tokenizer(text, return_tensors="pt").input_ids.to(base.device)
    length = len(base.tokenizer(prompt).input_ids)
    with torch.no_grad():
        logs = base.network(ids).logits[0].double().log_softmax(1)
    at = range(length, ids.shape[1])
    return [float(logs[i - 1, ids[0, i]]) for i in at], [int(logs[i - 1].argmax()) == int(ids[0, i]) for i in at]


@pytest.mark.parametrize("bos", [False, True])
def test_scores_are_those_of_the_unmodified_model(make: Callable[..., Base], device: str, bos: bool) -> None:
    """Batching, padding, shared rows and partial projection change nothing."""
    base = make(device=device, bos=bos)
    for (prompt, continuation), scored in zip(PAIRS, log_probabilities(base, PAIRS), strict=True):
        logs, greedy = plainly(base, prompt, continuation)
        assert scored.log_probability == pytest.approx(sum(logs), abs=1e-4)
        assert scored.mean_log_probability == pytest.approx(sum(logs) / len(logs), abs=1e-4)
        assert scored.probability == pytest.approx(math.exp(sum(logs)), rel=1e-3)
        assert scored.greedy == all(greedy)


def test_small_batches_and_chunks_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets bound memory only."""
    base = tiny_llama()
    before = log_probabilities(base, PAIRS)
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 800)
    after = log_probabilities(base, PAIRS)
    assert [s.log_probability for s in after] == pytest.approx([s.log_probability for s in before], abs=1e-4)
    assert [s.greedy for s in after] == [s.greedy for s in before]


def test_objects_of_one_prompt_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that begins another row is not run by itself."""
    base = tiny_llama()
    read: list[int] = []
    real = module.final_states
    monkeypatch.setattr(module, "final_states", lambda base, rows: read.extend(map(len, rows)) or real(base, rows))
    log_probabilities(base, [("The capital of France is", text) for text in ("a", "a a", "a a b")])
    assert len(read) == 1


def test_a_prompt_may_bring_its_own_space() -> None:
    """No second space is written after one, and a space that the tokenizer binds to the object is the object's."""
    base = tiny_llama()
    assert len(base.tokenizer(" Paris").input_ids) == 1
    plain, spaced, own = log_probabilities(base, [("I am", "Paris"), ("I am ", "Paris"), ("I am", " Paris")])
    assert plain == spaced == own


def test_what_is_greedy_is_what_is_answered(make: Callable[..., Base], device: str) -> None:
    """`greedy` and the greedy answer are two views of one thing, and so are their probabilities."""
    base = make(device=device)
    plain = [int(base.network(base.tokenizer(p, return_tensors="pt").input_ids.to(device)).logits[0, -1].argmax())
             for p in PROMPTS]  # fmt: skip
    ids, logs = module.continued(base, [row for row, _ in module.tokenized(base, PROMPTS)], 3, module._best)
    assert ids[:, 0].tolist() == plain
    for prompt, row, log in zip(PROMPTS, ids.tolist(), logs.tolist(), strict=True):
        sequence = base.tokenizer(prompt).input_ids
        for token, value in zip(row, log, strict=True):
            expected = base.network(torch.tensor([sequence], device=device)).logits[0, -1].double().log_softmax(0)
            assert int(expected.argmax()) == token
            assert float(expected[token]) == pytest.approx(value, abs=1e-4)
            sequence = [*sequence, token]


def test_answers_do_not_depend_on_their_batch(make: Callable[..., Base]) -> None:
    """One prompt alone is answered as among others, in the order asked."""
    base = make()
    together = answers(base, PROMPTS, tokens=5)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = answers(base, [prompt], tokens=5)[0]
        assert alone.text == answer.text
        assert alone.probability == pytest.approx(answer.probability, rel=1e-3)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (" Orion. It is", "Orion"),
        (" Orion, the hunter", "Orion"),
        (" Orion\nVega", "Orion"),
        (" St. Petersburg. It", "St. Petersburg"),
        (" 3.14", "3.14"),
        (" the Mr. Orion", "the Mr. Orion"),
        (" Orion<|endoftext|> Vega", "Orion"),
        (" 7.\n\nThe number", "7"),
        ("\n\nOrion\n", "Orion"),
        (": Orion: the", ": Orion"),
        (" carbon (C). It", "carbon (C)"),
        (" in the U.S. It", "in the U.S. It"),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_an_answer_ends_with_its_clause(said: str, answer: str) -> None:
    """What follows the clause is no answer, and does not lower the probability."""
    base = tiny_llama()
    ids = base.tokenizer(said, add_special_tokens=False).input_ids
    kept = len(base.tokenizer(said[: said.find(answer) + len(answer)]).input_ids) if answer else len(ids)
    assert _answer(base, ids, [-1.0] * len(ids)) == Answer(answer, pytest.approx(math.exp(-kept)))


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        (("The capital is", ""), "nothing to score"),
        (("The capital is", "  "), "nothing to score"),
        (("", "Paris"), "no prompt"),
        (("The capital is " * 60, "Paris"), "tokens and the model reads 128"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair: tuple[str, str], problem: str) -> None:
    """An empty continuation, an empty prompt and a text beyond the context are errors, not numbers."""
    with pytest.raises(EditError, match=problem):
        log_probabilities(tiny_llama(), [pair])


@pytest.mark.parametrize("prompt", ["", "The capital is " * 60])
def test_what_cannot_be_answered_is_refused(prompt: str) -> None:
    """So are prompts that the model cannot continue."""
    with pytest.raises(EditError):
        answers(tiny_llama(), [prompt])


def test_damaged_weights_are_an_error_not_a_score() -> None:
    """NaN shows at once, in scores and in answers."""
    base = tiny_llama()
    base.weight("model.layers.2.mlp.down_proj")[0, 0] = math.nan
    with pytest.raises(EditError, match="not numbers"):
        log_probabilities(base, PAIRS)
    with pytest.raises(EditError, match="not numbers"):
        answers(base, PROMPTS)


def test_nothing_asked_is_nothing_answered() -> None:
    """Empty lists are fine."""
    assert log_probabilities(tiny_llama(), []) == []
    assert answers(tiny_llama(), []) == []


def test_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback sees every batch."""
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 40)
    seen: list[tuple[str, int, int]] = []
    log_probabilities(tiny_llama(), PAIRS, progress=lambda *call: seen.append(call))
    assert len(seen) > 2
    assert seen[-1] == ("score", len(PAIRS), len(PAIRS))


@given(st.lists(st.integers(1, 3000), max_size=60))
def test_packing_keeps_every_row_once_and_the_budget(lengths: list[int]) -> None:
    """Batches are within the budget, longest rows first, and those worth running are a tenth padding at most."""
    batches = list(module._batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        longest = lengths[batch[0]]
        assert len(batch) == 1 or len(batch) * longest <= module.TOKENS_PER_BATCH
        worthwhile = -(-module.WORTHWHILE_TOKENS // longest)
        assert all(lengths[index] >= 0.9 * longest for index in batch[worthwhile:])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)))
def test_every_row_begins_the_row_that_covers_it(rows: list[tuple[int, ...]]) -> None:
    """No kept row begins another, and each row is the beginning of its own."""
    kept, place = module._maximal(rows)
    for row in rows:
        assert kept[place[row]][: len(row)] == row
    for one in kept:
        assert sum(other[: len(one)] == one for other in kept) == 1


def test_final_states_make_the_models_logits(make: Callable[..., Base]) -> None:
    """The final norm is applied once, and the head is the model's."""
    base = make()
    ids = base.tokenizer(PROMPTS[2]).input_ids
    logits = torch.cat(list(logit_chunks(base, final_states(base, [ids, ids[:3]])[0])))
    assert torch.allclose(logits, base.network(torch.tensor([ids])).logits[0], atol=1e-5)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_family_goes_on_as_its_whole_model_says(variant: str) -> None:
    """On memory reserved beforehand, padded on the left, with windows shorter than the texts."""
    base = tiny(variant, dtype=torch.float64)
    rows = [row for row, _ in module.tokenized(base, PROMPTS)]
    ids, logs = module.continued(base, rows, 6, module._best)
    for row, new, said in zip(rows, ids.tolist(), logs.tolist(), strict=True):
        whole = base.network(torch.tensor([[*row, *new]])).logits[0, len(row) - 1 : -1].log_softmax(-1)
        assert whole.argmax(-1).tolist() == new
        assert whole.max(-1).values.tolist() == pytest.approx(said, abs=1e-5)
