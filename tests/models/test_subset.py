"""A model of every kind, examined in full; the whole matrix is `test_all.py`."""

import pytest

from .examine import examine
from .record import PARTLY, SUPPORTED

# (status, layers, attentions, feed-forwards), counted by hand in the models' code.
KINDS = {
    "bert": (SUPPORTED, 2, 2, 2),
    "llama": (SUPPORTED, 2, 2, 2),
    "t5": (SUPPORTED, 4, 6, 4),  # a decoder layer has two attentions
    "vit": (SUPPORTED, 2, 2, 2),
    "swin": (SUPPORTED, 8, 8, 8),  # windows; layers in stages
    "wav2vec2-bert": (SUPPORTED, 2, 2, 4),  # a conformer layer has two feed-forward blocks
    "llava": (SUPPORTED, 4, 4, 4),  # two towers
    "mixtral": (SUPPORTED, 2, 2, 2),  # experts
    "gpt_oss": (SUPPORTED, 2, 2, 2),  # experts and attention sinks
    "bloom": (SUPPORTED, 2, 2, 2),  # a softmax of its own
    "gptj": (SUPPORTED, 2, 2, 2),  # the same, in a method
    "jamba": (SUPPORTED, 4, 2, 4),  # two layers of Mamba
    "nemotron_h": (SUPPORTED, 4, 1, 2),  # layers of one kind each
    "glm_moe_dsa": (SUPPORTED, 2, 2, 2),  # the best keys of each query, by a mask of its own
    "longformer": (PARTLY, 2, 0, 2),  # windowed attention takes no drops
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    record = examine(kind)
    assert record.problems == []
    assert (record.status, record.layers, record.attentions, record.feed_forwards) == KINDS[kind]
    assert (record.error != "") == (record.status == PARTLY)
