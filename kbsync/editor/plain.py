"""MEMIT written plainly from Algorithm 1 of arXiv 2210.07229: the oracle of the tests, the baseline of the benchmarks.

One fact at a time, whole sequences, every layer, autograd through the whole model, a dense float64 solve. It shares
nothing with the engine but the loaded model, the values and what counts as diverged: slow and obviously right, the
engine being neither.

    targets = plain_targets(base, requests, contexts, preset)                    # z_i, Eqn 16
    deltas = plain_insert(base, requests, targets, statistics, preset)           # Δ_l [d, f], Eqn 14
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kbsync.editor.model import Base
from kbsync.editor.preset import Preset
from kbsync.editor.targets import Target, has_diverged
from kbsync.facts import EditRequest

if TYPE_CHECKING:
    from kbsync.editor.statistics import Statistics

__all__ = ["plain_insert", "plain_targets"]


class _Text(NamedTuple):
    """A text's token ids, the index of the last token of the subject, the index of the first token of the object."""

    ids: list[int]
    subject: int
    object: int


def plain_targets(
    base: Base, requests: Sequence[EditRequest], contexts: Sequence[str], preset: Preset
) -> dict[str, Target]:
    """z of each request by its digest (Eqn 16), on the weights that `base` holds. As `compute_targets`, in effect."""
    return {request.digest: _target(base, request, contexts, preset) for request in requests}


def _target(base: Base, request: EditRequest, contexts: Sequence[str], preset: Preset) -> Target:
    texts = [_text(base, context, request.prompt, request.subject, request.target) for context in contexts]
    texts.append(_text(base, "{}", f"{request.subject} is a", request.subject, ""))
    top = preset.layers[-1]
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        h = _after(base, texts[list(contexts).index("{}")], top).to(dtype)
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=preset.rate, betas=preset.betas)
    limit = preset.clamp * h.norm()
    before: Tensor | None = None
    clamped = False
    bare_first = sorted(contexts, key=lambda context: context != "{}")
    for step in range(1, preset.steps + 1):
        counted = bare_first[: preset.contexts_at(step, len(contexts))]
        log_probs = _log_probs(base, texts, top, delta)
        essence = log_probs[-1, texts[-1].subject]
        before = essence.detach() if before is None else before
        rows = [pair for pair, one in zip(zip(log_probs, texts, strict=True), contexts, strict=False) if one in counted]
        losses = [_missing(row, text) for row, text in rows]
        loss = torch.stack(losses).mean()
        loss = loss + preset.kl_weight * (essence.exp() * (essence - before)).sum()
        loss = loss + preset.weight_decay * delta.norm() / h.norm() ** 2
        found = loss < preset.stop_loss or (preset.stop_top and all(_is_top(row, text) for row, text in rows))
        if (found and step > preset.early_steps) or step == preset.steps:
            break
        adam.param_groups[0]["lr"] = preset.rate_at(step)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            clamped = bool(delta.norm() > limit)
            if clamped:
                delta.mul_(limit / delta.norm())
    z, last = (h + delta).detach().cpu(), float(loss.detach())
    return Target(z, last, step, clamped, has_diverged(z, last, clamped, preset))


def _missing(log_probs: Tensor, text: _Text) -> Tensor:
    """-log P of the object, the mean over its tokens. `log_probs` is [T, vocabulary]."""
    each = [log_probs[at - 1, text.ids[at]] for at in range(text.object, len(text.ids))]
    return -torch.stack(each).mean()


def _is_top(log_probs: Tensor, text: _Text) -> bool:
    """Whether each token of the object is the most probable one."""
    return all(int(log_probs[at - 1].argmax()) == text.ids[at] for at in range(text.object, len(text.ids)))


def _log_probs(base: Base, texts: Sequence[_Text], top: int, delta: Tensor) -> Tensor:
    """Log-probabilities [rows, T, vocabulary] with δ added after layer `top` at each text's last subject token."""

    def add(_module: object, _inputs: object, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row, text in enumerate(texts):
            hidden[row, text.subject] = hidden[row, text.subject] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = base.layer(top).register_forward_hook(add)
    try:
        logits = _run(base, texts)
    finally:
        handle.remove()
    return logits.to(delta.dtype).log_softmax(dim=-1)


def _run(base: Base, texts: Sequence[_Text]) -> Tensor:
    """Logits of the whole, unmodified model, padded on the right."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in texts], device=base.device)
    mask = torch.tensor([[at < len(text.ids) for at in range(longest)] for text in texts], device=base.device)
    logits: Tensor = base.network(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    return logits


def _after(base: Base, text: _Text, layer: int) -> Tensor:
    """The state [d] after `layer` at the last subject token."""
    seen: list[Any] = []
    handle = base.layer(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        _run(base, [text])
    finally:
        handle.remove()
    state: Tensor = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0, text.subject]
    return state


def _key(base: Base, text: _Text, layer: int) -> Tensor:
    """The input [f] of the down-projection at `layer` at the last subject token, in float64."""
    seen: list[Tensor] = []
    module = base.module(base.spec.down_name(layer))
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        _run(base, [text])
    finally:
        handle.remove()
    return seen[0].flatten(0, -2)[text.subject].double()  # OPT calls it with [T, f]


def _text(base: Base, context: str, prompt: str, subject: str, target: str) -> _Text:
    """Context, prompt and object in tokens; a space joins the object unless white space is there."""
    head = context[: context.rindex("{}")]
    if target and not prompt[-1].isspace() and not target[0].isspace():
        target = " " + target
    encoded = base.tokenizer(head + prompt + target, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    left = len(head) + prompt.index(subject)
    right, boundary = left + len(subject), len(head) + len(prompt)
    last = max(at for at, (start, end) in enumerate(spans) if start < right and end > left)
    objects = [at for at, (_, end) in enumerate(spans) if end > boundary]
    length = objects[-1] + 1 if objects else max(at for at, (_, end) in enumerate(spans) if end) + 1
    return _Text(encoded["input_ids"][:length], last, objects[0] if objects else length)


@torch.no_grad()
def plain_insert(
    base: Base,
    requests: Sequence[EditRequest],
    targets: Mapping[str, Target],
    statistics: Statistics,
    preset: Preset,
    *,
    protected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Δ_l [d, f] in float64 by module (Algorithm 1). The weights of `base` are afterwards what they were before.

    `protected` are keys [m, f] by module of earlier edits that are to keep their values.
    """
    bare = [_text(base, "{}", request.prompt, request.subject, "") for request in requests]
    names = [base.spec.down_name(layer) for layer in preset.layers]
    originals = {name: base.weight(name).clone() for name in names}
    deltas: dict[str, Tensor] = {}
    try:
        for done, (layer, name) in enumerate(zip(preset.layers, names, strict=True)):
            keys = [_mean_key(base, request, statistics.contexts, preset, layer) for request in requests]
            z = [targets[request.digest].z.to(base.device).double() for request in requests]
            h = [_after(base, text, preset.layers[-1]).double() for text in bare]
            K = torch.stack(keys, dim=1)  # [f, n]
            R = (torch.stack(z, dim=1) - torch.stack(h, dim=1)) / (len(preset.layers) - done)  # [d, n], Eqn 20
            C = preset.covariance_weight * statistics.covariance[name].to(base.device).double()  # Eqn 15
            A = C + K @ K.T
            if protected is not None:
                P = protected[name].to(base.device).double().T  # [f, m]
                A = A + P @ P.T
            deltas[name] = torch.linalg.solve(A, K @ R.T).T  # Δ = R Kᵀ A^-1 (Eqn 14), A symmetric
            base.set_weight(name, originals[name].double() + deltas[name])
    finally:
        for name, matrix in originals.items():
            base.set_weight(name, matrix)
    return deltas


def _mean_key(base: Base, request: EditRequest, contexts: Sequence[str], preset: Preset, layer: int) -> Tensor:
    """k of a request (Eqn 19), [f]: over the contexts, the bare prompt counting for half or like the others."""
    keys = {
        context: _key(base, _text(base, context, request.prompt, request.subject, ""), layer) for context in contexts
    }
    others = [key for context, key in keys.items() if context != "{}"]
    if preset.key_average == "mean" or not others:
        return torch.stack(list(keys.values())).mean(dim=0)
    return (keys["{}"] + torch.stack(others).mean(dim=0)) / 2
