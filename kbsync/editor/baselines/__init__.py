"""Other ways to teach a model facts, small and clear, to compare MEMIT with: FT-W and ROME, as in section 5 of arXiv
2210.07229.

Each gives Δ [d, f] in float64 by module for a list of requests, and leaves the network as it was. AlphaEdit's
null-space projection is a setting of the engine's own insertion (`Preset.null_space`).
"""

from kbsync.editor.baselines.finetune import FineTuning, finetune
from kbsync.editor.baselines.rome import rome, rome_settings

__all__ = ["FineTuning", "finetune", "rome", "rome_settings"]
