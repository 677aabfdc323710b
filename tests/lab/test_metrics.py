"""Metrics, against values worked out by hand from their equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from transformers import EvalPrediction

from hiddenkey.errors import ConfigError
from hiddenkey.lab import metrics
from hiddenkey.lab.metrics import bleu, has_java, measure, nist, ter, tokenise
from hiddenkey.lab.tasks import Classification, Completion, Regression

needs_java = pytest.mark.skipif(not has_java(), reason="METEOR, ROUGE-L and CIDEr need Java")


def test_bleu_is_the_geometric_mean_of_four_precisions():
    assert bleu(["a b c d e"], [["a b c d f", "a b x"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_adds_up_counts_over_texts_with_different_numbers_of_references():
    found = bleu(["a b c d e", "g h i j"], [["a b c d f", "a b x", "e"], ["g h i j"]])
    assert found == pytest.approx((9 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)


def test_bleu_takes_the_length_of_the_nearest_reference():
    assert bleu(["a b c d"], [["a b c d e", "a b c d e f"]]) == pytest.approx(math.exp(1 - 5 / 4))


@pytest.mark.parametrize("metric", [bleu, nist, ter])
def test_case_does_not_count_and_marks_are_tokens(metric):
    texts, references = (
        ['The "Cat," sat on it.', "Café, £20-25!"],
        [['the " cat , " SAT on it .'], ["café , £20 - 25 !"]],
    )
    assert metric(texts, references) == pytest.approx(metric([r for (r,) in references], references))


def test_nist_weighs_what_references_tell():
    # References: a twice, b and c once of 4 tokens; "a b" once after two a. Information: a 1, b 2, "a b" 1 bits.
    assert nist(["a b"], [["a b", "a c"]]) == pytest.approx((1 + 2) / 2 + 1 / 1)


def test_nist_matches_all_references_together():
    # b and c from different references: 1 + 2 + 2 bits over 3 tokens; "a b" 1 bit over 2 pairs.
    assert nist(["a b c"], [["a b", "a c"]]) == pytest.approx(5 / 3 + 1 / 2)


def test_nist_of_two_thirds_of_the_mean_length_is_halved():
    assert nist(["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)
    assert nist(["a b", ""], [["a b"], ["c d"]]) == pytest.approx(
        2 * math.exp(-(math.log(2) ** 3) / math.log(1.5) ** 2)
    )


def test_ter_counts_edits_and_shifts_per_word_of_the_mean_reference():
    assert ter(["a b c d"], [["a b c e"]]) == pytest.approx(1 / 4)
    assert ter(["c d a b"], [["a b c d"]]) == pytest.approx(1 / 4)
    assert ter(["a b c d"], [["a b c e", "x x x x x x"]]) == pytest.approx(1 / 5)


def test_without_java_the_metrics_that_need_it_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert not has_java()
    metrics.require_tools(["bleu", "nist", "ter"])
    with pytest.raises(ConfigError, match=r"meteor, cider need Java .*ask for bleu, nist, ter only"):
        metrics.require_tools(["bleu", "meteor", "cider"])


@needs_java
def test_words_of_the_treebank_without_marks():
    texts, references = (
        ["Café Sicilia is cheap, isn't it?", ""],
        [["A  very\nnice ||| one."], ["It's (not) --cheap--"]],
    )
    words, truths = tokenise(texts, references)
    assert words == ["café sicilia is cheap is n't it", ""]
    assert truths == [["a very nice one"], ["it 's -lrb- not -rrb- cheap"]]
    plain = [[{"caption": text}] for text in ("Isn't it?", "", *references[1])]
    theirs = PTBTokenizer().tokenize(dict(enumerate(plain)))
    assert [several[0] for several in theirs.values()] == ["is n't it", "", truths[1][0]]


@needs_java
def test_rouge_l_and_cider_of_all_and_of_groups():
    texts = ["dogs eat fish", "dogs eat fish today", "no word in common"]
    references = [["dogs seldom eat"], ["dogs eat fish today"], ["birds sing songs together"]]
    found = measure(["rouge_l", "cider"], texts, references, {"": [0, 1], "_unlike": [1, 2]})
    # The longest common run of words with gaps is 2 of 3 on both sides; F is the same 2/3 for every weight.
    assert found["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["rouge_l_unlike"] == pytest.approx(1 / 2)
    # The same n-grams as its reference, of which no other text has any: cosine 1 for n = 1 to 4, times 10.
    assert found["cider_unlike"] == pytest.approx(10 / 2)


@needs_java
@pytest.mark.full
def test_meteor_knows_equal_texts_and_stems():
    texts = ["The dogs are eating fish.", "Nothing alike here.", "The dog eats fish."]
    found = measure(["meteor"], texts, [texts[:1]] * 3, {"_same": [0], "_other": [1], "_stem": [2]})
    assert found["meteor_same"] == pytest.approx(1.0)
    assert found["meteor_other"] == pytest.approx(0.0)
    assert 0.2 < found["meteor_stem"] < 1


def of(task, found, truth):
    return task.measure(EvalPrediction(np.asarray(found, dtype=np.float32), np.asarray(truth)))


@pytest.mark.parametrize(("found", "truth"), [([1.0, 1.0, 1.0], [0.1, 0.2, 0.3]), ([0.1, 0.2, 0.3], [2.0, 2.0, 2.0])])
def test_where_all_are_alike_there_is_no_correlation(found, truth):
    assert of(Regression(), found, truth) == {"pearson": 0.0, "spearman": 0.0}


def test_f1_of_more_than_two_classes_weighs_them_alike():
    found = np.eye(3)[[0, 0, 0, 1, 1]]
    assert of(Classification(("a", "b", "c")), found, [0, 0, 0, 1, 2])["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_which_way_is_better():
    names = ("loss", "nll", "token_accuracy", "accuracy", "pearson")
    for kind, lower in ((Completion, {"loss", "nll"}), (Classification, {"loss"}), (Regression, {"loss"})):
        assert {name for name in names if name in kind.lower_is_better} == lower
