"""The random prefixes x_j of MEMIT (Eqn 16): P = 6 templates, the empty one and five that the base model writes.

A context is a text with the prompt put where its last `{}` is. Sampled once per base model with a seed and stored with
the statistics: sampled anew in every process, the same batch would give another delta after a restart.
Source: Meng et al. 2022, arXiv 2210.07229, and `get_context_templates` of its authors' code.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from kbsync.editor.corpus import sample
from kbsync.editor.model import Base
from kbsync.errors import ModelError

__all__ = ["chat_context", "sample_contexts"]

_STARTS = ("The", "Therefore", "Because", "I", "You")
_TOKENS = 10
"""Length of a sampled context, the start word included."""
_TOP_K = 5
_NEUTRAL = "Please complete this sentence."


def sample_contexts(base: Base, seed: int) -> tuple[str, ...]:
    """`{}`, then five texts of 10 tokens, each followed by `. {}`. Deterministic for a seed on the same machine."""
    starts = [base.tokenizer(start).input_ids for start in _STARTS]
    generator = torch.Generator().manual_seed(seed)
    written: dict[int, Tensor] = {}
    for length in sorted({len(ids) for ids in starts}):  # mostly one batch: common words are single tokens
        rows = [row for row, ids in enumerate(starts) if len(ids) == length]
        batch = torch.tensor([starts[row] for row in rows])
        written |= zip(rows, sample(base, batch, max(_TOKENS, length), generator, top_k=_TOP_K), strict=True)
    texts = (base.tokenizer.decode(written[row], skip_special_tokens=True) for row in range(len(starts)))
    return ("{}", *(" ".join(re.sub("[{}]", " ", text).split()) + ". {}" for text in texts))


def chat_context(base: Base) -> str:
    """A neutral user turn, with the prompt at the start of the assistant's. Raises ModelError for a model without a
    chat template."""
    tokenizer: Any = base.tokenizer
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template", hint="set `chat_context: false` in the preset")
    turn = [{"role": "user", "content": _NEUTRAL}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    if tokenizer.bos_token_id in tokenizer("").input_ids:
        text = text.removeprefix(tokenizer.bos_token)  # the tokenizer writes it itself
    return text + "{}"
