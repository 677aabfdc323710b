"""`make demo`: plain LoRA, hiddenkey- and hiddenkey on the same 300 sentences of SST-2, compared.

The rate comes from an earlier prototype, the number of epochs from looking at the baseline alone; nothing was changed
after the runs with drops had been seen. An interrupted demo continues when it is started again.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies on the disk; nothing is to be looked for on a hub

from download import HERE, MODEL, bring_assets
from report import draw_curves, table, write_report
from rich.console import Console

from hiddenkey.lab.config import TrainConfig
from hiddenkey.lab.console import quieten
from hiddenkey.lab.train import train

OUT = HERE / "out"
RATE = 0.15
RECIPES = ("baseline", f"hiddenkey-@{RATE}", f"hiddenkey@{RATE}")
TRAIN_SIZE, VALIDATION_SIZE, SEED = 300, 1000, 0
EPOCHS = 15


def main() -> None:
    """Bring the assets, train three times, print and write the comparison."""
    quieten()
    console = Console()
    console.print("[bold]1/3[/] model and texts")
    texts = bring_assets(TRAIN_SIZE, VALIDATION_SIZE, SEED)
    started = time.perf_counter()
    results = {}
    for number, recipe in enumerate(RECIPES, 1):
        console.print(f"[bold]2/3[/] run {number} of {len(RECIPES)}: [bold]{recipe}[/]")
        config = TrainConfig(
            model=str(MODEL),
            data=str(texts),
            out=str(OUT / "runs" / recipe),
            recipe=recipe,
            epochs=EPOCHS,
            batch_size=16,
            max_length=64,
            seed=SEED,
        )
        results[recipe] = train(config, console)
    console.print(f"[bold]3/3[/] comparison (trained in {time.perf_counter() - started:.0f} s)\n")
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)
    draw_curves(results, OUT / "curves.png")
    write_report(results, OUT / "report.md")
    console.print(f"\npicture: {OUT / 'curves.png'}\nreport:  {OUT / 'report.md'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
