"""How much of an object the model says by itself: zsRE's argmax accuracy, and what is measured of facts without a
counterfactual object.

Argmax accuracy (MEMIT, arXiv 2210.07229, section 5.2.1): the share of the object's tokens that are the most probable
one, each after the prompt and the tokens before it. It flatters long objects, so the stricter whole-object accuracy
stands beside it: the greedy continuation of the prompt starts with all of the object, which is what the probe asks.

    intervals(score_zsre(base, load_zsre(path)), harmonic=ZSRE_HARMONIC)["score"]
    intervals(score_facts(base, requests))["accuracy"], intervals(score_chat(base, requests))["chat_accuracy"]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from kbsync.editor.answers import Scored, log_probabilities
from kbsync.editor.contexts import chat_context
from kbsync.editor.datasets import ZsreRecord
from kbsync.editor.intervals import Run
from kbsync.editor.model import Base
from kbsync.editor.tokens import BARE
from kbsync.facts import EditRequest
from kbsync.progress import Progress, silent

__all__ = ["ZSRE_HARMONIC", "score_chat", "score_facts", "score_zsre"]

ZSRE_HARMONIC = ("efficacy", "paraphrase", "specificity")
"""What zsRE's score is the harmonic mean of."""

Pair = tuple[str, str]


def score_zsre(base: Base, records: Sequence[ZsreRecord], *, progress: Progress = silent) -> Run:
    """Argmax accuracy on the question (`efficacy`), its rephrased form (`paraphrase`) and the unrelated question
    (`specificity`), and whole-object `accuracy` on the question, per record, on the weights that `base` holds.

    Raises EditError where `log_probabilities` does.
    """
    asked = [(record.request.prompt, record.request.target) for record in records]
    unrelated = [(record.unrelated_prompt, record.unrelated_answer) for record in records]
    rephrased = [[(text, record.request.target) for text in record.request.paraphrases] for record in records]
    scored = _scored(base, [*asked, *unrelated, *_flat(rephrased)], progress)
    return {
        "efficacy": [scored[pair].accuracy for pair in asked],
        "paraphrase": [_mean([scored[pair].accuracy for pair in pairs]) for pairs in rephrased],
        "specificity": [scored[pair].accuracy for pair in unrelated],
        "accuracy": [float(scored[pair].greedy) for pair in asked],
    }


def score_facts(base: Base, requests: Sequence[EditRequest], *, progress: Progress = silent) -> Run:
    """Of each fact: argmax accuracy on its prompt (`efficacy`) and its paraphrases (`paraphrase`), whole-object
    `accuracy` and `paraphrase_accuracy`. Raises EditError where `log_probabilities` does.
    """
    asked = [(request.prompt, request.target) for request in requests]
    rephrased = [[(text, request.target) for text in request.paraphrases] for request in requests]
    scored = _scored(base, [*asked, *_flat(rephrased)], progress)
    return {
        "efficacy": [scored[pair].accuracy for pair in asked],
        "paraphrase": [_mean([scored[pair].accuracy for pair in pairs]) for pairs in rephrased],
        "accuracy": [float(scored[pair].greedy) for pair in asked],
        "paraphrase_accuracy": [_mean([float(scored[pair].greedy) for pair in pairs]) for pairs in rephrased],
    }


def score_chat(base: Base, requests: Sequence[EditRequest], *, progress: Progress = silent) -> Run:
    """Whole-object accuracy where the assistant's turn begins with the prompt (`chat_accuracy`); nothing for a model
    without a chat template. Raises EditError where `log_probabilities` does."""
    if not base.tokenizer.chat_template:
        return {}
    context = chat_context(base)
    pairs = [(context.replace(BARE, request.prompt), request.target) for request in requests]
    scored = _scored(base, pairs, progress)
    return {"chat_accuracy": [float(scored[pair].greedy) for pair in pairs]}


def _scored(base: Base, pairs: Sequence[Pair], progress: Progress) -> Mapping[Pair, Scored]:
    """Each different pair scored once."""
    different = list(dict.fromkeys(pairs))
    return dict(zip(different, log_probabilities(base, different, progress=progress), strict=True))


def _flat(groups: Sequence[Sequence[Pair]]) -> Iterator[Pair]:
    return (pair for group in groups for pair in group)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
