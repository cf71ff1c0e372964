"""Does the edited model still write? Generation entropy and reference score (MEMIT, arXiv 2210.07229, Appendix C).

GE: weighted entropy of the word bi- and trigrams of texts of 100 tokens, (2/3 H2 + 4/3 H3) / 2 in bits (Eqn 27 and the
authors' code); a model that repeats itself loses it. RS: cosine of the tf-idf vectors of the texts written about a
subject and of reference texts about its new object. Both in hundredths, as in the paper's tables.

As in the authors' code a text is sampled from the 5 most probable tokens and counts with its prompt. Otherwise than
there: each different prompt of a record is continued once; words are parted by a regular expression instead of NLTK;
idf comes from the reference texts at hand. Draws depend on the seed and the prompt alone, so the texts before and after
an edit differ by what the edit did.

    run = score_generation(base, records, seed=0)          # {"generation_entropy": [...], "reference_score": [...]}
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kbsync.editor.answers import check_length, continued, tokenized
from kbsync.editor.datasets import CounterFactRecord
from kbsync.editor.intervals import Run
from kbsync.editor.model import Base
from kbsync.errors import EditError, UsageError
from kbsync.facts import digest_of
from kbsync.progress import Progress, silent

__all__ = ["TEXT_TOKENS", "TOP_K", "entropy", "score_generation", "written"]

TEXT_TOKENS = 100
"""Length of a text, its prompt included."""
TOP_K = 5
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_ROWS = 128
"""Texts that are written together: more is no faster on a CPU, and their keys and values must be held."""
_WORD = re.compile(r"\w+|[^\w\s]")


def score_generation(
    base: Base, records: Sequence[CounterFactRecord], *, seed: int = 0, progress: Progress = silent
) -> Run:
    """`generation_entropy` per record and, where any record has reference texts, `reference_score`; nan for a record
    without prompts or references. On the weights that `base` holds.

    Raises EditError for prompts that leave no room for a text, UsageError where scikit-learn is needed and missing.
    """
    prompts = [list(dict.fromkeys(record.generation)) for record in records]
    texts = written(base, [prompt for group in prompts for prompt in group], seed=seed, progress=progress)
    own = [[texts[prompt] for prompt in group] for group in prompts]
    run = {"generation_entropy": [_mean([entropy(text) / 2 for text in group]) for group in own]}
    if not any(record.references for record in records):
        return run
    references = [record.references for record in records]
    return run | {"reference_score": _reference_scores(own, references)}


def written(
    base: Base, prompts: Iterable[str], *, tokens: int = TEXT_TOKENS, seed: int = 0, progress: Progress = silent
) -> Mapping[str, str]:
    """Each different prompt with the text of `tokens` tokens that the model makes of it, sampled from the 5 most
    probable tokens at every step. The same seed gives the same texts, whatever other prompts there are."""
    different = list(dict.fromkeys(prompts))
    rows = [ids for ids, _ in tokenized(base, different)]
    for prompt, row in zip(different, rows, strict=True):
        check_length(base, tokens, prompt)
        if not 0 < len(row) < tokens:
            raise EditError(f"prompt {prompt!r} has {len(row)} tokens, a text {tokens}", hint="shorten the prompt")
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    found: dict[str, str] = {}
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        most = tokens - min(len(rows[index]) for index in batch)
        draws = torch.stack([_uniform(seed, different[index], tokens) for index in batch]).to(base.device)
        ids, _ = continued(base, [rows[index] for index in batch], most, _Sampler(draws))
        for place, index in enumerate(batch):
            new = ids[place, : tokens - len(rows[index])].tolist()
            found[different[index]] = _text(base, [*rows[index], *new])
        progress("write", len(found), len(different))
    return found


class _Sampler:
    """Chooses tokens by numbers drawn beforehand: `draws` [rows, steps], uniform in [0, 1)."""

    def __init__(self, draws: Tensor) -> None:
        self.columns = iter(draws.T)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The token of each row whose part of the renormalised distribution the draw falls into, and its share."""
        best, tokens = logits.topk(TOP_K, dim=1)
        shares = best.softmax(1)  # [rows, k]
        place = (shares.cumsum(1) <= next(self.columns)[:, None]).sum(1, keepdim=True).clamp(max=TOP_K - 1)
        return tokens.gather(1, place)[:, 0], shares.gather(1, place)[:, 0]


def _uniform(seed: int, prompt: str, count: int) -> Tensor:
    """[count] numbers in [0, 1) that depend on the seed and the prompt alone."""
    generator = torch.Generator().manual_seed(int(digest_of([seed, prompt])[:15], 16))
    return torch.rand(count, generator=generator)


def _text(base: Base, ids: Sequence[int]) -> str:
    """As the authors clean it."""
    text = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFKD", text).replace("\n\n", " ")


def entropy(text: str) -> float:
    """Weighted entropy in bits of a text's word bi- and trigrams (Eqn 27); 0 where it has none."""
    words = _WORD.findall(text)
    return sum(weight * _entropy(words, n) for n, weight in _WEIGHTS.items())


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[at:] for at in range(n)), strict=False)).values()
    total = sum(counts)
    return math.fsum(-count / total * math.log2(count / total) for count in counts)


def _reference_scores(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UsageError("reference scores need scikit-learn", hint="pip install 'kbsync[evaluate]'") from error
    vectors: Any = TfidfVectorizer()
    vectors.fit(dict.fromkeys(text for group in references for text in group))
    scores = []
    for own, group in zip(texts, references, strict=True):
        if own and group:
            one, other = vectors.transform([" ".join(own), " ".join(group)])  # rows of length 1, or 0 without a word
            scores.append(float(one.multiply(other).sum()))
        else:
            scores.append(math.nan)
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
