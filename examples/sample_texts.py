"""A few texts, so that every example runs as it is. Put your own in their place."""

from __future__ import annotations

GOOD = ("a warm and lively film", "bright from start to end", "the play was fine", "a joy to watch in town")
BAD = ("a dull and grey film", "cold from start to end", "the play was flat", "a pain to sit through")

SENTENCES = [
    {"text": text, "label": label} for pair in zip(BAD, GOOD, strict=True) for label, text in enumerate(pair)
]

PAIRS = [{"prompt": "Review of the film:", "completion": f" {text}."} for text in (*GOOD, *BAD)]

PREFERENCES = [
    {"prompt": "A kind review of the film:", "chosen": f" {good}.", "rejected": f" {bad}."}
    for good in GOOD
    for bad in BAD
]
