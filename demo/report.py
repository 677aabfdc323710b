"""The comparison of the demo: a table, a picture and a page."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from hiddenkey.lab.run_folder import RunResult

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Results = dict[str, RunResult]

# Colours of Okabe and Ito, told apart by all common kinds of colour vision; the line styles help in grey.
STYLES = (("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."))
PANELS = {
    "train_loss": "training loss (without drops)",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy",
}


def table(results: Results) -> str:
    """Losses and accuracy at the last and the best epoch, and the step time against the first run."""
    head = (
        "| recipe | train loss, last | val. loss, last | accuracy, last | lowest val. loss | best accuracy | step |"
    )
    first = next(iter(results.values())).step_seconds["median"]
    return "\n".join([head, "|---" * 7 + "|", *(_row(name, run, first) for name, run in results.items())])


def _row(name: str, run: RunResult, first: float) -> str:
    lowest = min(run.epochs, key=lambda row: row["validation_loss"])
    cells = [
        f"`{name}`",
        f"{run.last['train_loss']:.3f}",
        f"{run.last['validation_loss']:.3f}",
        f"{run.last['validation_accuracy']:.1%}",
        f"{lowest['validation_loss']:.3f} (epoch {lowest['epoch']:g})",
        f"{run.best['validation_accuracy']:.1%} (epoch {run.best['epoch']:g})",
        f"{run.step_seconds['median']:.3f} s, x {run.step_seconds['median'] / first:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def draw_curves(results: Results, path: Path) -> None:
    """Three panels against the epoch, every line named at its end."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        _draw_panel(axis, results, metric)
        axis.set_title(title, loc="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis: Axes, results: Results, metric: str) -> None:
    ends = []
    for (name, run), (colour, style) in zip(results.items(), STYLES, strict=True):
        epochs = [row["epoch"] for row in run.epochs]
        values = [row[metric] for row in run.epochs]
        axis.plot(epochs, values, style, color=colour, linewidth=2)
        ends.append((values[-1], name, colour))
    axis.set_xlabel("epoch")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    low, high = axis.get_ylim()
    for height, (value, name, colour) in _apart(ends, gap=0.06 * (high - low)):
        axis.annotate(
            name, (epochs[-1], value), (epochs[-1] * 1.03, height), color=colour, va="center", annotation_clip=False
        )


def _apart(ends: list[tuple[float, str, str]], gap: float) -> list[tuple[float, tuple[float, str, str]]]:
    placed: list[tuple[float, tuple[float, str, str]]] = []
    for end in sorted(ends):
        height = max(end[0], placed[-1][0] + gap) if placed else end[0]
        placed.append((height, end))
    return placed


def write_report(results: Results, path: Path) -> None:
    """What was run, what came out, and how far it may be trusted."""
    run = next(iter(results.values()))
    rows, rates = run.data_rows, {name: result.drop_rates for name, result in results.items()}
    share = run.best["validation_accuracy"]
    error = (share * (1 - share) / rows["validation"]) ** 0.5
    realised = [f"- `{name}`: " + _rates(found) for name, found in rates.items() if found]
    lines = [
        "# Demo: overfitting on a small training set, with and without structured dropout",
        "",
        f"LoRA (rank {run.config['lora_r']}, query and value) on all-MiniLM-L6-v2, {rows['train']} sentences of "
        f"SST-2 for training, {rows['validation']} for validation, {run.config['epochs']} epochs, "
        f"batch size {run.config['batch_size']}, "
        f"learning rate {run.config['learning_rate']}, seed {run.config['seed']}. "
        "The three runs differ in the recipe alone. The rate comes from an earlier prototype, the number of epochs "
        "from looking at the baseline alone; nothing was changed after the runs with drops had been seen.",
        "",
        table(results),
        "",
        "![curves](curves.png)",
        "",
        f"The standard error of an accuracy on {rows['validation']} sentences is about {error:.1%}, and this is one "
        "seed: smaller differences tell nothing. The best epoch was chosen on the same sentences it is reported on. "
        "Losses are in nats and measured without drops; step times are medians.",
        "",
        "Realised drop rates:",
        "",
        *realised,
        "",
        "## What was dropped where",
        "",
        *(f"```text\n{result.plan}\n```" for result in results.values()),
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in run.versions.items()) + ".",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rates(found: dict[str, float | None]) -> str:
    return ", ".join(f"{position} {rate:.4f}" for position, rate in found.items() if rate is not None)
