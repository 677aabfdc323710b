"""METEOR, ROUGE-L and CIDEr as MS COCO has them, by pycocoevalcap: over tokens of the Penn Treebank, in lower case,
without punctuation. The tokenizer and METEOR 1.5 are Java programs that come with it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

SCORERS = {"meteor": Meteor, "rouge_l": Rouge, "cider": Cider}


def tokenise(texts: Sequence[str]) -> list[str]:
    """The words of every text, with a space between two.

    Raises:
        subprocess.CalledProcessError: the tokenizer failed.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    lines = "".join(" ".join(text.replace("|||", " ").split()) + "\n" for text in texts)  # METEOR's mark is |||
    done = subprocess.run([*command, *options], input=lines.encode(), capture_output=True, check=True)
    marks = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.split(" ") if w not in marks) for line in done.stdout.decode().splitlines()]


def caption_scores(
    names: Sequence[str],
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Those of "meteor", "rouge_l" and "cider" that are asked for, of each group; METEOR takes long to start.

    Raises:
        subprocess.CalledProcessError: the tokenizer failed.
    """
    flat = [reference for several in references for reference in several]
    words = iter(tokenise([*texts, *flat]))
    found = [[next(words)] for _ in texts]
    truth = [[next(words) for _ in several] for several in references]
    scores: dict[str, float] = {}
    for name in names:
        scorer = SCORERS[name]()
        for ending, numbers in groups.items():
            score, _ = scorer.compute_score({i: truth[i] for i in numbers}, {i: found[i] for i in numbers})
            scores[name + ending] = float(score)
    return scores
