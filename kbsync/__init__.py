"""kbsync keeps the facts inside a language model fresh: sources, a fact ledger, MEMIT edits, versions.

import kbsync
base = kbsync.load_model("my-workspace")      # the live version, checked byte for byte
"""

from __future__ import annotations

from importlib.metadata import version as _version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kbsync.editor.model import Base

__all__ = ["__version__", "load_model"]

__version__ = _version("kbsync")


def load_model(workspace: str | Path, version: int | str = "live") -> Base:
    """The model of a workspace with the weights of a version (its number, an alias such as `live`, or HEAD): `.network`
    and `.tokenizer` are transformers' own.

    Raises ConfigError, ModelError, UsageError (no such version), BaseMismatch and StoreError (a file is not as
    recorded): all of them `kbsync.errors.KbsyncError`.
    """
    from kbsync.serving import load_model as load  # the ledger's libraries are not loaded by `import kbsync`

    return load(workspace, version)
