"""Generated texts: what is asked of the model, what it may write, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hiddenkey.errors import ConfigError, DataError
from hiddenkey.lab import metrics
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.data import load_examples
from hiddenkey.lab.data_files import PLACE
from hiddenkey.lab.generation import Prompt, Written, collect_prompts, generate
from hiddenkey.lab.generation import _NoRepeat as NoRepeat
from hiddenkey.lab.metrics import ter
from hiddenkey.lab.tasks import Completion, prompt_ids

from . import tiny
from .test_data import write_jsonl
from .test_run import no_weights


def test_a_tokenizer_that_tells_no_offsets():
    with pytest.raises(DataError, match="tells no offsets; causal-lm needs a fast one"):
        Completion(" ").tokenise(Dataset.from_dict({"prompt": ["a"]}), SimpleNamespace(is_fast=False), 8)


PROMPTS = ("the film", "a play in town was", "the town")


@pytest.fixture
def config(llama: Path, tmp_path: Path) -> TrainConfig:
    """A tiny LLaMA on entries with several texts each, tested on generated ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, start in (("train", 0), ("dev", 8), ("test", 12)):
        rows = [
            {"triples": f"{tiny.WORDS[i % 8]} {tiny.WORDS[i % 7]}", "texts": [f"was {tiny.GOOD[i % 4]}", "was flat"]}
            for i in range(start, start + 6)
        ]
        write_jsonl(
            folder / f"{part}.jsonl",
            [row | ({"seen": i < 4} if part == "test" else {}) for i, row in enumerate(rows)],
        )
    return TrainConfig(
        model=str(llama),
        data=str(folder),
        out=str(tmp_path / "run"),
        test="test",
        separator=" ",
        max_length=16,
        batch_size=6,
        epochs=2,
        learning_rate=0.05,
        recipe="hiddenkey@0.3",
        generation_metrics=("bleu", "nist", "ter"),
        num_beams=2,
        max_new_tokens=6,
    )


@pytest.fixture
def writer(llama: Path) -> Iterator[Any]:
    """What `generate` needs of a trainer, around a model with strong opinions and a published habit of sampling."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(25)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    return SimpleNamespace(
        model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        processing_class=tokenizer,
        accelerator=Accelerator(cpu=True),
    )


def as_prompts(tokenizer: Any) -> list[Prompt]:
    return [Prompt(text, tokenizer(text).input_ids, [], None) for text in PROMPTS]


def read_generations(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.out) / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("ends", [False, True])
def test_greedy_takes_the_likeliest_token_up_to_the_end_mark(writer: Any, config: TrainConfig, ends: bool):
    tokenizer = writer.processing_class
    config = replace(config, num_beams=1, no_repeat_ngram=0)
    if ends:
        tokenizer.eos_token = generate(writer, as_prompts(tokenizer)[:1], config)[0].text.split()[2]
    written = generate(writer, as_prompts(tokenizer), config)
    for prompt, found in zip(as_prompts(tokenizer), written, strict=True):
        ids = list(prompt.ids)
        while len(ids) < len(prompt.ids) + config.max_new_tokens and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(int(log_probabilities(writer.model, ids)[-1].argmax()))
        assert found.text == tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True)
        assert found.ended == (ids[-1] == tokenizer.eos_token_id)
    assert len(set(written)) > 1
    assert written[0].ended == ends
    assert writer.model.get_base_model().generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("length_penalty", [0.0, 3.0])
def test_beam_search_finds_the_best_of_all_texts(writer: Any, config: TrainConfig, length_penalty: float):
    """With as many beams as tokens, two steps are a search of everything: log-probability / tokens to the power."""
    tokenizer, count = writer.processing_class, len(tiny.SPECIAL) + len(tiny.WORDS)
    config = replace(config, num_beams=count, max_new_tokens=2, length_penalty=length_penalty)
    written = generate(writer, as_prompts(tokenizer), config)
    for prompt, found in zip(as_prompts(tokenizer), written, strict=True):
        first = log_probabilities(writer.model, prompt.ids)[-1]
        scores: dict[tuple[int, ...], float] = {(tokenizer.eos_token_id,): float(first[tokenizer.eos_token_id])}
        for one in set(range(count)) - {tokenizer.eos_token_id}:
            second = log_probabilities(writer.model, [*prompt.ids, one])[-1]
            scores |= {(one, two): float(first[one] + second[two]) / 2**length_penalty for two in range(count)}
        best = max(scores, key=scores.__getitem__)
        assert found.text == tokenizer.decode(best, skip_special_tokens=True)
        assert found.ended == (tokenizer.eos_token_id in best)


def test_no_run_of_tokens_is_written_twice_but_those_of_the_prompt_may_be():
    forbid = NoRepeat(3, start=3)
    open_to_all = torch.zeros(1, 9)
    after_the_prompts = torch.tensor([[5, 6, 7, 5, 6]])
    assert torch.equal(forbid(after_the_prompts, open_to_all.clone()), open_to_all)
    after_its_own = torch.tensor([[1, 2, 3, 5, 6, 7, 5, 6]])
    assert forbid(after_its_own, open_to_all.clone())[0].tolist() == [0, 0, 0, 0, 0, 0, 0, -float("inf"), 0]


def test_the_limit_on_repetition_reaches_the_search(writer: Any, config: TrainConfig):
    torch.nn.init.zeros_(writer.model.get_base_model().lm_head.weight)  # all tokens alike: the first is taken
    config = replace(config, num_beams=1)
    free, limited = (
        generate(writer, as_prompts(writer.processing_class), replace(config, no_repeat_ngram=size))
        for size in (0, 2)
    )
    assert free == [Written(" ".join(["[PAD]"] * config.max_new_tokens), ended=False)] * len(PROMPTS)
    assert all(1 < found.text.count("[PAD]") < config.max_new_tokens for found in limited)


def as_rows(prompts: list[str], completions: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": prompts, "completion": completions, PLACE: list(range(1, len(prompts) + 1))})


@pytest.mark.parametrize("adds_end", [False, True])
def test_marks_that_stand_in_the_texts_are_not_added_once_more(llama: Path, adds_end: bool):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if adds_end:
        special = [(start, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=special
        )
    task = Completion(" ")
    plain = task.tokenise(as_rows(["the film"], ["was fine"]), tokenizer, 64).to_list()
    assert plain[0]["input_ids"].count(tokenizer.bos_token_id) == 1
    assert plain[0]["input_ids"].count(tokenizer.eos_token_id) == 1
    assert task.tokenise(as_rows([f"{start}the film"], [f"was fine{end}"]), tokenizer, 64).to_list() == plain
    assert prompt_ids([f"{start}the film"], " ", tokenizer) == prompt_ids(["the film"], " ", tokenizer)


@pytest.mark.parametrize("separator", [" ", "\n", " = "])
def test_prompts_are_the_ids_that_training_does_not_learn(llama: Path, tmp_path: Path, separator: str):
    """Also where a token holds the separator and the word after it, as in the tokenizers of GPT-2 and LLaMA."""
    words = [f"▁{word}" for word in (*tiny.WORDS, "=", "x")]
    joined = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", "</s>", *words])}, unk_token="[UNK]")
    )
    joined.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=joined, unk_token="[UNK]", eos_token="</s>")
    for tokenizer in (fast, AutoTokenizer.from_pretrained(llama)):
        rows = as_rows(list(PROMPTS), ["was fine", "warm and cold", "flat"])
        trained = Completion(separator).tokenise(rows, tokenizer, 64)
        for ids, labels, prompt in zip(
            trained["input_ids"], trained["labels"], prompt_ids(list(PROMPTS), separator, tokenizer), strict=True
        ):
            assert ids[: len(prompt)] == prompt
            assert all(label == -100 for label in labels[: len(prompt)])
            assert labels[len(prompt)] != -100


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.full)])
def test_the_kept_adapter_writes_a_text_for_every_different_prompt(config: TrainConfig, keep: Any):
    config = replace(config, keep=keep, metric="loss", epochs=3)
    result = run.train(config)
    rows = read_generations(config)
    test = load_examples(config).test
    assert {row["prompt"]: row["references"] for row in rows} == {
        prompt: [text for other, text in zip(test["prompt"], test["completion"], strict=True) if other == prompt]
        for prompt in test["prompt"]
    }
    assert len({row["prompt"] for row in rows}) == len(rows)
    writer = SimpleNamespace(
        model=AutoPeftModelForCausalLM.from_pretrained(result.adapter),
        processing_class=AutoTokenizer.from_pretrained(result.adapter),
        accelerator=Accelerator(cpu=True),
    )
    prompts = collect_prompts(config, test, writer.processing_class, writer.model)
    assert [Written(row["generated"], row["ended"]) for row in rows] == generate(writer, prompts, config)
    assert result.test[keep]["unended"] == sum(not row["ended"] for row in rows) / len(rows)
    other = "best" if keep == "last" else "last"
    assert set(result.test[keep]) - set(result.test[other]) == {
        "unended",
        *(name + ending for name in ("bleu", "nist", "ter") for ending in ("", "_seen", "_unseen")),
    }
    for ending, wanted in (("", {True, False}), ("_seen", {True}), ("_unseen", {False})):
        chosen = [row for row in rows if row["seen"] in wanted]
        found = ter([row["generated"] for row in chosen], [row["references"] for row in chosen])
        assert result.test[keep]["ter" + ending] == pytest.approx(found)
    assert "| bleu_unseen |" in (result.adapter / "README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"generation_metrics": ("bleu", "rouge")}, "'rouge_l' or 'cider'"),
        ({"test": ""}, "name it with test"),
        ({"max_new_tokens": 62}, "the 64 that"),
        ({"num_beams": 0}, "equal to 1"),
        ({"no_repeat_ngram": -1}, "equal to 0"),
        ({"generation_metrics": ("bleu", "meteor")}, "meteor need Java"),
    ],
)
def test_mistakes_are_told_before_the_weights_are_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
):
    monkeypatch.setattr(run, "load_model", no_weights)
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    with pytest.raises(ConfigError, match=said):
        run.train(replace(config, **fields))


def test_a_classifier_writes_nothing(
    config: TrainConfig, bert: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "load_model", no_weights)
    other = tiny.write_csv(sentences.with_name("other.csv"), tiny.labelled_rows(4))
    with pytest.raises(ConfigError, match="are for causal-lm data"):
        run.train(replace(config, model=str(bert), data=str(sentences), test=str(other)))
