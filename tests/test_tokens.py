"""Where a fact stands in its tokens: subject anywhere, any script, special tokens or not; refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kbsync.editor.model import Base
from kbsync.editor.tokens import Tokens, encode, encode_prompt, encode_subject, placeable
from kbsync.errors import EditError
from tests.tiny import CONTEXTS, FACTS, TEXT, request, tiny_llama

BASES = {bos: tiny_llama(bos=bos) for bos in (False, True)}


def text(base: Base, ids: tuple[int, ...]) -> str:
    found: str = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return found


def parts(base: Base, tokens: Tokens) -> tuple[str, str]:
    """The text up to the lookup token's end, and the object's text."""
    return text(base, tokens.ids[: tokens.lookup + 1]), text(base, tokens.ids[tokens.prompt :])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.subject)
def test_lookup_is_the_subjects_last_token(fact: Any, context: str, bos: bool) -> None:
    """Whatever stands before it and wherever the subject is, the text up to the lookup token ends with the subject."""
    base = BASES[bos]
    before, target = parts(base, encode(base, fact, context))
    head = context.removesuffix("{}")
    assert before == head + fact.prompt[: fact.prompt.index(fact.subject) + len(fact.subject)]
    assert target == " " + fact.target


@given(
    subject=st.text(min_size=1, max_size=12).filter(lambda value: value.strip() == value and value.isprintable()),
    before=st.sampled_from(["", "The star ", "(", "« ", "In the city of "]),
    after=st.sampled_from([" is", ", as they say, is", "'s home is", " (born 1950) lives in"]),
    bos=st.booleans(),
)
def test_any_printable_subject_is_found(subject: str, before: str, after: str, bos: bool) -> None:
    """For any subject that occurs once, its last character lies in the lookup token or the text is refused."""
    base = BASES[bos]
    prompt = before + subject + after
    if prompt.find(subject) != prompt.rfind(subject):
        with pytest.raises(EditError):
            encode(base, request(prompt, subject, "Rome"))
        return
    tokens = encode(base, request(prompt, subject, "Rome"))
    spans = base.tokenizer(prompt + " Rome", return_offsets_mapping=True)["offset_mapping"]
    start, end = spans[tokens.lookup]
    assert start < len(before) + len(subject) <= end
    assert all(left >= len(before) + len(subject) for left, right in spans[tokens.lookup + 1 :] if right > left)
    assert text(base, tokens.ids[tokens.prompt :]) == " Rome"


def test_same_subject_in_the_context_does_not_count() -> None:
    """The subject's place is that in the prompt, also where a context names it."""
    base = BASES[False]
    fact = request("The star Vega belongs to", "Vega", "Lyra")
    tokens = encode(base, fact, "I saw Vega yesterday. {}")
    assert parts(base, tokens)[0] == "I saw Vega yesterday. The star Vega"


def test_braces_in_a_context_are_text() -> None:
    """Only the last `{}` is the prompt's place."""
    base = BASES[False]
    tokens = encode(base, FACTS[1], "a {} b {x}. {}")
    assert parts(base, tokens)[0] == "a {} b {x}. The capital of France"


@pytest.mark.parametrize(("prompt", "target", "written"), [
    ("Vega is in", "Lyra", " Lyra"),
    ("Vega is in", " Lyra", " Lyra"),
    ("Vega is in ", "Lyra", " Lyra"),
    ("Vega is in\n", "Lyra", "Lyra"),
    ("Vega is in", "\nLyra", "\nLyra"),
])  # fmt: skip
def test_object_as_written_after_the_prompt(prompt: str, target: str, written: str) -> None:
    """One space joins them unless white space is there; a token that spans the prompt's end is the object's."""
    base = BASES[False]
    tokens = encode(base, request(prompt, "Vega", target))
    assert text(base, tokens.ids).endswith(written)
    assert text(base, tokens.ids[tokens.prompt :]).strip() == "Lyra"


def test_prompt_alone_ends_with_the_prompt() -> None:
    """`encode_prompt` has no object tokens and the same lookup token."""
    base = BASES[True]
    for fact in FACTS:
        alone, whole = encode_prompt(base, fact, CONTEXTS[1]), encode(base, fact, CONTEXTS[1])
        assert alone.prompt == len(alone.ids)
        assert alone.lookup == whole.lookup
        assert alone.ids[: alone.lookup + 1] == whole.ids[: whole.lookup + 1]


def test_kl_text_begins_with_the_subject() -> None:
    """The KL term's text is the subject in "… is a", without object, also for a subject that occurs there again."""
    base = BASES[False]
    tokens = encode_subject(base, request("the letter a is", "a", "x"))
    assert text(base, tokens.ids) == "a is a"
    assert text(base, tokens.ids[: tokens.lookup + 1]) == "a"


@pytest.mark.parametrize(("prompt", "subject", "target", "problem"), [
    ("The capital is", "France", "Rome", "not in the prompt"),
    ("France, the France of", "France", "Rome", "more than once"),
    ("aaa is", "aa", "Rome", "more than once"),
    ("The capital of France is", "", "Rome", "not in the prompt"),
    ("The capital of France is", "France", "  ", "no tokens"),
    ("The capital of France is", "France", "", "no tokens"),
    ("France is " + "very " * 200, "France", "old", "the model reads 128"),
])  # fmt: skip
def test_refusals_name_the_fact(prompt: str, subject: str, target: str, problem: str) -> None:
    """What cannot be placed is refused in one line that names the fact, with a hint."""
    with pytest.raises(EditError, match=problem) as caught:
        encode(BASES[False], request(prompt, subject, target))
    assert str(caught.value).startswith("relation of ")
    assert caught.value.hint


def test_context_must_end_in_the_prompt() -> None:
    """A context with text after the prompt has no place for the object."""
    with pytest.raises(EditError, match="does not end"):
        encode(BASES[False], FACTS[0], "{} and so on")
    with pytest.raises(EditError, match="does not end"):
        placeable(BASES[False], FACTS, ["{}", "{} and so on"])


def test_what_can_be_placed_is_told_from_what_cannot_and_why() -> None:
    """In all contexts: one text may be too long only after the longest of them."""
    long = request("France is " + "very " * 20, "France", "old")
    twice = request("France, the France of", "France", "Rome")
    far = "It was late. " * 20 + "{}"
    assert placeable(BASES[False], [*FACTS, FACTS[0], long], ["{}"]) == ([*FACTS, long], {})
    good, reasons = placeable(BASES[False], [FACTS[1], long, twice], ["{}", far])
    assert good == [FACTS[1]]
    assert "the model reads 128" in reasons[long.digest]
    assert "more than once" in reasons[twice.digest]


def test_metaspace_tokenizer() -> None:
    """Tokens that carry the space before a word, a normaliser and an end token do not move the lookup token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    base = tiny_llama()
    base.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = encode(base, FACTS[1], CONTEXTS[1])
    assert parts(base, tokens) == ("The people of the city. The capital of France", "Rome")
