"""`python -m tests.models [--fresh] [model types]`: examine what has no row yet, then write docs/models.md.

Rows are kept in build/models.jsonl, so a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

# Loaded before the forks, so that every child finds them.
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama  # noqa: F401

import hiddenkey.hf.attach  # noqa: F401

from . import page
from .children import examine_apart
from .kinds import model_types
from .record import add, load

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build/models.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.models")
    parser.add_argument("kinds", nargs="*", help="model types to examine again; none: all without a row")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        STORE.unlink(missing_ok=True)
    records = load(STORE)
    end = time.monotonic() + options.seconds
    for kind in options.kinds or [kind for kind in model_types() if kind not in records]:
        if time.monotonic() > end:
            break
        record = records[kind] = examine_apart(kind)
        add(STORE, record)
        print(f"{kind}: {record.status} {'; '.join(record.problems) or record.error}"[:300], flush=True)
    if set(records) >= set(model_types()):
        page.write(ROOT / "docs/models.md", [records[kind] for kind in model_types()])


if __name__ == "__main__":
    main()
