"""Mistakes that would go on in silence, or end in a library's traceback: each is told, and in time."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
)

import hiddenkey
from hiddenkey.errors import ConfigError, DataError, RunError
from hiddenkey.lab import preflight as checked
from hiddenkey.lab import train as run
from hiddenkey.lab.config import TrainConfig, read_fields, read_yaml
from hiddenkey.lab.data import load_examples
from hiddenkey.lab.generation import collect_prompts
from hiddenkey.lab.model import add_lora, build_skeleton, find_targets, load_tokenizer
from hiddenkey.lab.preflight import describe
from hiddenkey.lab.run_folder import read_result
from hiddenkey.lab.tasks import make_task

from ..models.shrink import shrink
from . import tiny
from .test_run import config  # noqa: F401

ROWS = "text,label\n" + "".join(
    f"the film was {word},{i % 2}\n" for i, word in enumerate([*tiny.GOOD, *tiny.BAD] * 3)
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


class TestOverwrite:
    def test_nothing_is_deleted_before_the_checks(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        config = replace(config, epochs=1)
        run.train(config)
        before = contents(Path(config.out))
        wrong = replace(config, overwrite=True, data=str(tmp_path / "typo.csv"))
        with pytest.raises(OSError, match=r"typo\.csv"):
            run.train(wrong)
        with pytest.raises(ConfigError, match="no linear layer"):
            run.train(replace(config, overwrite=True, target_modules=("nothing",)))
        assert contents(Path(config.out)) == before

    def test_what_no_run_wrote_stays(self, config: TrainConfig):  # noqa: F811
        for name in ("checkpoints", "adapter"):
            mine = Path(config.out) / name / "mine.pt"
            mine.parent.mkdir(parents=True)
            mine.write_text("x")
            with pytest.raises(RunError, match=f"would delete .*{name}.*no run of hiddenkey wrote"):
                run.train(replace(config, overwrite=True))
            assert mine.read_text() == "x"
            shutil.rmtree(mine.parent)

    def test_an_earlier_run_is_replaced(self, config: TrainConfig):  # noqa: F811
        run.train(replace(config, epochs=1))
        result = run.train(replace(config, epochs=2, overwrite=True))
        assert len(result.epochs) == 2
        found = read_result(Path(config.out))
        assert found is not None
        assert found.config["epochs"] == 2


class TestFiles:
    @pytest.mark.parametrize("name", ("data[1].csv", "da?a.csv", "da*a.csv", "x[1]/train.csv"))
    def test_a_name_is_no_pattern(self, config: TrainConfig, tmp_path: Path, name: str):  # noqa: F811
        for path, word in ((name, "fine"), ("data1.csv", "WRONG"), ("dada.csv", "WRONG"), ("x1/train.csv", "WRONG")):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(ROWS.replace("film", word))
        data = str(tmp_path / name) if "/" not in name else str((tmp_path / name).parent)
        examples = load_examples(replace(config, data=data))
        assert all("fine" in text and "WRONG" not in text for text in examples.train["first"])

    def test_what_stands_in_it_now_is_read(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        path = tmp_path / "data.csv"
        for word in ("film", "play"):
            path.write_text(ROWS.replace("film", word))
            os.utime(path, (1e9, 1e9))
            assert all(word in text for text in load_examples(replace(config, data=str(path))).train["first"])

    def test_rows_are_shuffled_and_chosen_after_their_cache_is_gone(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        (tmp_path / "data.csv").write_text(ROWS)
        examples = load_examples(replace(config, data=str(tmp_path / "data.csv"), train_size=8))
        assert len(examples.train.shuffle(seed=1).map(lambda row: {"n": len(row["first"])}).filter(bool)) == 8

    def test_one_text_of_a_pair_may_be_empty(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        rows = "sentence1,sentence2,label\n" + "".join(f"a{i},{'b' * (i % 2)},{i % 2}\n" for i in range(12))
        assert "" in load(config, tmp_path, "d.csv", rows).train["second"]
        with pytest.raises(DataError, match="no text in column 'sentence1' or 'sentence2' in 1 rows: 13 "):
            load(config, tmp_path, "d.csv", rows + ",,1\n")

    @pytest.mark.parametrize("data", ("./nowhere", "/nowhere/at/all", "~/nowhere"))
    def test_a_path_is_not_asked_of_the_hub(self, config: TrainConfig, data: str):  # noqa: F811
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            load_examples(replace(config, data=data))

    @pytest.mark.parametrize("name", ("data.txt", "data.xlsx", "data.csv.gz", "data"))
    def test_another_format(self, config: TrainConfig, tmp_path: Path, name: str):  # noqa: F811
        (tmp_path / name).write_text(ROWS)
        with pytest.raises(DataError, match=r"no format that is read.*\.csv"):
            load_examples(replace(config, data=str(tmp_path / name)))


def load(config: TrainConfig, tmp_path: Path, name: str, text: str, **fields: object):  # noqa: F811
    (tmp_path / name).write_text(text)
    return load_examples(replace(config, data=str(tmp_path / name), **fields))


def copied(model: str | Path, tmp_path: Path) -> str:
    return shutil.copytree(model, tmp_path / "own-model", dirs_exist_ok=True).as_posix()


def changed(model: str | Path, tmp_path: Path, fields: dict[str, object]) -> str:
    """A copy of the model with other fields in its config.json."""
    path = Path(copied(model, tmp_path)) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path.parent.as_posix()


QUANTIZERS = {
    "bitsandbytes": "transformers.quantizers.quantizer_bnb_4bit",
    "optimum": "transformers.quantizers.quantizer_gptq",
    "gptqmodel": "transformers.quantizers.quantizer_awq",
    "hqq": "transformers.quantizers.quantizer_hqq",
}
SENTENCES = [{"text": ["a", "b"], "label": i % 2} for i in range(12)]
SEVERAL = [{"text": "a", "label": [i % 2, 2]} for i in range(12)]
FLOATS = ROWS.replace(",0", ",0.0").replace(",1", ",1.0")
ANSWERS = "q,a\n" + "".join(f"q{i},a{i}\n" for i in range(24))
SCORES = ROWS.replace("text,label", "x,y").replace(",1", ",1.5")
ALPACA = [{"instruction": f"do {i}", "input": "with it" * (i % 2), "output": "done"} for i in range(12)]
QUESTIONS = "".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(12))
MESSAGES = "".join(json.dumps({"messages": [{"role": "user", "content": f"q{i}"}]}) + "\n" for i in range(12))
JOINED = ROWS + '"the film was fine,1\nthe film was dull,0\nthe film was warm"%s,1\nthe film was cold,0\n'
MIXED = [{"text": "the film", "label": (True, 1, False, 0)[i % 4]} for i in range(12)]
MISTAKES = {
    "a stray quote that ends a field": ("d.csv", JOINED % "", {}, "line 26: .* takes 3 rows"),
    "a stray quote within a field": ("d.csv", JOINED % " or not", {}, "line 26: .* line 28: .* expected"),
    "a stray quote that stays open": ("d.csv", JOINED.replace('"%s', ""), {}, "line 26: .* line 29: unexpected"),
    "a label before its text": (
        "d.csv",
        'label,text\n0,a\n1,b\n0,"c\n1,d\n0,e"\n',
        {},
        "line 4: .* takes 3 rows",
    ),
    "a backslash before a quote": ("d.csv", ROWS + '"a \\"fine\\" film",1\n', {}, r"line 26: .*written twice"),
    "true and 1": ("d.json", json.dumps(MIXED), {}, "Could not convert 1 .* A column has values of one type"),
    "two columns of one name": ("d.csv", ROWS.replace("text,label", "label,label"), {}, "two columns named 'label'"),
    "names for a file that has them": ("d.csv", ROWS, {"column_names": ("text", "label")}, "has a header line"),
    "names for JSON": ("d.jsonl", '{"text": "a", "label": 0}', {"column_names": ("a", "b")}, "for .csv and .tsv"),
    "Alpaca's third column": ("d.json", json.dumps(ALPACA), {}, "'input' holds text in 6 rows"),
    "lists as texts": ("d.json", json.dumps(SENTENCES), {}, "not as texts"),
    "several labels": ("d.json", json.dumps(SEVERAL), {}, "holds lists"),
    "classes as floats": ("d.csv", FLOATS, {}, "0.0, 1.0: classes or scores"),
    "semicolons": ("d.csv", ROWS.replace(",", ";"), {}, "other separators"),
    "a label among the texts": ("d.csv", ROWS, {"text_columns": ("text", "label")}, "would be text and label"),
    "a text as its own label": ("d.csv", ROWS, {"label_column": "text"}, "'text' would be text and label"),
    "one column twice": ("d.csv", ROWS, {"text_columns": ("text", "text")}, "named twice: 'text', 'text'"),
    "an empty text": ("d.csv", ROWS + '" ",1\n', {}, "no text in column 'text' in 1 rows: 25 "),
    "a row of too few fields": ("d.csv", "label,text\n0,a\n1,b\n0\n", {}, "no text in column 'text' in 1 rows: 3 "),
    "a class for each row": ("d.csv", "text,label\n" + "".join(f"a,c{i}\n" for i in range(9)), {}, "9 different "),
    "one score": ("d.csv", ROWS.replace(",1", ",0.5").replace(",0\n", ",0.5\n"), {}, "holds one score only, 0.5"),
    "questions and answers": ("d.jsonl", QUESTIONS, {}, r"--text-columns.*--prompt-column.*are: question, answer\.$"),
    "ShareGPT": ("d.jsonl", MESSAGES.replace("messages", "conversations"), {}, "in 'conversations', need a chat"),
    "two columns without a header": ("d.csv", ROWS[11:], {}, "has no header line: give --column-names"),
    "two columns of classes": ("d.csv", "a,b\n" + "x,1\ny,0\n" * 12, {}, "--label-column"),
    "two columns of many answers": ("d.csv", ANSWERS, {}, "--label-column"),
    "two columns with scores": ("d.csv", SCORES, {}, "--label-column"),
    "messages": ("d.jsonl", MESSAGES, {}, r"Messages, in 'messages', need a chat template.*TRL"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_data(case: str, config: TrainConfig, tmp_path: Path):  # noqa: F811
    name, text, fields, said = MISTAKES[case]
    with pytest.raises(DataError, match=said):
        load(config, tmp_path, name, text, **fields)


@pytest.mark.parametrize(
    "header", ["Text,Label", " text , label", "TEXT,LABELS", "review,sentiment", "text,sentiment"]
)
def test_names_of_columns(header: str, config: TrainConfig, tmp_path: Path):  # noqa: F811
    found = load(config, tmp_path, "d.csv", ROWS.replace("text,label", header))
    usual = load(config, tmp_path, "e.csv", ROWS)
    assert (found.task, found.label_names) == ("classification", ("0", "1"))
    assert found.train.to_list() == usual.train.to_list()
    assert describe(found).startswith(f"classification: {header.split(',')[1]!r} (0, 1) from")


@pytest.mark.parametrize("lists", [False, True])
def test_a_row_keeps_its_number_after_the_split(lists: bool, config: TrainConfig, llama: Path, tmp_path: Path):  # noqa: F811
    rows = [{"prompt": "the film " * (40 if i == 20 else i % 7 + 1), "completion": "was fine"} for i in range(30)]
    if lists:
        rows = [row | {"completion": ["was fine", "was warm"]} for row in rows]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    config = replace(config, model=str(llama), data=str(tmp_path / "d.json"), max_length=64)
    for seed in (0, 1, 2):
        with pytest.raises(DataError, match=r"In 1 rows \(the first is 21 of its part"):
            checked.check_run(replace(config, data_seed=seed), hiddenkey.parse("baseline"))


def test_the_usual_name_as_it_is_written_wins(config: TrainConfig, tmp_path: Path):  # noqa: F811
    rows = "Text,text,label\n" + "".join(f"no,yes {i},{i % 2}\n" for i in range(12))
    assert "yes" in load(config, tmp_path, "d.csv", rows).train["first"][0]


def test_quoted_texts_of_several_lines(config: TrainConfig, tmp_path: Path):  # noqa: F811
    """Commas and doubled quotes included, and a quote in the middle of a field that has none around it."""
    texts = ['of, two\nlines, and "quotes"', "a\n\nb, c\nd, e", '"', "C:\\", "\n,\n", 'a "b', "1, 2\n3, or 4"] * 2
    tiny.write_csv(tmp_path / "w.csv", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    text = (tmp_path / "w.csv").read_bytes().decode() + 'a 5" film,1\r\n'
    found = load(config, tmp_path, "d.csv", text)
    assert sorted([*found.train["first"], *found.validation["first"]]) == sorted([*texts, 'a 5" film'])


def test_another_encoding(config: TrainConfig, tmp_path: Path):  # noqa: F811
    (tmp_path / "d.csv").write_bytes(ROWS.replace("film", "Fähre").encode("latin-1"))
    with pytest.raises(DataError, match=r"d\.csv cannot be read.*Save it as UTF-8"):
        load_examples(replace(config, data=str(tmp_path / "d.csv")))


def test_bytes_are_no_texts(config: TrainConfig, tmp_path: Path):  # noqa: F811
    Dataset.from_list([{"text": b"good", "label": i % 2} for i in range(12)]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match="read as binary, not as texts"):
        load_examples(replace(config, data=str(tmp_path / "d.parquet")))


def test_floats_may_be_either(config: TrainConfig, tmp_path: Path):  # noqa: F811
    assert load(config, tmp_path, "d.csv", FLOATS, task="classification").label_names == ("0", "1")
    assert load(config, tmp_path, "d.csv", FLOATS, task="regression").task == "regression"
    assert load(config, tmp_path, "d.csv", ROWS.replace(",1", ",1.5").replace(",0", ",0.0")).task == "regression"


def test_columns_without_a_name_are_not_read(config: TrainConfig, tmp_path: Path):  # noqa: F811
    text = ROWS.replace("text,label\n", "text,label,,\n").replace("\nthe", ",,\nthe").replace("label,,,,", "label,,")
    assert len(load(config, tmp_path, "d.csv", text.rstrip("\n") + ",,\n").label_names) == 2


def test_labels_beside_alpacas_columns(config: TrainConfig, tmp_path: Path):  # noqa: F811
    rows = [row | {"text": "the film", "label": i % 2} for i, row in enumerate(ALPACA)]
    assert load(config, tmp_path, "d.json", json.dumps(rows)).task == "classification"
    with pytest.raises(DataError, match="'input' holds text"):
        load(config, tmp_path, "d.json", json.dumps(rows), task="causal-lm")
    rows = [row | {"input": ""} for row in ALPACA]
    assert load(config, tmp_path, "d.json", json.dumps(rows)).task == "causal-lm"


def test_what_is_learnt_is_said(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    text = ROWS.replace("text,label", "id,text,label").replace("the film", "7,the film")
    (tmp_path / "d.csv").write_text(text)
    line = "classification: 'label' (0, 1) from 'text'; not read: id."
    assert describe(load(config, tmp_path, "d.csv", text)) == line
    run.train(replace(config, data=str(tmp_path / "d.csv"), max_steps=1))
    assert line in capsys.readouterr().err


class TestModels:
    def test_a_folder_without_a_tokenizer(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        config = replace(config, model=copied(config.model, tmp_path))
        for path in Path(config.model).glob("*token*"):
            path.unlink()
        with pytest.raises(ConfigError, match="holds no tokenizer"):
            run.train(config)

    def test_a_tokenizer_of_other_texts(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        (tmp_path / "d.csv").write_text(
            "text,label\n" + "".join(f"ein ganz anderer Satz,{i % 2}\n" for i in range(12))
        )
        with pytest.raises(ConfigError, match=r"does not know \d+ of \d+ tokens"):
            run.train(replace(config, data=str(tmp_path / "d.csv")))

    def test_an_encoder_cannot_write(self, config: TrainConfig, pairs: Path):  # noqa: F811
        with pytest.raises(ConfigError, match="is an encoder"):
            run.train(replace(config, data=str(pairs)))

    @pytest.mark.parametrize(
        ("kind", "name", "writes"),
        (
            ("bert", "BertLMHeadModel", False),
            ("xlnet", "XLNetLMHeadModel", False),
            ("xlm", "XLMWithLMHeadModel", False),
            ("big_bird", "BigBirdForCausalLM", False),
            ("bert", "BertLMHeadModel", True),
            ("rembert", "RemBertForCausalLM", True),
            ("roformer", "RoFormerForCausalLM", True),
            ("mvp", "MvpForCausalLM", True),
            ("bart", "BartForCausalLM", True),
            ("llama", "LlamaForCausalLM", True),
            ("bloom", "BloomForCausalLM", True),
            ("mamba", "MambaForCausalLM", True),
            ("jamba", "JambaForCausalLM", True),
        ),
    )
    def test_which_models_write(self, kind: str, name: str, writes: bool):
        shrunk = shrink(kind)
        if writes and kind in ("bert", "rembert", "roformer"):
            shrunk.is_decoder = True
        model = getattr(transformers, name)._from_config(shrunk)
        with nullcontext() if writes else pytest.raises(ConfigError, match="is an encoder"):
            checked._require_causal(model, "it")

    def test_models_without_a_table_of_tokens(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        """CANINE reads characters: its tokenizer needs no file, its embedding is made of hashes."""
        canine = transformers.CanineConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=512,
        )
        transformers.CanineForSequenceClassification(canine).save_pretrained(tmp_path / "canine")
        assert not list((tmp_path / "canine").glob("*token*"))
        skeleton = build_skeleton(str(tmp_path / "canine"), "AutoModelForSequenceClassification")
        found = load_tokenizer(replace(config, model=str(tmp_path / "canine")), skeleton)
        assert found.pad_token_id == 0

    def test_a_head_for_other_classes_is_drawn_anew(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=5)
        model.save_pretrained(tmp_path / "five")
        AutoTokenizer.from_pretrained(config.model).save_pretrained(tmp_path / "five")
        run.train(replace(config, model=str(tmp_path / "five"), max_steps=1))
        names = list(json.loads((Path(config.out) / "adapter/adapter_config.json").read_text())["modules_to_save"])
        assert "classifier" in names

    @pytest.mark.parametrize("field", ("intermediate_size", "hidden_size"))
    def test_weights_of_another_size_than_the_configuration_says(
        self,
        config: TrainConfig,  # noqa: F811
        tmp_path: Path,
        field: str,
    ):
        config = replace(config, model=copied(config.model, tmp_path))
        path = Path(config.model) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: 64}))
        with pytest.raises(ConfigError, match="have other sizes than its configuration says: "):
            run.train(config)

    def test_a_vocabulary_of_another_size(self, config: TrainConfig, llama: Path, pairs: Path, tmp_path: Path):  # noqa: F811
        model = copied(llama, tmp_path)
        path = Path(model) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 99}))
        with pytest.raises(ConfigError, match="have other sizes than its configuration says: "):
            run.train(replace(config, model=model, data=str(pairs), separator=" "))

    def test_a_tokenizer_without_a_token_that_can_pad(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        config = replace(config, model=copied(config.model, tmp_path))
        path = Path(config.model) / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if not key.endswith("_token")}
        path.write_text(json.dumps(kept))
        with pytest.raises(ConfigError, match="has no pad, eos or unk token that the model knows"):
            run.train(config)

    def test_a_model_without_query_and_value_of_a_usual_name(self):
        model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.Linear(2, 2)))
        with pytest.raises(ConfigError, match=r"No query and value of a usual name.*--target-modules.*first, second"):
            find_targets(model)

    def test_a_pad_token_that_the_model_does_not_know(
        self,
        config: TrainConfig,  # noqa: F811
        llama: Path,
        sentences: Path,
        tmp_path: Path,
    ):
        model = copied(llama, tmp_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained(model)
        run.train(replace(config, model=model, data=str(sentences), max_steps=1))
        saved = AutoTokenizer.from_pretrained(Path(config.out) / "adapter")
        assert saved.pad_token == saved.eos_token

    @pytest.mark.parametrize(
        ("fields", "said"),
        (
            ({"hidden_size": "32"}, r"config\.json of .* cannot be read: .*'hidden_size' expected int, got str"),
            ({"num_hidden_layers": None}, r"config\.json of .* cannot be read: .*'num_hidden_layers' expected int"),
            ({"id2label": "x"}, r"config\.json of .* cannot be read: AttributeError"),
            ({"model_type": ["bert"]}, r"config\.json of .* cannot be read: TypeError"),
            ({"architectures": 3}, "cannot be read: TypeError: architectures is a list of class names, got 3"),
            ({"architectures": [3]}, r"cannot be read: TypeError: architectures is a list of .*, got \[3\]"),
            ({"hidden_act": "foo"}, r"\(bert\) cannot be a AutoModelForSequenceClassification: KeyError: 'foo'"),
            ({"vocab_size": -1}, r"\(bert\) cannot be a .*: RuntimeError: .*negative dimension"),
            (
                {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                r"is quantised, and its weights cannot be read here: ImportError: .*pip install -U bitsandbytes",
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised.*pip install optimum"),
            ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantised.*pip install gptqmodel"),
            ({"quantization_config": {"quant_method": "hqq"}}, "is quantised.*HQQ version"),
            ({"quantization_config": {"quant_method": "foo"}}, "is quantised.*Unknown quantization type, got foo"),
        ),
        ids=str,
    )
    def test_a_configuration_that_no_model_fits(
        self,
        config: TrainConfig,  # noqa: F811
        tmp_path: Path,
        fields: dict[str, object],
        said: str,
        monkeypatch: pytest.MonkeyPatch,
    ):
        for package in ("bitsandbytes", "optimum", "gptqmodel", "hqq"):  # installed or not
            monkeypatch.setattr(f"{QUANTIZERS[package]}.is_{package}_available", lambda *_: False)
        with pytest.raises(ConfigError, match=said):
            run.train(replace(config, model=changed(config.model, tmp_path, fields)))
        assert not list(Path(config.out).glob("*.json"))

    @pytest.mark.parametrize("content", ("{", "3", "null", "[" * 100_000), ids=("cut", "3", "null", "nested"))
    def test_a_configuration_that_is_no_object(self, config: TrainConfig, tmp_path: Path, content: str):  # noqa: F811
        model = copied(config.model, tmp_path)
        (Path(model) / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"config\.json of {model} cannot be read: "):
            run.train(replace(config, model=model))

    @pytest.mark.parametrize("published", ("Trainer", "pipeline", "BertTokenizer"))
    def test_published_as_what_is_no_model(self, bert: Path, tmp_path: Path, published: str):
        model = changed(bert, tmp_path, {"architectures": [published]})
        with pytest.raises(ConfigError, match=rf"architectures = \['{published}'\], and .* is no model"):
            build_skeleton(model, "")

    @pytest.mark.parametrize("part", ("data", "validation", "test"))
    def test_a_token_without_a_vector(self, config: TrainConfig, tmp_path: Path, part: str):  # noqa: F811
        model = copied(config.model, tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["zebra"])
        tokenizer.save_pretrained(model)
        files = {name: tmp_path / f"{name}.csv" for name in ("data", "validation", "test")}
        for name, path in files.items():
            path.write_text(ROWS + "the zebra was fine,1\n" * (name == part))
        config = replace(config, model=model, **{name: str(path) for name, path in files.items()})
        with pytest.raises(ConfigError, match="'zebra' has the number 20, but the model has vectors for 20 tokens"):
            run.train(config)

    @pytest.mark.parametrize("asked", ((), ("q_proj",)), ids=("usual", "asked"))
    @pytest.mark.parametrize("kind", ("gemma3", "qwen3_5", "llava", "qwen2_vl", "paligemma", "mllama", "qwen2_audio"))
    def test_no_lora_where_texts_do_not_go(self, config: TrainConfig, kind: str, asked: tuple[str, ...]):  # noqa: F811
        model = transformers.AutoModelForMultimodalLM.from_config(shrink(kind))
        with torch.no_grad():
            adapted = add_lora(model, replace(config, target_modules=asked), "CAUSAL_LM", set()).train()
        ids = torch.arange(10, 18).repeat(2, 1)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert trained
        assert [name for name in trained if adapted.get_parameter(name).grad is None] == []

    def test_all_that_reads_texts_may_have_lora(self, config: TrainConfig):  # noqa: F811
        """BLT has four parts with configurations of their own, and all of them read."""
        model = transformers.AutoModelForCausalLM.from_config(shrink("blt"))
        names = [name for name, _ in model.named_modules() if name.endswith((".q_proj", ".v_proj"))]
        adapted = add_lora(model, config, "CAUSAL_LM", set())
        assert sum(name.endswith("lora_A.default") for name, _ in adapted.named_modules()) == len(names)

    def test_weights_that_are_a_pointer(self, config: TrainConfig, tmp_path: Path):  # noqa: F811
        config = replace(config, model=copied(config.model, tmp_path))
        (Path(config.model) / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
        with pytest.raises(ConfigError, match=r"cannot be read.*git lfs pull"):
            run.train(config)

    def test_folders_of_something_else(self, config: TrainConfig):  # noqa: F811
        run.train(replace(config, max_steps=1))
        for folder, kind in ((config.out, "a run"), (f"{config.out}/adapter", "a PEFT adapter")):
            with pytest.raises(ConfigError, match=f"is the folder of {kind}"):
                run.train(replace(config, model=folder, out=f"{config.out}-2"))
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            run.train(replace(config, model="./nowhere", out=f"{config.out}-2"))

    def test_a_name_that_neither_a_folder_nor_the_hub_has(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
        with pytest.raises(OSError, match="model = 'minilm': here is no folder of that name, and from the hub: "):
            run.train(replace(config, model="minilm"))


class TestYaml:
    def test_what_is_no_file(self, tmp_path: Path):
        for path, said in ((tmp_path, "is a folder"), (tmp_path / "no.yaml", "is not there")):
            with pytest.raises(FileNotFoundError, match=f"{said}; a YAML file is wanted here"):
                read_fields(path)

    def test_a_wrong_type_names_the_file(self, tmp_path: Path):
        (tmp_path / "run.yaml").write_text("epochs: three")
        with pytest.raises(ConfigError, match=r"run\.yaml: epochs = 'three' is not allowed"):
            read_fields(tmp_path / "run.yaml")

    def test_merge_keys(self, tmp_path: Path):
        path = tmp_path / "run.yaml"
        path.write_text("base: &b {seed: 1, lora_r: 4}\nrun:\n  <<: *b\n  seed: 2\n")
        assert read_yaml(path)["run"] == {"seed": 2, "lora_r": 4} == yaml.safe_load(path.read_text())["run"]
        path.write_text("a: &a {seed: 1}\nx: &b {<<: *a, seed: 2}\nc: {<<: *b}\n")
        assert read_yaml(path)["c"] == {"seed": 2}
        path.write_text("run: {seed: 1, seed: 2}")
        with pytest.raises(ConfigError, match="'seed' stands twice"):
            read_yaml(path)


def test_a_separator_from_a_shell():
    assert TrainConfig(model="m", data="d", out="o", separator="\\n\\t->").separator == "\n\t->"


def test_a_classifiers_head_is_no_place_for_lora(config: TrainConfig):  # noqa: F811
    with pytest.raises(ConfigError, match="no linear layer named classifier; there are"):
        run.train(replace(config, target_modules=("classifier",)))


def test_roberta_has_no_place_for_the_tokens_up_to_its_padding(config: TrainConfig, tmp_path: Path):  # noqa: F811
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=34, pad_token_id=1, **sizes)
    )
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    with pytest.raises(ConfigError, match=r"max_length = 33, but .*roberta takes 32"):
        run.train(replace(config, model=str(tmp_path / "roberta"), max_length=33))


@pytest.mark.parametrize(("texts", "special", "least"), (("a text", 2, 3), ("two texts", 3, 5)))
def test_special_tokens_alone_are_no_texts(
    config: TrainConfig,  # noqa: F811
    tmp_path: Path,
    texts: str,
    special: int,
    least: int,
):
    if texts == "two texts":
        (tmp_path / "d.csv").write_text(
            ROWS.replace("text,label", "sentence1,sentence2,label").replace(" was", ",was")
        )
        config = replace(config, data=str(tmp_path / "d.csv"))
    with pytest.raises(ConfigError, match=f"no room for {texts} beside {special} special tokens; give {least} or"):
        run.train(replace(config, max_length=least - 1))
    examples = load_examples(config)
    rows = make_task(examples, "").tokenise(examples.train, AutoTokenizer.from_pretrained(config.model), least)
    assert set(map(len, rows["input_ids"])) == {least}


@pytest.mark.parametrize(("new", "fits"), ((29, True), (30, False)))
def test_what_is_generated_has_no_place_there_either(llama: Path, config: TrainConfig, new: int, fits: bool):  # noqa: F811
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 34, "pad_token_id": 1, "is_decoder": True}
    model = RobertaForCausalLM(RobertaConfig(**sizes, **options)).eval()
    rows = Dataset.from_dict({"prompt": ["the film"], "completion": ["was fine"]})
    asked = replace(config, separator=" ", generation_metrics=("bleu",), test="t.csv", max_new_tokens=new)
    if fits:
        (prompt,) = collect_prompts(asked, rows, tokenizer, model)
        assert len(prompt.ids) + new == 32
        model.generate(torch.tensor([prompt.ids]), max_new_tokens=new, min_new_tokens=new)
        return
    with pytest.raises(ConfigError, match="more than the 32 that"):
        collect_prompts(asked, rows, tokenizer, model)
