"""Presets: the editor's settings for one model, measured and kept in a YAML file with the scores they reached.

Hyperparameters do not transfer between models (λ = 15,000 suits GPT-J and ruins SmolLM2-135M), so a model without a
preset is refused. Torch-free. Source of the settings: Meng et al. 2022, arXiv 2210.07229, and its authors' code.

    preset = load_preset("smollm2-135m")        # packaged, or a path to a YAML file
    preset.layers, preset.covariance_weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kbsync.documents import validate
from kbsync.errors import ModelError
from kbsync.facts import digest_of

__all__ = ["AUTHORS", "Preset", "load_preset", "packaged_presets"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

AUTHORS: Mapping[str, Any] = {
    "rate": 0.5,
    "rate_decay": 1.0,
    "betas": (0.9, 0.999),
    "steps": 25,
    "early_contexts": None,
    "early_steps": 0,
    "stop_top": False,
}
"""The optimisation of the authors' code (kmeng01/memit): no setting that shortens the way to z."""
GROWTH_FACTS = 100
"""Facts from which on λ grows, where it does."""


class Preset(BaseModel):
    """Settings of MEMIT for one model. Layer indices count from 0; the deepest edited layer L is `layers[-1]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """R, ascending: the layers whose down-projection is edited."""
    covariance_weight: Positive
    """λ of Eqn 15: how much the keys of ordinary text count against those of the edits."""
    clamp: Positive
    """Largest ‖δ‖ as a share of ‖h‖ at the lookup token."""
    rate: Positive
    """Adam's learning rate for δ."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's decay of the gradient's mean and of its square."""
    rate_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rate that is left at the last update, reached geometrically; 1: the rate is constant."""
    steps: Count
    """Losses computed per fact; the last one is followed by no update."""
    weight_decay: NotNegative = 0.5
    """Weight of ‖δ‖/‖h‖² in the loss."""
    kl_weight: NotNegative = 0.0625
    """Weight of the KL term that keeps what the subject is ("{subject} is a")."""
    stop_loss: NotNegative = 0.05
    """A fact is done when its loss is below this; 0 means never before `steps`."""
    diverged_loss: Positive = 4.0
    """A fact whose δ ends at the clamp with a loss above this has not been learned: it is held, not written."""
    stop_top: bool = False
    """A fact is done, too, once each token of its object is the most probable one in every context (ENCORE)."""
    early_contexts: Count | None = None
    """How many contexts, the bare prompt first, the first `early_steps` losses are computed on; null: all."""
    early_steps: Annotated[int, Field(ge=0)] = 0
    """Losses that are computed on `early_contexts` contexts only; none of them stops the search."""
    covariance_growth: NotNegative = 0.0
    """λ grows with the facts that the weights hold: λ · max(1, facts / 100) ^ covariance_growth."""
    null_space: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Project Δ onto the directions of the keys of ordinary text that hold this share of their energy or less
    (AlphaEdit, arXiv 2410.02355); null: no projection."""
    key_average: Literal["half_empty", "mean"] = "half_empty"
    """Half the bare prompt's key and half the mean of the other contexts', or the plain mean of all (Eqn 19)."""
    corpus: Annotated[str, Field(pattern=r"^(self|file:.+|hf:.+)$")] = "self"
    """Text for C_l: `self` (sampled from the model), `file:PATH`, `hf:DATASET`."""
    sample_tokens: Count = 20_000
    """Tokens of the corpus that the covariances are estimated from."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the contexts and of the self-sampled corpus."""
    token_budget: Count
    """Tokens in flight in one batch of target optimisation: bounds memory and does not change the result."""
    chat_context: bool
    """One more context: a neutral user turn, with the prompt at the start of the assistant's."""
    scores: dict[str, Any] = {}
    """What these settings measured, on what, when."""
    note: str = ""

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("must ascend without repetition")
        return layers

    def rate_at(self, step: int) -> float:
        """Adam's learning rate of the update after loss `step`, counted from 1."""
        return self.rate * math.pow(self.rate_decay, (step - 1) / max(1, self.steps - 2))

    def contexts_at(self, step: int, contexts: int) -> int:
        """On how many of so many contexts loss `step`, counted from 1, is computed."""
        return min(self.early_contexts or contexts, contexts) if step <= self.early_steps else contexts

    def weight_at(self, facts: int) -> float:
        """λ for weights that hold so many facts."""
        return self.covariance_weight * math.pow(max(1.0, facts / GROWTH_FACTS), self.covariance_growth)

    @property
    def target_digest(self) -> str:
        """sha256 of what a target vector depends on, apart from the model and the request: the z cache's key."""
        names = (
            *(
                "clamp",
                "rate",
                "betas",
                "rate_decay",
                "steps",
                "weight_decay",
                "kl_weight",
                "stop_loss",
                "diverged_loss",
            ),
            *("stop_top", "early_contexts", "early_steps", "seed", "chat_context"),
        )
        return digest_of({"layer": self.layers[-1]} | {name: getattr(self, name) for name in names})

    @property
    def digest(self) -> str:
        """sha256 of all settings: everything but the name, the scores and the note."""
        return digest_of(self.model_dump(mode="json", exclude={"name", "scores", "note"}))


def packaged_presets() -> list[str]:
    """Names of the presets that come with kbsync, sorted."""
    folder = resources.files("kbsync.editor") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name_or_path: str | Path) -> Preset:
    """The packaged preset of that name, or the one in a YAML file (anything that ends in .yaml).

    Raises ModelError where there is no such preset, ConfigError (file, line, key) where the file is wrong.
    """
    text = str(name_or_path)
    if text.endswith(".yaml"):
        if not (path := Path(text)).is_file():
            raise ModelError(f"preset {path}: no such file", hint="correct `preset:` in kbsync.yaml")
        return validate(path, Preset)
    if text not in (known := packaged_presets()):
        raise ModelError(
            f"no preset for model {text!r} (packaged: {', '.join(known)}); settings of another model would ruin it",
            hint="kbsync calibrate MODEL --facts FILE --out NAME.yaml, then `preset: NAME.yaml` in kbsync.yaml",
        )
    with resources.as_file(resources.files("kbsync.editor") / "presets" / f"{text}.yaml") as path:
        return validate(path, Preset)
