"""The room that knows transformers and peft."""
