"""A model of your own, without transformers: drops in attention and feed-forward, and two views that agree.

python examples/own_model.py
"""

from __future__ import annotations

import torch
import tyro
from torch import Tensor, nn

import hiddenkey

WORDS, LENGTH, WIDTH, HEADS = 50, 24, 32, 4


class Layer(nn.Module):
    """x: (B, T, WIDTH); valid: bool (B, T), False at padding."""

    def __init__(self, recipe: hiddenkey.Recipe) -> None:
        super().__init__()
        self.recipe, self.norm = recipe, nn.LayerNorm(WIDTH)
        self.heads, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 99), nn.GELU(), nn.Linear(99, WIDTH))
        self.drop = hiddenkey.StructuredDropout(recipe)  # the recipe's drop of a stream

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        query, key, value = self.heads(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = valid[:, None, None]  # True = visible, (B, 1, 1, T)
        mixed = hiddenkey.attention(query, key, value, self.recipe, attn_mask=seen, training=self.training)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.drop(self.feed_forward(x), valid)


class Classifier(nn.Module):
    def __init__(self, recipe: hiddenkey.Recipe) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(WORDS, WIDTH), Layer(recipe), nn.Linear(WIDTH, 2)

    def forward(self, words: Tensor, valid: Tensor) -> Tensor:
        return self.head((self.layer(self.words(words), valid) * valid[..., None]).sum(1))


def main(recipe: str = "hiddenkey@0.1", steps: int = 200) -> Classifier:
    """Learn which texts hold more odd words than even ones; every step sees its texts under two draws of masks."""
    parsed = hiddenkey.parse(recipe)
    model = Classifier(parsed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        words, valid = torch.randint(WORDS, (64, LENGTH)), torch.arange(LENGTH) < torch.randint(1, LENGTH, (64, 1))
        classes = (2 * (words % 2 * valid).sum(1) > valid.sum(1)).long()
        logits = model(words, valid)
        task, consistency = nn.functional.cross_entropy(logits, classes), logits.new_zeros(())
        if parsed.consistency is not None:
            other = model(words, valid)  # a second draw; js, jsd and kl-clean compare with one of model.eval()
            consistency = hiddenkey.consistency_loss(parsed.consistency, logits, other)
        (task + parsed.weight * consistency).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: task {task:.4f}, consistency {consistency:.4f}")
    return model.eval()


if __name__ == "__main__":
    tyro.cli(main)
