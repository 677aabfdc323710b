"""Texts that a trained model writes for the test prompts, by greedy or beam search, and their metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import GenerationConfig, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from ..errors import ConfigError
from .callbacks import heed
from .config import TrainConfig
from .console import say
from .data_files import SEEN, values
from .metrics import measure, require_tools
from .model import positions
from .run_folder import GENERATIONS, write_text
from .tasks import prompt_ids


@dataclass(frozen=True)
class Prompt:
    """One of the different prompts of the test part, with all its references."""

    text: str
    ids: list[int]
    references: list[str]
    seen: bool | None
    """Whether training had prompts of its kind, where the data says so (WebNLG)."""


@dataclass(frozen=True)
class Written:
    """What a model wrote for a prompt, in one line, and whether it set the end mark or was cut at max_new_tokens."""

    text: str
    ended: bool


def collect_prompts(config: TrainConfig, rows: Dataset | None, tokenizer: Any, model: Any) -> list[Prompt]:
    """What is to be generated for; empty where no metric of generated texts is asked for.

    Raises:
        ConfigError: the task has no prompts, a metric needs what is not installed, or a prompt with its text does not
            fit into the model.
    """
    if not config.generation_metrics or rows is None:
        return []
    if "prompt" not in rows.column_names:
        raise ConfigError("generation_metrics are for causal-lm data; leave them out.")
    require_tools(config.generation_metrics)
    references: dict[str, list[str]] = {}
    for prompt, completion in zip(values(rows, "prompt"), values(rows, "completion"), strict=True):
        references.setdefault(prompt, []).append(completion)
    seen = dict(zip(values(rows, "prompt"), values(rows, SEEN), strict=True)) if SEEN in rows.column_names else {}
    ids = prompt_ids(list(references), config.separator, tokenizer)
    room = positions(model)
    longest = max(map(len, ids)) + config.max_new_tokens
    if room is not None and longest > room:
        raise ConfigError(
            f"The longest test prompt has {longest - config.max_new_tokens} tokens, with max_new_tokens = "
            f"{config.max_new_tokens} that is more than the {room} that {config.model} takes; give fewer."
        )
    return [Prompt(text, ids[i], several, seen.get(text)) for i, (text, several) in enumerate(references.items())]


def generation_scores(trainer: Any, prompts: list[Prompt], config: TrainConfig, console: Console) -> dict[str, float]:
    """Metrics of what the trainer's model generates; the texts go to `generations.jsonl`.

    Where the prompts are marked as seen or unseen, every metric comes also as `bleu_seen`, `bleu_unseen`, ….
    `unended` is the share of texts that were cut at max_new_tokens.
    """
    written = generate(trainer, prompts, config)
    lines = [json.dumps(_row(*pair), ensure_ascii=False) + "\n" for pair in zip(prompts, written, strict=True)]
    write_text(Path(config.out) / GENERATIONS, "".join(lines))
    texts, references = [found.text for found in written], [prompt.references for prompt in prompts]
    scores = measure(config.generation_metrics, texts, references, _groups(prompts))
    cut = sum(not found.ended for found in written)
    if cut:
        say(console, f"{cut} of {len(written)} texts were cut at max_new_tokens = {config.max_new_tokens}.")
    return {**scores, "unended": cut / len(written)}


def generate(trainer: Any, prompts: list[Prompt], config: TrainConfig) -> list[Written]:
    """One text per prompt, in their order: without drops, in one line, special tokens left out."""
    tokenizer, model = trainer.processing_class, trainer.model.get_base_model()
    trainer.model.eval()
    theirs, model.generation_config = model.generation_config, _settings(config, tokenizer)
    found: dict[int, Written] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    size = max(1, config.eval_batch_size // config.num_beams)
    try:
        for first in range(0, len(prompts), size):
            heed()
            numbers = by_length[first : first + size]
            rows = [{"input_ids": prompts[i].ids} for i in numbers]
            batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
            start = batch["input_ids"].shape[1]
            with torch.no_grad(), trainer.accelerator.autocast():
                ids = model.generate(**batch, logits_processor=_processors(config.no_repeat_ngram, start))
            texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
            for i, text, written in zip(numbers, texts, ids[:, start:].tolist(), strict=True):
                found[i] = Written(" ".join(text.split()), tokenizer.eos_token_id in written)
    finally:
        model.generation_config = theirs
    return [found[i] for i in range(len(prompts))]


class _NoRepeat(NoRepeatNGramLogitsProcessor):
    """No n-gram twice in what is generated; transformers' own also forbids those of the prompt, such as names."""

    def __init__(self, size: int, start: int) -> None:
        super().__init__(size)
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids[:, self.start :], scores)


def _processors(size: int, start: int) -> LogitsProcessorList:
    return LogitsProcessorList([_NoRepeat(size, start)] if size else [])


def _settings(config: TrainConfig, tokenizer: Any) -> GenerationConfig:
    """Ours alone: what a published model brings along, such as sampling, is not used."""
    beams = {"num_beams": config.num_beams, "length_penalty": config.length_penalty} if config.num_beams > 1 else {}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **beams,
    )


def _groups(prompts: list[Prompt]) -> dict[str, list[int]]:
    groups = {"": list(range(len(prompts)))}
    for ending, truth in (("_seen", True), ("_unseen", False)):
        groups[ending] = [i for i, prompt in enumerate(prompts) if prompt.seen is truth]
    return {ending: numbers for ending, numbers in groups.items() if numbers}


def _row(prompt: Prompt, found: Written) -> dict[str, Any]:
    row = {"prompt": prompt.text, "generated": found.text, "ended": found.ended, "references": prompt.references}
    return row if prompt.seen is None else row | {SEEN: prompt.seen}
