"""The probe on tiny real models: definitions, exact restoration, bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kbsync.editor import answers as answers_module
from kbsync.editor import probe as probe_module
from kbsync.editor.answers import Answer, answers, log_probabilities
from kbsync.editor.model import Base
from kbsync.editor.probe import CONTROL_TOKENS, NO_CONTROLS, Controls, ProbeReport, probe, shipped_controls, weights_in
from kbsync.errors import EditError
from kbsync.facts import EditRequest, FactKey
from tests.tiny import TEXT, tiny_gpt2, tiny_llama

CONTROLS = Controls(
    tuple(f"{name} belongs to the" for name in ("Vega", "Rigel", "Deneb", "Sirius", "France")), "five of the test's own"
)
HOLDOUT = torch.randint(1, 384, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def make(request: pytest.FixtureRequest) -> Callable[..., Base]:
    """Builders of the tiny models."""
    found: Callable[..., Base] = request.param
    return found


def matrices(base: Base, scale: float, seed: int = 0) -> dict[str, Tensor]:
    """The down-projections of layers 2 and 3, moved at random by about `scale` of their size."""
    random = torch.Generator().manual_seed(seed)
    names = [base.spec.down_name(layer) for layer in (2, 3)]
    originals = {name: base.weight(name).cpu().float() for name in names}
    return {
        name: (w + scale * w.std() * torch.randn(w.shape, generator=random)).to(base.dtype)
        for name, w in originals.items()
    }


def request(prompt: str, target: str, *paraphrases: str) -> EditRequest:
    """A request about whatever the first word names."""
    subject = prompt.split()[0]
    return EditRequest(FactKey("r", subject), prompt, subject, target, paraphrases)


def known_word(base: Base, edited: dict[str, Tensor]) -> tuple[str, str]:
    """A prompt whose most probable next token on the edited weights is a word."""
    words = " ".join(TEXT).split()
    with weights_in(base, edited):
        for prompt in (f"{one} {other}" for one in words for other in words):
            token = int(
                base.network(base.tokenizer(prompt, return_tensors="pt").input_ids.to(base.device))
                .logits[0, -1]
                .argmax()
            )
            if (text := base.tokenizer.decode([token]))[:1] == " " and text[1:].isalpha():
                return prompt, text[1:]
    raise AssertionError("no word found")


def state(base: Base) -> dict[str, bytes]:
    """Every parameter's bytes."""
    return {
        n: p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for n, p in base.network.named_parameters()
    }


def test_the_probe_measures_its_definitions(make: Callable[..., Base], device: str) -> None:
    """Shares, specificity against the base and KL, recomputed plainly, one sequence at a time, in float64."""
    base = make(device=device)
    edited = matrices(base, 0.6)
    prompt, target = known_word(base, edited)
    requests = [
        request(prompt, target, f"I think that {prompt}", prompt),
        request("Rigel is a", "star of Orion"),
    ]
    report = probe(base, edited, requests, controls=CONTROLS, holdout=HOLDOUT)

    before = [answer.text for answer in answers(base, CONTROLS.prompts, tokens=CONTROL_TOKENS)]
    old = base.network(HOLDOUT.to(device)).logits.double().log_softmax(-1)
    with weights_in(base, edited):
        after = [answer.text for answer in answers(base, CONTROLS.prompts, tokens=CONTROL_TOKENS)]
        new = base.network(HOLDOUT.to(device)).logits.double().log_softmax(-1)
        said = answers(base, ["Rigel is a"])[0].text
        scores = log_probabilities(base, [(r.prompt, r.target) for r in requests])
        (wording,) = log_probabilities(base, [(requests[0].paraphrases[0], target)])
    assert [fact.efficacy for fact in report.facts] == [True, scores[1].greedy]
    assert report.efficacy == sum(score.greedy for score in scores) / 2
    assert report.paraphrase == (wording.greedy + 1) / 2
    assert [(fact.hits, fact.paraphrases) for fact in report.facts] == [(wording.greedy + 1, 2), (0, 0)]
    assert [fact.probability for fact in report.facts] == pytest.approx([s.probability for s in scores], rel=1e-4)
    assert [fact.digest for fact in report.facts] == [r.digest for r in requests]
    assert report.facts[0].answer == target
    assert report.facts[1].answer == said
    assert report.specificity_drop == sum(a != b for a, b in zip(before, after, strict=True)) / 5 > 0
    assert [(c.prompt, c.before, c.after) for c in report.changed] == [
        entry for entry in zip(CONTROLS.prompts, before, after, strict=True) if entry[1] != entry[2]
    ]
    old, new = old[:, :-1], new[:, :-1]  # where a token follows
    assert report.drift == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-4)
    assert (report.control_prompts, report.controls, report.drift_tokens) == (5, "five of the test's own", 120)


def test_the_base_itself_has_no_drop_and_no_drift(make: Callable[..., Base], device: str) -> None:
    """Its own weights: exactly zero."""
    base = make(device=device)
    report = probe(base, matrices(base, 0.0), [], controls=CONTROLS, holdout=HOLDOUT)
    assert (report.specificity_drop, report.drift) == (0.0, 0.0)
    assert (report.efficacy, report.paraphrase) == (None, None)


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ("Paris", "Paris", False),
        ("Paris", "Paris which lies in", False),
        ("Paris", "Parish", True),
        ("Paris", "Rome", True),
        ("evolution by selection", "evolution", True),
        ("", "Rome", True),
    ],
)
def test_an_answer_that_only_goes_on_longer_is_the_same(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str, differs: bool
) -> None:
    """Whole words of the base's answer, at the beginning."""
    told = iter([[Answer(before, 0.5)], [], [Answer(after, 0.5)]])
    monkeypatch.setattr(probe_module, "answers", lambda *_, **__: next(told))
    controls = Controls(("The capital of France is",), "one")
    report = probe(tiny_llama(), {}, [], controls=controls, holdout=HOLDOUT)
    assert report.specificity_drop == float(differs)


def test_drift_grows_with_the_edit() -> None:
    """The larger the change, the larger the divergence; never negative."""
    base = tiny_llama()
    drifts = [probe(base, matrices(base, s), [], controls=NO_CONTROLS, holdout=HOLDOUT).drift for s in (0.01, 0.1, 1)]
    assert 0 < drifts[0] < drifts[1] < drifts[2]


def test_what_was_not_measured_is_none() -> None:
    """No requests, no controls, no held-out text: no numbers, and the report says which controls there were."""
    base = tiny_llama()
    report = probe(base, {}, [], controls=NO_CONTROLS, holdout=torch.empty(0, 24, dtype=torch.long))
    assert (report.efficacy, report.paraphrase, report.specificity_drop, report.drift) == (None, None, None, None)
    assert (report.controls, report.facts, report.failed) == ("none", (), ())


def test_the_base_is_pristine_after_the_probe(make: Callable[..., Base], device: str) -> None:
    """Every parameter, bit for bit."""
    base = make(device=device)
    before = state(base)
    probe(base, matrices(base, 0.5), [request("Vega is a", "star")], controls=CONTROLS, holdout=HOLDOUT)
    assert state(base) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_in_inside_and_back_after_a_failure(
    make: Callable[..., Base], device: str, dtype: torch.dtype
) -> None:
    """Inside they are the matrices given, cast; after an exception the former bits are back."""
    base = make(device=device, dtype=dtype)
    before, edited = state(base), matrices(base, 0.5)
    with weights_in(base, edited):
        assert all(torch.equal(base.weight(name).cpu(), matrix) for name, matrix in edited.items())
    assert state(base) == before
    with pytest.raises(RuntimeError), weights_in(base, edited):
        raise RuntimeError
    assert state(base) == before


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda w: w[:, :-1], "the model's"),
        (lambda w: w.clone().fill_(math.nan), "not finite"),
        (lambda w: w.double() * 1e300, "not finite"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(spoil: Callable[[Tensor], Tensor], problem: str) -> None:
    """A wrong shape, NaN, and what is not finite once cast are refused before anything is changed."""
    base = tiny_llama()
    before, edited = state(base), matrices(base, 0.5)
    last = list(edited)[-1]
    edited[last] = spoil(edited[last])
    with pytest.raises(EditError, match=problem), weights_in(base, edited):
        pytest.fail("the weights were put in")
    assert state(base) == before


def test_a_square_matrix_goes_in_the_right_way_round() -> None:
    """[d_out, d_in] for GPT-2's Conv1D too."""
    base = tiny_gpt2(square=True)
    name = base.spec.down_name(2)
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    with weights_in(base, {name: matrix}):
        assert torch.equal(base.network.transformer.h[2].mlp.c_proj.weight, matrix.T)


def test_the_vocabulary_is_never_projected_at_all_positions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the held-out text: small ones give the same drift, and no block is larger than its budget."""
    base = tiny_llama()
    edited = matrices(base, 0.5)
    whole = probe(base, edited, [], controls=NO_CONTROLS, holdout=HOLDOUT).drift
    monkeypatch.setattr(answers_module, "LOGITS_PER_CHUNK", 384 * 7)
    sizes: list[int] = []
    handle = base.network.lm_head.register_forward_hook(lambda *call: sizes.append(call[-1].numel()))
    assert probe(base, edited, [], controls=NO_CONTROLS, holdout=HOLDOUT).drift == pytest.approx(whole, rel=1e-5)
    handle.remove()
    assert max(sizes) <= 384 * 7


def test_the_report_survives_json() -> None:
    """from_json(to_json) is the report; a missing field is an error."""
    base = tiny_llama()
    report = probe(
        base, {}, [request("Vega is a", "star", "I think that Vega is a")], controls=CONTROLS, holdout=HOLDOUT
    )
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert ProbeReport.from_json(value) == report
    with pytest.raises(TypeError):
        ProbeReport.from_json({"facts": []})


def test_failed_facts_are_named_with_their_answer() -> None:
    """What the model says instead is the evidence."""
    base = tiny_llama()
    asked = request("Vega is a", "Ωmega")
    (failed,) = probe(base, {}, [asked], controls=NO_CONTROLS, holdout=HOLDOUT).failed
    assert (failed.digest, failed.efficacy) == (asked.digest, False)
    assert failed.answer == answers(base, [asked.prompt])[0].text


@pytest.mark.model
def test_the_embedded_model_knows_many_controls(smollm2: Base) -> None:
    """The shipped prompts ask what the base answers with some confidence: else any edit would flip them."""
    found = answers(smollm2, shipped_controls().prompts, tokens=CONTROL_TOKENS)
    assert sum(answer.text != "" for answer in found) >= 95
    with torch.no_grad():
        paris = log_probabilities(smollm2, [("The capital of France is the city of", "Paris")])[0]
    assert paris.probability > 0.2


def test_a_paraphrase_longer_than_the_model_reads_is_not_asked_and_counted() -> None:
    """It is no part of the share; the edit goes on."""
    base = tiny_llama()
    long = "the people of the city " * 100 + "Vega is in"
    fact = request("Where is Vega", "Orion", long, "Vega is in")
    report = probe(base, {}, [fact], controls=NO_CONTROLS, holdout=torch.empty(0, 0, dtype=torch.long))
    [found] = report.facts
    assert (found.paraphrases, found.unasked) == (1, 1)
    assert report.paraphrase == found.hits
    assert ProbeReport.from_json(report.to_json()) == report
