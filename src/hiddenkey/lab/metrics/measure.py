"""Which metrics there are, what they need, and all that are asked for at once."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from ..errors import ConfigError

OF_NGRAMS = ("bleu", "nist", "ter")
OF_CAPTIONS = ("meteor", "rouge_l", "cider")


def require_tools(names: Sequence[str]) -> None:
    """Raises ConfigError where Java is needed and missing, ModuleNotFoundError where a library is."""
    asked = [name for name in names if name in OF_CAPTIONS]
    if asked and not has_java():
        raise ConfigError(
            f"generation_metrics {', '.join(asked)} need Java (a command `java` that runs; on Debian: apt install "
            f"default-jre-headless). Install it, or ask for {', '.join(OF_NGRAMS)} only."
        )
    import sacrebleu  # noqa: F401

    if asked:
        import pycocoevalcap.cider.cider  # noqa: F401


def has_java() -> bool:
    """Whether a Java runtime is there and starts."""
    try:
        return subprocess.run(["java", "-version"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def measure(
    names: Sequence[str],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """The metrics of `names` of texts against their references: fractions, but for NIST and CIDEr.

    groups: numbers of the texts that are measured together, under the ending of the metric's name.
    """
    from . import ngrams

    found: dict[str, float] = {}
    for ending, numbers in groups.items():
        some, truth = [texts[i] for i in numbers], [references[i] for i in numbers]
        found |= {name + ending: getattr(ngrams, name)(some, truth) for name in names if name in OF_NGRAMS}
    of_captions = [name for name in names if name in OF_CAPTIONS]
    if of_captions:
        from .captions import caption_scores

        found |= caption_scores(of_captions, texts, references, groups)
    return {name + ending: found[name + ending] for ending in groups for name in names}
