"""A model that writes into its batch, as Whisper does: what one view masks, the other must not see."""

import pytest
import torch
import transformers as hf

import hiddenkey


@pytest.mark.parametrize("consistency", ("kl", "kl-rdrop", "kl-clean"))
def test_a_model_that_writes_into_its_batch(consistency):
    """Whisper masks its features in place (SpecAugment): each view masks its own copy, and the batch stays."""
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        decoder_start_token_id=1,
        apply_spec_augment=True,
        mask_time_prob=0.5,
        mask_time_length=2,
        mask_feature_prob=0.5,
        mask_feature_length=2,
    )
    model = hf.WhisperForConditionalGeneration(config).train()
    seen, features = [], torch.randn(2, 8, 40)
    batch = {"input_features": features.clone(), "labels": torch.randint(3, 64, (2, 6))}
    model.model.encoder.conv1.register_forward_pre_hook(lambda module, args: seen.append((args[0] == 0).clone()))
    with hiddenkey.attach(model, f"hiddenkey@0.2 ~ {consistency}"):
        hiddenkey.consistency_step(model, batch).total.backward()
    assert torch.equal(batch["input_features"], features)
    assert model.model.encoder.conv1.weight.grad.isfinite().all()
    assert [bool(masked.any()) for masked in seen] == [True, consistency != "kl-clean"]
    assert not torch.equal(*seen)
    assert (seen[0] & ~seen[1]).any(), "the second view saw what the first one masked"
