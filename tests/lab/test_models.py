"""What the loader does with weights that a checkpoint lacks."""

import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from hiddenkey.errors import ConfigError
from hiddenkey.lab import doctor_command as doctor
from hiddenkey.lab import model as models
from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.model import build_skeleton
from hiddenkey.lab.train import train

from ..models.shrink import shrink
from . import tiny
from .test_run import config  # noqa: F401

CLASSIFIER, WRITER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
# The class that each kind is published as, what it is loaded for, a layer as its file names it, and what is new then.
FAMILIES = (
    ("bert", "BertModel", CLASSIFIER, "encoder.layer.1.", ("classifier",)),
    ("bert", "BertForMaskedLM", CLASSIFIER, "encoder.layer.1.", ("classifier", "pooler")),
    ("gte", "GteModel", CLASSIFIER, "encoder.layer.1.", ("classifier", "pooler")),
    ("roberta", "RobertaForMaskedLM", CLASSIFIER, "encoder.layer.0.", ("classifier",)),
    ("deberta-v2", "DebertaV2ForMaskedLM", CLASSIFIER, "encoder.layer.1.", ("classifier", "pooler")),
    ("electra", "ElectraForPreTraining", CLASSIFIER, "encoder.layer.1.", ("classifier",)),
    ("distilbert", "DistilBertForMaskedLM", CLASSIFIER, "layer.1.", ("classifier", "pre_classifier")),
    ("albert", "AlbertForMaskedLM", CLASSIFIER, "albert_layers.0.", ("classifier", "pooler")),
    ("gpt2", "GPT2LMHeadModel", CLASSIFIER, "h.1.", ("score",)),
    ("gpt2", "GPT2LMHeadModel", WRITER, "h.1.", ()),
    ("llama", "LlamaForCausalLM", CLASSIFIER, "layers.1.", ("score",)),
    ("llama", "LlamaForCausalLM", WRITER, "layers.1.", ()),
    ("llama", "LlamaForCausalLM", WRITER, "lm_head.", ()),
    ("t5", "T5ForConditionalGeneration", CLASSIFIER, "decoder.block.1.", ("classification_head",)),
    ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "encoder.block.1.", ()),
    ("gemma3_text", "Gemma3ForCausalLM", CLASSIFIER, "layers.1.", ("score",)),
    ("gemma3_text", "Gemma3ForCausalLM", WRITER, "layers.1.", ()),
    ("gemma3", "Gemma3ForConditionalGeneration", CLASSIFIER, "language_model.model.layers.1.", ("score",)),
    ("qwen3_5", "Qwen3_5ForConditionalGeneration", CLASSIFIER, "language_model.layers.1.", ("score",)),
    ("vit", "ViTModel", "AutoModelForImageClassification", "encoder.layer.1.", ("classifier",)),
    ("vit", "ViTForImageClassification", "AutoModelForImageClassification", "classifier.", ()),
    ("bert", "BertForSequenceClassification", CLASSIFIER, "pooler.", ()),
    ("bert", "BertForSequenceClassification", CLASSIFIER, "classifier.", ()),
    ("bert", "BertForMaskedLM", "AutoModelForMaskedLM", "cls.predictions.transform.", ()),
)


def _without(model: Path, part: str, folder: Path) -> Path:
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, weights, metadata={"format": "pt"})
    return folder


def _read(folder: Path, auto: str) -> set[str]:
    asked = TrainConfig(model=str(folder), data="", out="", learning_rate=1e-3)
    return models.read_weights(getattr(transformers, auto), asked)[1]


@pytest.mark.parametrize(("kind", "published", "auto", "layer", "new"), FAMILIES)
def test_a_head_alone_may_be_new(
    kind: str, published: str, auto: str, layer: str, new: tuple[str, ...], tmp_path: Path
):
    getattr(transformers, published)._from_config(shrink(kind)).save_pretrained(tmp_path / "whole")
    found = _read(tmp_path / "whole", auto)
    assert {next((part for part in new if part in key.split(".")), key) for key in found} == set(new)
    model = _without(tmp_path / "whole", layer, tmp_path / "damaged")
    with pytest.raises(ConfigError, match=rf"lack \d+ of \w+'s, .*\b{layer.split('.')[-2]}\."):
        _read(model, auto)


def test_a_language_models_head_is_never_new(tmp_path: Path):
    untied = shrink("llama")
    untied.tie_word_embeddings = False
    transformers.LlamaModel(untied).save_pretrained(tmp_path / "headless")
    with pytest.raises(ConfigError, match=r"lack 1 of LlamaForCausalLM's.*: lm_head\.weight"):
        _read(tmp_path / "headless", WRITER)
    tied = shrink("llama")
    tied.tie_word_embeddings = True
    transformers.LlamaModel(tied).save_pretrained(tmp_path / "tied")
    assert not _read(tmp_path / "tied", WRITER)


def test_a_head_of_another_width_is_an_error(tmp_path: Path):
    classifier = shrink("roberta")
    transformers.RobertaForSequenceClassification(classifier).save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["classifier.dense.weight"] = weights["classifier.dense.weight"][:8].clone()
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other sizes than its configuration says: classifier\.dense\.weight"):
        _read(tmp_path / "model", CLASSIFIER)


def test_the_places_of_a_model_of_text_and_images_are_its_texts(tmp_path: Path):
    tiny.save_tokenizer(tmp_path, decoder=True, longest=10_000)
    shrink("gemma3").save_pretrained(tmp_path)
    asked = TrainConfig(model=str(tmp_path), data="", out="", learning_rate=1e-3, max_length=513)
    with pytest.raises(ConfigError, match=r"max_length = 513, but .* takes 512; give 512"):
        models.load_tokenizer(asked, build_skeleton(asked.model, CLASSIFIER))


def test_neither_train_nor_doctor_begins_with_a_layer_missing(config: TrainConfig, bert: Path, tmp_path: Path):  # noqa: F811
    model = _without(bert, "encoder.layer.0.", tmp_path / "model")
    asked = TrainConfig(**{**config.to_dict(), "model": str(model)})
    for begin in (train, lambda asked: doctor.load(asked, "")):
        with pytest.raises(ConfigError, match=r"lack \d+ .*bert\.encoder\.layer\.0\."):
            begin(asked)
