"""Pictures of what was measured, as PNG and SVG. matplotlib comes with the extra `plots` and is loaded when needed.

with figure(Path("out/trace"), width=8, height=3) as drawn:
    drawn.subplots().bar(...)                  # out/trace.png and out/trace.svg, without a display
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kbsync.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "files"]


def files(path: Path) -> list[Path]:
    """The files that `figure` writes for `path`, whose own suffix is replaced."""
    return [path.with_suffix(suffix) for suffix in (".png", ".svg")]


@contextmanager
def figure(path: Path, *, width: float, height: float) -> Iterator[Figure]:
    """An empty matplotlib Figure of `width` x `height` inches, written to `files(path)` at the end.

    Raises UsageError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib", hint="pip install 'kbsync[plots]'") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    yield drawn
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in files(path):
        drawn.savefig(file, dpi=160)
