"""Presets: packaged and from files, refused when wrong, and with digests that see what they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kbsync.editor.preset import Preset, load_preset, packaged_presets
from kbsync.errors import ConfigError, ModelError

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "layers": (1, 2),
    "covariance_weight": 10.0,
    "clamp": 0.75,
    "rate": 0.5,
    "steps": 5,
    "token_budget": 512,
    "chat_context": False,
}


@pytest.mark.parametrize("name", packaged_presets())
def test_packaged_preset_loads(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name


def test_unknown_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="no preset for model 'gpt-99'") as caught:
        load_preset("gpt-99")
    assert "kbsync calibrate MODEL" in caught.value.hint
    assert "preset:" in caught.value.hint


def test_missing_preset_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"mine\.yaml: no such file"):
        load_preset(tmp_path / "mine.yaml")


def test_preset_file_with_unknown_key_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nlayers: [1]\ncovariance_weight: 3\nclamp: 1\nrate: 1\nsteps: 2\n"
        "token_budget: 9\nchat_context: false\nlambda: 3\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.yaml:9: lambda"):
        load_preset(path)


def test_preset_file_that_is_no_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nlayers: [1\nclamp: }\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:\d"):
        load_preset(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (3, 2)},
        {"layers": (2, 2)},
        {"layers": (-1,)},
        {"covariance_weight": 0},
        {"clamp": float("nan")},
        {"steps": 0},
        {"corpus": "wikipedia"},
        {"key_average": "median"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preset(**SETTINGS | wrong)


@pytest.mark.parametrize(
    "change", [{"layers": (1, 3)}, {"clamp": 0.5}, {"rate": 0.1}, {"steps": 6}, {"seed": 1}, {"chat_context": True}]
)
def test_whatever_changes_a_target_changes_its_digest(change: dict[str, Any]) -> None:
    assert Preset(**SETTINGS).target_digest != Preset(**SETTINGS | change).target_digest


@given(weight=st.floats(1, 1e6), tokens=st.integers(1, 10**9), budget=st.integers(1, 10**6))
def test_targets_survive_changes_that_do_not_touch_them(weight: float, tokens: int, budget: int) -> None:
    other = Preset(
        **SETTINGS | {"covariance_weight": weight, "sample_tokens": tokens, "token_budget": budget, "layers": (0, 2)}
    )
    assert other.target_digest == Preset(**SETTINGS).target_digest
    assert other.digest != Preset(**SETTINGS).digest


def test_scores_and_notes_are_no_settings() -> None:
    told = Preset(**SETTINGS | {"scores": {"S": 84.0}, "note": "measured"})
    assert told.digest == Preset(**SETTINGS).digest


def test_presets_from_papers_say_that_they_were_not_measured() -> None:
    """Only what was measured here has scores; the others say where they are from."""
    presets = [load_preset(name) for name in packaged_presets()]
    assert {preset.name for preset in presets if preset.scores} == {"smollm2-135m"}
    for preset in presets:
        assert bool(preset.scores) != preset.note.startswith("Not measured here."), preset.name
        assert preset.scores or "arXiv" in preset.note or "kmeng01/memit" in preset.note


@pytest.mark.parametrize(
    ("name", "layers", "weight", "clamp", "steps"),
    [
        ("gpt-j-6b", range(3, 9), 15_000, 0.75, 25),
        ("gpt-neox-20b", range(6, 11), 20_000, 0.3, 20),
        ("gpt2-xl", range(13, 18), 20_000, 0.75, 20),
    ],
)
def test_presets_from_papers_are_the_papers(name: str, layers: range, weight: int, clamp: float, steps: int) -> None:
    found = load_preset(name)
    assert found.layers == tuple(layers)
    assert (found.covariance_weight, found.clamp, found.rate, found.steps) == (weight, clamp, 0.5, steps)


def test_lambda_grows_from_a_hundred_facts_on() -> None:
    preset = load_preset("smollm2-135m").model_copy(update={"covariance_weight": 300.0, "covariance_growth": 0.5})
    assert [preset.weight_at(facts) for facts in (1, 100, 400)] == [300.0, 300.0, 600.0]


def test_the_rate_falls_from_the_first_update_to_the_last() -> None:
    preset = load_preset("smollm2-135m").model_copy(update={"rate": 2.0, "rate_decay": 0.25, "steps": 4})
    assert [round(preset.rate_at(step), 9) for step in (1, 2, 3)] == [2.0, 1.0, 0.5]


def test_every_setting_of_the_search_names_another_target() -> None:
    preset = load_preset("smollm2-135m")
    other: dict[str, object] = {
        "clamp": 0.5, "rate": 0.1, "rate_decay": 0.5, "betas": (0.5, 0.5),
        "steps": 3, "weight_decay": 0.1, "kl_weight": 0.1, "seed": 5,
        "stop_loss": 0.7, "diverged_loss": 9.0, "stop_top": True, "early_contexts": 4, "early_steps": 3,
        "chat_context": True, "layers": (3, 4),
    }  # fmt: skip
    digests = {preset.model_copy(update={name: value}).target_digest for name, value in other.items()}
    assert len(digests | {preset.target_digest}) == len(other) + 1
    for name, value in {
        "covariance_weight": 1.0,
        "null_space": 0.1,
        "token_budget": 9,
        "covariance_growth": 1.0,
    }.items():
        assert preset.model_copy(update={name: value}).target_digest == preset.target_digest
