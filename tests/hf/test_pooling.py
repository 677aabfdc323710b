"""What a regression predicts from, and the refusal to compare anything else."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

import hiddenkey
from hiddenkey.hf import compared_outputs as pooling
from hiddenkey.hf.attachment import step_state

from ..models.shrink import shrink
from .test_pairs import BART, T5, build, texts
from .test_step import DROPS
from .tiny import BATCH, batch, make

XLNET = {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48, "initializer_range": 0.3}
MODERNBERT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
VALUES = (0.3, -1.0, 2.0)


def regression(name, sizes, consistency="kl"):
    return build(name, sizes, consistency, num_labels=1), texts(torch.tensor(VALUES))


def images(kind, consistency="kl"):
    model = getattr(hf, f"{kind}ForImageClassification")
    config = shrink(model.config_class.model_type)
    config.num_labels = 1
    model = model(config).train()
    hiddenkey.attach(model, f"{DROPS} ~ {consistency}")
    pixels = torch.randn(BATCH, config.num_channels, config.image_size, config.image_size)
    return model, {"pixel_values": pixels, "labels": torch.tensor(VALUES)}


OTHERS = {
    "Bart takes <eos>": lambda c: regression("BartForSequenceClassification", BART, c),
    "T5 takes <eos>": lambda c: regression("T5ForSequenceClassification", T5, c),
    "XLNet takes the last token": lambda c: regression("XLNetForSequenceClassification", XLNET, c),
    "a mean over tokens": lambda c: regression(
        "ModernBertForSequenceClassification", {**MODERNBERT, "classifier_pooling": "mean"}, c
    ),
    "a mean over patches": lambda c: images("Beit", c),
    "the first token and a mean over patches": lambda c: images("Dinov2", c),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_regression_from_another_token(case):
    model, inputs = OTHERS[case]("kl")
    name = type(model).__name__
    with pytest.raises(hiddenkey.UserError, match=f"'kl' .* token, but {name} does not predict from that.*'mse'"):
        hiddenkey.consistency_step(model, inputs)
    model, inputs = OTHERS[case]("mse")
    step = hiddenkey.consistency_step(model, inputs)
    predictions = step.outputs.logits
    assert predictions.shape == (BATCH, 1)
    torch.testing.assert_close(step.task, F.mse_loss(predictions[:, 0], inputs["labels"]))
    assert step.consistency > 0


@pytest.mark.parametrize(("name", "pooling"), [("ModernBert", "cls"), ("EuroBert", "bos")])
def test_a_regression_from_the_first_token_goes_on(name, pooling):
    model, inputs = regression(f"{name}ForSequenceClassification", {**MODERNBERT, "classifier_pooling": pooling})
    assert hiddenkey.consistency_step(model, inputs).consistency > 0


def one_step(attached, run, seed):
    torch.manual_seed(seed)
    inputs = {**batch("bert"), "labels": torch.tensor(VALUES)}
    return float(hiddenkey.consistency_step(run(attached), inputs).total.detach())


def test_looking_at_it_changes_nothing():
    """Neither the draws nor the rates, nor the mode of a module; under the compiler neither."""
    for run in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        found = []
        for seen in (False, True):
            model = make("bert", depth=1, num_labels=1)
            attachment = hiddenkey.attach(model, f"{DROPS} ~ kl")
            step_state(attachment).pooling_seen = seen
            found.append((one_step(model, run, 5), str(attachment.rates())))
            assert step_state(attachment).pooling_seen
            assert all(module.training for module in model.modules())
        assert found[0] == found[1]


@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("ends", ("padded", "unpadded", "in the padding token"))
def test_every_batch_is_compared_where_the_model_predicts_from(ends, masked):
    """transformers' decoders look for the last token that is no padding by its id, in every batch anew."""
    model = make("llama", head="ForSequenceClassification", num_labels=1).train()
    attachment = hiddenkey.attach(model, f"{DROPS} ~ kl")
    inputs = {**texts(torch.tensor(VALUES)), "labels": torch.tensor(VALUES)}
    inputs["input_ids"] = torch.randint(3, 60, (BATCH, 12))
    hiddenkey.consistency_step(model, {**inputs, "attention_mask": torch.ones(BATCH, 12)})
    assert step_state(attachment).pooling_seen
    if ends == "padded":
        inputs["input_ids"][0, 7:] = 0
    if ends == "in the padding token":
        inputs["input_ids"][:, -1] = 0
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    if ends == "in the padding token":
        inputs["attention_mask"][:] = 1
    if not masked:
        del inputs["attention_mask"]
    last, read = pooling._tokens_read(inputs, attachment)
    assert torch.equal(read.nonzero()[:, 1], pooling._places(last, inputs, attachment))
