"""The methods of the paper by name: a table that reads like Table 1 of arXiv 2403.00812.

`drops` is a recipe without rates; the rate of the preset is that of every drop in it. A preset of one drop
takes another pattern after a colon: `dropkey:column@0.1`. The last two rows are rivals that the paper leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One row: position and pattern (or pattern:compensation) pairs, the consistency, and where it comes from."""

    drops: tuple[tuple[str, str], ...]
    consistency: str | None
    source: str


HIDDENKEY_MINUS = (("logits", "column"), ("hidden", "element"))
EVERYWHERE = (("input", "element"), ("weights", "element:rescale"), ("hidden", "element"), ("output", "element"))

# fmt: off
PRESETS: dict[str, Preset] = {
    #         name              position, pattern                       consistency  source
    "baseline":      Preset((),                                          None, "Table 1: LoRA, every dropout off"),
    "dropkey":       Preset((("logits", "element"),),                    None, "arXiv 2208.02646; eq. 3"),
    "dropattention": Preset((("weights", "element"),),                   None, "arXiv 1907.11065; eq. 1-2"),
    "hiddencut":     Preset((("hidden", "span"),),                       None, "arXiv 2106.00149; section 3.1"),
    "hiddenkey-":    Preset(HIDDENKEY_MINUS,                             None, "section 3.3, without the loss"),
    "hiddenkey":     Preset(HIDDENKEY_MINUS,                             "kl", "section 3.3; eq. 11"),
    "hiddenkey-js":  Preset(HIDDENKEY_MINUS,                             "js", "Table 1, + JS; eq. 12"),
    "hiddenkey-input":  Preset((*HIDDENKEY_MINUS, ("input", "element")),  None, "Table 1, + input"),
    "hiddenkey-output": Preset((*HIDDENKEY_MINUS, ("output", "element")), None, "Table 1, + output"),
    "dropout":       Preset(EVERYWHERE,                                  None, "plain dropout (JMLR 15, 2014)"),
    "r-drop":        Preset(EVERYWHERE,                                  "kl-rdrop", "arXiv 2106.14448"),
}
# fmt: on
