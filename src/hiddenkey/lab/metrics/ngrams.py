"""BLEU and NIST over the tokens of mteval-v13a, TER over those of Tercom; lower case, any number of references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.ter import TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Tokens = tuple[str, ...]

_NIST_ORDER = 5
_NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # a text of two thirds of the length scores half


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of a corpus, 0 to 1 (Papineni et al. 2002), by sacrebleu."""
    return BLEU(lowercase=True, force=True).corpus_score(list(texts), _streams(references)).score / 100


def ter(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Edits per word of the mean reference, lower is better (Snover et al. 2006), by sacrebleu."""
    return TER(normalized=True).corpus_score(list(texts), _streams(references)).score / 100


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST of a corpus (Doddington 2002, eq. 2 and 3), n-grams of up to 5 tokens.

    The n-grams of a text are matched with those of all its references together, as in mteval; nltk takes the best
    reference for each n by itself.
    """
    outputs = [_tokens(text) for text in texts]
    truths = [[_tokens(reference) for reference in several] for several in references]
    everything = [reference for several in truths for reference in several]
    counts: Counter[Tokens] = Counter(
        gram for tokens in everything for n in range(1, _NIST_ORDER + 1) for gram in _ngrams(tokens, n)
    )
    counts[()] = sum(map(len, everything))
    total = 0.0
    for n in range(1, _NIST_ORDER + 1):
        gained, possible = 0.0, 0
        for output, several in zip(outputs, truths, strict=True):
            found = Counter(_ngrams(output, n))
            known: Counter[Tokens] = Counter()
            for reference in several:
                known |= Counter(_ngrams(reference, n))
            gained += sum(
                times * math.log2(counts[gram[:-1]] / counts[gram]) for gram, times in (found & known).items()
            )
            possible += found.total()
        total += gained / possible if possible else 0.0
    length = sum(map(len, outputs))
    expected = sum(sum(map(len, several)) / len(several) for several in truths)
    return total * math.exp(_NIST_BETA * math.log(min(1.0, length / expected)) ** 2) if length else 0.0


def _streams(references: Sequence[Sequence[str]]) -> Any:
    """From the references of each text to the n-th references of all, None where there are fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def _tokens(text: str) -> list[str]:
    return Tokenizer13a()(text.lower()).split()


def _ngrams(tokens: list[str], n: int) -> Iterator[Tokens]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)
