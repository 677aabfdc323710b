"""Metrics of generated texts against any number of references, in lower case, as in the script of the E2E challenge.

BLEU, NIST and TER are over sacrebleu's tokens. METEOR, ROUGE-L and CIDEr are pycocoevalcap's, over tokens of the Penn
Treebank without punctuation; its tokenizer and METEOR 1.5 are Java programs.
"""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import zip_longest
from operator import or_
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

OF_CAPTIONS = ("meteor", "rouge_l", "cider")
NIST_ORDER = 5
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # a text of two thirds of the length scores half


def measure(
    names: Sequence[str],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """The metrics of `names` of texts against their references: fractions, but for NIST and CIDEr.

    groups: numbers of the texts that are measured together, under the ending of the metric's name.

    Raises:
        subprocess.CalledProcessError: the tokenizer of the Penn Treebank failed.
    """
    captions = {name: caption_scorer(name) for name in names if name in OF_CAPTIONS}
    words, truths = tokenise(texts, references) if captions else ([], [])
    found = {}
    for ending, numbers in groups.items():
        for name in names:
            scorer = captions.get(name) or OF_NGRAMS[name]
            some, theirs = (words, truths) if name in captions else (texts, references)
            found[name + ending] = scorer([some[i] for i in numbers], [theirs[i] for i in numbers])
    return found


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


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of a corpus, 0 to 1 (Papineni et al. 2002), by sacrebleu."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(lowercase=True, force=True).corpus_score(list(texts), _streams(references)).score / 100


def ter(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Edits per word of the mean reference, lower is better (Snover et al. 2006), by sacrebleu."""
    from sacrebleu.metrics.ter import TER

    return TER(normalized=True).corpus_score(list(texts), _streams(references)).score / 100


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST of a corpus (Doddington 2002, eq. 2 and 3), n-grams of up to 5 tokens.

    The n-grams of a text are matched with those of all its references together, as in mteval; nltk takes the best
    reference for each n by itself, and sacrebleu has no NIST.
    """
    outputs = [_ngrams(text) for text in texts]
    truths = [[_ngrams(reference) for reference in several] for several in references]
    counts: Counter[tuple[str, ...]] = Counter()
    for grams, length in (found for several in truths for found in several):
        counts.update(grams)
        counts[()] += length
    gained, possible = [0.0] * (NIST_ORDER + 1), [0] * (NIST_ORDER + 1)
    for (grams, _), several in zip(outputs, truths, strict=True):
        for gram, times in (grams & reduce(or_, (known for known, _ in several))).items():
            gained[len(gram)] += times * math.log2(counts[gram[:-1]] / counts[gram])
        for gram, times in grams.items():
            possible[len(gram)] += times
    length = sum(length for _, length in outputs)
    expected = sum(sum(length for _, length in several) / len(several) for several in truths)
    total = sum(gain / count for gain, count in zip(gained, possible, strict=True) if count)
    return total * math.exp(NIST_BETA * math.log(min(1.0, length / expected)) ** 2) if length else 0.0


OF_NGRAMS: dict[str, Scorer] = {"bleu": bleu, "nist": nist, "ter": ter}


def caption_scorer(name: str) -> Scorer:
    """One of pycocoevalcap's metrics, over words as `tokenise` gives them; METEOR takes long to start."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = {"meteor": Meteor, "rouge_l": Rouge, "cider": Cider}[name]()

    def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        found, _ = scorer.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(texts)})
        return float(found)

    return score


def tokenise(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The words of every text and of every reference, with a space between two.

    pycocoevalcap's own wrapper of this program writes a file into its installed folder, uses the locale's encoding,
    and does not notice if the program fails.

    Raises:
        subprocess.CalledProcessError: the tokenizer failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    flat = [*texts, *(reference for several in references for reference in several)]
    lines = "".join(" ".join(text.replace("|||", " ").split()) + "\n" for text in flat)  # METEOR's mark is |||
    done = subprocess.run([*command, *options], input=lines.encode(), capture_output=True, check=True)
    marks = set(ptbtokenizer.PUNCTUATIONS)
    words = (" ".join(w for w in line.split(" ") if w not in marks) for line in done.stdout.decode().splitlines())
    return [next(words) for _ in texts], [[next(words) for _ in several] for several in references]


def _streams(references: Sequence[Sequence[str]]) -> Any:
    """From the references of each text to the n-th references of all, None where there are fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def _ngrams(text: str) -> tuple[Counter[tuple[str, ...]], int]:
    """All n-grams of up to `NIST_ORDER` tokens of mteval-v13a with their counts, and the number of tokens."""
    from sacrebleu.metrics.helpers import extract_all_word_ngrams
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return extract_all_word_ngrams(Tokenizer13a()(text.lower()), 1, NIST_ORDER)
