"""Control prompts: the shipped set and subjects of a file."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from kbsync.editor.controls import NO_CONTROLS, Controls, shipped_controls, subject_controls
from kbsync.errors import ConfigError

PROMPT = "{subject} belongs to the constellation of"


def shipped() -> list[tuple[str, str]]:
    """The subject and prompt of each shipped line."""
    text = (resources.files("kbsync.editor") / "controls.txt").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(subject, prompt) for subject, prompt in rows]


def test_a_hundred_prompts_are_shipped() -> None:
    """Each once, each about one subject, none ending in white space."""
    rows = shipped()
    assert len(rows) == len({prompt for _, prompt in rows}) == len({subject for subject, _ in rows}) == 100
    for subject, prompt in rows:
        assert subject.casefold() in prompt.casefold()
        assert prompt == prompt.strip()


def test_no_shipped_prompt_is_about_what_the_shipped_policies_sync() -> None:
    """No stars, no constellations, nobody in office."""
    words = re.compile(r"\b(star|constellation|governor|senator|president|minister|elected)\b", re.IGNORECASE)
    assert not [prompt for _, prompt in shipped() if words.search(prompt)]


def test_prompts_about_synced_subjects_are_left_out() -> None:
    """Whole words, whatever the case: `France` leaves out the prompt about France, `Fran` none."""
    controls = shipped_controls(["FRANCE", "Beatles", "Fran", "Orion"])
    assert len(controls.prompts) == 98
    assert not [prompt for prompt in controls.prompts if "capital of France" in prompt or "Beatles" in prompt]
    assert controls.description == "98 of 100 shipped common-knowledge prompts"


def test_a_file_of_subjects_becomes_prompts_of_the_relation(tmp_path: Path) -> None:
    """Comments, empty lines, repetitions and synced subjects are left out; braces in a label are data."""
    path = tmp_path / "never.txt"
    path.write_text("# near neighbors\nVega\n\nDeneb {A}\nVega\nRigel\n", encoding="utf-8")
    controls = subject_controls(path, PROMPT, synced=["rigel"])
    assert controls.prompts == ("Vega belongs to the constellation of", "Deneb {A} belongs to the constellation of")
    assert controls.description == "2 never-synced subjects of never.txt"


@pytest.mark.parametrize("body", [b"", b"# nothing\n", b"\xff\xfe", b"Rigel\n"])
def test_a_file_without_a_control_subject_is_refused(tmp_path: Path, body: bytes) -> None:
    """An empty one, a binary one, and one whose subjects are all synced."""
    path = tmp_path / "never.txt"
    path.write_bytes(body)
    with pytest.raises(ConfigError, match=r"never\.txt: controls"):
        subject_controls(path, PROMPT, synced=["Rigel"])


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    """By its name and the policy's key."""
    with pytest.raises(ConfigError, match=r"absent\.txt: controls"):
        subject_controls(tmp_path / "absent.txt", PROMPT)


def test_sets_are_joined() -> None:
    """Each prompt once; nothing joined to nothing is nothing."""
    one, two = Controls(("a", "b"), "one"), Controls(("b", "c"), "two")
    assert one + two == Controls(("a", "b", "c"), "one + two")
    assert one + NO_CONTROLS == NO_CONTROLS + one == one
    assert NO_CONTROLS + NO_CONTROLS == NO_CONTROLS
