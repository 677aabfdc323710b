"""Proof that a recipe is at work on a model: `hiddenkey.doctor`."""
