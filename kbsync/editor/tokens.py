"""Where a fact stands in its tokens: rendered text, last subject token (the lookup token), the object's tokens.

Positions come from the fast tokenizer's offset mapping on the whole rendered text, never from summing the token counts
of pieces: BOS, leading spaces and merges break that. Definitions: MEMIT (arXiv 2210.07229) section 4.2.

    tokens = encode(base, request, "The weather is nice. {}")
    tokens.ids[tokens.lookup]                 # the last token of the subject
    tokens.ids[tokens.prompt:]                # the object as it is written after the prompt
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kbsync.editor.model import Base
from kbsync.errors import EditError
from kbsync.facts import EditRequest

__all__ = ["BARE", "Tokens", "encode", "encode_prompt", "encode_subject", "placeable"]

BARE = "{}"
"""The empty context: the prompt alone."""
_ESSENCE = "{subject} is a"
"""What the KL term keeps: the distribution after the subject in this prompt (the authors' code)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text. `lookup` is the index of the last subject token; `ids[prompt:]` are the object's."""

    ids: tuple[int, ...]
    lookup: int
    prompt: int


def encode(base: Base, request: EditRequest, context: str = BARE) -> Tokens:
    """Context, prompt and object: a space joins the object unless white space is there already.

    A token that spans the end of the prompt counts as the object's. Raises EditError where the subject does not occur
    exactly once in the prompt, the object has no tokens, or the text is longer than the model reads.
    """
    spaced = request.prompt[-1:].isspace() or request.target[:1].isspace()
    tokens = _encode(base, request, context, request.prompt, ("" if spaced else " ") + request.target)
    if not request.target.strip() or tokens.prompt == len(tokens.ids):
        raise _refuse(request, f"the object {request.target!r} has no tokens", "correct the object's label")
    if tokens.prompt <= tokens.lookup:
        raise _refuse(request, "the object's first token is the subject's last", "put a word or a space between them")
    return tokens


def encode_prompt(base: Base, request: EditRequest, context: str = BARE) -> Tokens:
    """Context and prompt, without the object. Raises EditError as `encode` does."""
    return _encode(base, request, context, request.prompt, "")


def encode_subject(base: Base, request: EditRequest) -> Tokens:
    """The subject in "{subject} is a", without context or object: the text of the KL term."""
    return _encode(base, request, BARE, _ESSENCE.replace("{subject}", request.subject), "", first=True)


def placeable(
    base: Base, requests: Iterable[EditRequest], contexts: Sequence[str]
) -> tuple[list[EditRequest], dict[str, str]]:
    """The distinct requests that can be edited in all contexts, and by digest why the others cannot.

    Raises EditError for a context that no text can be put in.
    """
    for context in contexts:
        _head(context)
    good: dict[str, EditRequest] = {}
    reasons: dict[str, str] = {}
    for request in requests:
        try:
            encode_subject(base, request)
            for context in contexts:
                encode(base, request, context)
                encode_prompt(base, request, context)
            good[request.digest] = request
        except EditError as error:
            reasons[request.digest] = error.message
    return list(good.values()), reasons


def _head(context: str) -> str:
    """What a context puts before the prompt."""
    head, marker, tail = context.rpartition(BARE)
    if not marker or tail:
        raise EditError(f"context {context!r} does not end in {BARE}", hint="kbsync statistics build")
    return head


def _encode(base: Base, request: EditRequest, context: str, prompt: str, target: str, *, first: bool = False) -> Tokens:
    """`first`: the prompt begins with the subject, which may occur in it once more ("a" in "a is a")."""
    head = _head(context)
    start = len(head) + (0 if first else _only_place(request, prompt))
    text = head + prompt + target
    encoded = base.tokenizer(text, return_offsets_mapping=True)
    spans: list[tuple[int, int]] = encoded["offset_mapping"]
    # Special tokens have the span (0, 0); one that the tokenizer puts after the text is no part of it.
    length = max((index + 1 for index, (_, end) in enumerate(spans) if end > 0), default=0)
    if length > base.max_tokens:
        raise _refuse(request, f"needs {length} tokens, the model reads {base.max_tokens}", "shorten the template")
    end = start + len(request.subject)
    inside = [index for index, (left, right) in enumerate(spans[:length]) if left < end and right > start]
    if not inside:
        raise _refuse(request, f"the subject {request.subject!r} has no tokens", "correct the subject's label")
    boundary = len(head) + len(prompt)
    first_target = next((index for index, (_, right) in enumerate(spans[:length]) if right > boundary), length)
    return Tokens(tuple(encoded["input_ids"][:length]), inside[-1], first_target)


def _only_place(request: EditRequest, prompt: str) -> int:
    """Where the subject begins in the prompt."""
    place = prompt.find(request.subject)
    if not request.subject.strip() or place < 0:
        raise _refuse(
            request, f"the subject {request.subject!r} is not in the prompt {prompt!r}", "correct the template"
        )
    if prompt.find(request.subject, place + 1) >= 0:
        raise _refuse(
            request,
            f"the subject {request.subject!r} is in the prompt {prompt!r} more than once",
            "reword the template so that it does not contain the subject itself",
        )
    return place


def _refuse(request: EditRequest, problem: str, hint: str) -> EditError:
    return EditError(f"{request.key.relation} of {request.key.subject}: {problem}", hint=hint)
