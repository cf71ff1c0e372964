"""Sampled texts, their entropy and their likeness to reference texts, each against a plain computation."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.generation import TOP_K, entropy, score_generation, written
from kbsync.editor.model import Base
from kbsync.errors import EditError, UsageError
from kbsync.facts import EditRequest, FactKey
from tests.tiny import tiny_gpt2, tiny_llama

PROMPTS = ["Vega is", "The capital of France is a", "I think that you are a star. The people", "Vega"]


def record(generation: tuple[str, ...], references: tuple[str, ...] = ()) -> CounterFactRecord:
    """A record of which only the texts matter."""
    request = EditRequest(FactKey("r", "Vega"), "Vega is in", "Vega", "Lyra")
    return CounterFactRecord(request, "Orion", (), generation, (), references)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_every_token_is_one_of_the_most_probable_and_chosen_by_its_own_draw(
    make: Callable[..., Base], device: str
) -> None:
    """Followed one token at a time through the whole model: the draw falls into the chosen token's share."""
    base = make(device=device, dtype=torch.float64)
    texts = written(base, PROMPTS, tokens=30, seed=3)
    for prompt in PROMPTS:
        ids = base.tokenizer(prompt).input_ids
        plain = _followed(base, ids, 30, _draws(3, prompt, 30))
        assert texts[prompt] == base.tokenizer.decode(plain, skip_special_tokens=True)


def _draws(seed: int, prompt: str, count: int) -> list[float]:
    text = json.dumps([seed, prompt], separators=(",", ":"))
    number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    return torch.rand(count, generator=torch.Generator().manual_seed(number)).tolist()


def _followed(base: Base, ids: list[int], length: int, draws: list[float]) -> list[int]:
    for draw in draws[: length - len(ids)]:
        logits = base.network(torch.tensor([ids], device=base.device)).logits[0, -1].float()
        best = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[:TOP_K]
        weights = [math.exp(float(logits[token] - logits[best[0]])) for token in best]
        ids = [*ids, best[bisect(list(accumulate(weights)), draw * sum(weights))]]
    return ids


def test_a_text_does_not_depend_on_the_others_but_on_the_seed() -> None:
    base = tiny_llama()
    together = written(base, PROMPTS, tokens=30)
    assert written(base, [PROMPTS[1]], tokens=30)[PROMPTS[1]] == together[PROMPTS[1]]
    assert written(base, PROMPTS, tokens=30, seed=1) != together


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(EditError, match="has 1 tokens, a text 1"):
        written(tiny_llama(), ["a"], tokens=1)


def test_the_entropy_of_different_words_is_the_logarithm_of_their_number() -> None:
    """Nine different words: 8 bigrams, 7 trigrams, each once."""
    text = "one two three four five six seven eight nine"
    assert entropy(text) == pytest.approx(2 / 3 * math.log2(8) + 4 / 3 * math.log2(7))


def test_a_text_that_repeats_itself_has_little_entropy() -> None:
    assert entropy("and and and and and") == 0
    assert entropy("one") == entropy("") == 0
    assert entropy("a b " * 20) < entropy("a b c d e f g h i j k l m n o p q r s t " * 2)


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=30))
def test_entropy_is_eqn_27(words: list[str]) -> None:
    def plain(n: int) -> float:
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        return -sum(c / len(grams) * math.log2(c / len(grams)) for c in Counter(grams).values())

    assert entropy(" ".join(words)) == pytest.approx(2 / 3 * plain(2) + 4 / 3 * plain(3), abs=1e-9)


def test_punctuation_marks_are_words_of_their_own() -> None:
    assert entropy("a, b.") == entropy("a , b .")


def test_a_records_entropy_is_half_the_mean_over_its_different_prompts() -> None:
    base = tiny_llama()
    (found,) = score_generation(base, [record((PROMPTS[0], PROMPTS[1], PROMPTS[0]))])["generation_entropy"]
    texts = written(base, PROMPTS[:2])
    assert found == pytest.approx(sum(entropy(texts[prompt]) for prompt in PROMPTS[:2]) / 4)


def test_a_record_without_prompts_has_no_entropy_and_without_references_no_score() -> None:
    found = score_generation(tiny_llama(), [record(()), record(("Vega is",))])
    assert math.isnan(found["generation_entropy"][0])
    assert found.keys() == {"generation_entropy"}


def test_the_reference_score_is_the_cosine_of_tf_idf_vectors() -> None:
    """idf of scikit-learn's default, ln((1 + n) / (1 + df)) + 1, computed by hand on words of two letters or more."""
    base = tiny_llama()
    references = [("the people of the city", "a star is of the city"), ("it was late",)]
    records = [record(("Vega is",), references[0]), record((PROMPTS[2],), references[1]), record(("Vega",))]
    found = score_generation(base, records)["reference_score"]
    texts = written(base, [prompt for one in records for prompt in one.generation])
    documents = [text for group in references for text in group]
    for at, one in enumerate(records[:2]):
        other = " ".join(one.references)
        assert found[at] == pytest.approx(_cosine(texts[one.generation[0]], other, documents), abs=1e-9)
    assert math.isnan(found[2])
    assert found[1] >= 0


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())


def _cosine(one: str, other: str, documents: list[str]) -> float:
    df = Counter(word for text in documents for word in set(_words(text)))
    idf = {word: math.log((1 + len(documents)) / (1 + count)) + 1 for word, count in df.items()}
    vectors = [{w: c * idf[w] for w, c in Counter(_words(text)).items() if w in idf} for text in (one, other)]
    dot = sum(value * vectors[1].get(word, 0) for word, value in vectors[0].items())
    norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
    return dot / (norms[0] * norms[1]) if all(norms) else 0.0


def test_without_scikit_learn_the_reference_score_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="scikit-learn") as caught:
        score_generation(tiny_llama(), [record(("Vega is",), ("a star",))])
    assert caught.value.hint == "pip install 'kbsync[evaluate]'"
