"""What the fast paths are to reach, and how it is read off the results of a bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from .config import BenchConfig
from .record import Case, Record

Records = Mapping[str, Record]
Measure = Callable[[Records], float | None]

MINILM, SMOLLM2, LLAMA = "step-minilm", "step-smollm2", "step-llama-152k"
CHUNKED = "plain, loss in chunks"
MIB = 2**20
OF_THE_INPUT = ("quick", "dtype", "batch_size", "length", "padding", "labelled")


@dataclass(frozen=True)
class Target:
    """What is measured, the number it may not exceed, and where it is found (None: not measured)."""

    what: str
    limit: float
    measure: Measure
    unit: str = ""

    def verdict(self, records: Records) -> str:
        """`met`, `not met` or `not measured`."""
        value = self.measure(records)
        return "not measured" if value is None else "met" if value <= self.limit else "**not met**"


def as_planned(record: Record) -> bool:
    """Whether a record is of a CPU, and of the shapes and the type that a bench takes by itself."""
    plain = asdict(BenchConfig())
    return record.machine["device"] == "cpu" and all(
        record.config.get(name, plain[name]) == plain[name] for name in OF_THE_INPUT
    )


def find_case(records: Records, record: str, case: str = "") -> Case | None:
    """A case of a record by name, or its only one; None where it was not measured as the targets ask."""
    found = records.get(record)
    if found is None or not as_planned(found):
        return None
    return found.case(case) if case else found.cases[0]


def ratio(record: str, row: str, case: str = "") -> Measure:
    """Median time over the reference's."""

    def measure(records: Records) -> float | None:
        found = find_case(records, record, case)
        return None if found is None else found.ratio(row)

    return measure


def memory(record: str, row: str, reference: str) -> Measure:
    """Peak memory over that of another row."""

    def measure(records: Records) -> float | None:
        found = find_case(records, record)
        return None if found is None else found.memory_ratio(row, reference)

    return measure


def over_sum(record: str, row: str, *parts: str) -> Measure:
    """Median time over the sum of the medians of other rows."""

    def measure(records: Records) -> float | None:
        found = find_case(records, record)
        rows = [None if found is None else found.row(name) for name in (row, *parts)]
        times = [entry.quantile(0.5) for entry in rows if entry is not None]
        return times[0] / sum(times[1:]) if len(times) == len(rows) else None

    return measure


def seconds(record: str, row: str) -> Measure:
    """Median time in seconds; infinite where torch or transformers was loaded."""

    def measure(records: Records) -> float | None:
        found = find_case(records, record)
        entry = None if found is None else found.row(row)
        if entry is None:
            return None
        heavy = {"torch", "transformers"} & set(records[record].facts["loaded"][row])
        return float("inf") if heavy else entry.quantile(0.5)

    return measure


def extra_memory(records: Records, length: int, row: str = "column") -> int | None:
    """Bytes that causal attention with a drop holds beyond plain attention."""
    found = find_case(records, "attention", f"causal 1 x 16 x {length} x 64")
    dropped, plain = (None, None) if found is None else (found.row(row), found.row(found.reference))
    if dropped is None or plain is None or dropped.peak_bytes is None or plain.peak_bytes is None:
        return None
    return dropped.peak_bytes - plain.peak_bytes


def growth(records: Records) -> float | None:
    """Extra memory at 8192 over that at 4096: 2 where it is proportional to length, 4 where to its square."""
    short, long = extra_memory(records, 4096), extra_memory(records, 8192)
    return None if not short or long is None else long / short


TARGETS = (
    Target("`hiddenkey-@0.1` step, MiniLM 32 x 128 padded", 1.03, ratio(MINILM, "hiddenkey-@0.1")),
    Target("`hiddenkey-@0.1` step, SmolLM2 4 x 256, last half", 1.01, ratio(SMOLLM2, "hiddenkey-@0.1")),
    Target("`hiddenkey-[:]@0.1` step, SmolLM2 4 x 256, all layers", 1.02, ratio(SMOLLM2, "hiddenkey-[:]@0.1")),
    Target(
        "causal attention alone, column, 1 x 16 x 2048 x 64",
        1.06,
        ratio("attention", "column", "causal 1 x 16 x 2048 x 64"),
    ),
    Target("the same: extra memory at 8192 over that at 4096 (2 where proportional, 4 for Q x K)", 2.5, growth),
    Target(
        "element draw and multiply, 1.6 M entries, against `F.dropout`",
        0.30,
        ratio("draw", "hidden:element", "forward"),
    ),
    Target(
        "element `logits` attention 8 x 12 x 512 x 64", 1.35, ratio("attention", "element", "full 8 x 12 x 512 x 64")
    ),
    Target(
        "`hiddenkey@0.1` (kl) step, SmolLM2 4 x 256, last half, all labelled", 1.35, ratio(SMOLLM2, "hiddenkey@0.1")
    ),
    Target(
        "`hiddenkey@0.1` (kl) step, MiniLM, all layers, over plain step + one forward",
        1.03,
        over_sum(MINILM, "hiddenkey@0.1", "plain", "forward alone"),
    ),
    Target("`hiddenkey-@0.1 ~ kl-rdrop` step, SmolLM2", 1.95, ratio(SMOLLM2, "hiddenkey-@0.1 ~ kl-rdrop")),
    Target("`hiddenkey-@0.1 ~ kl-rdrop` step, MiniLM", 1.95, ratio(MINILM, "hiddenkey-@0.1 ~ kl-rdrop")),
    Target(
        "peak memory, `hiddenkey@0.1` step, SmolLM2, over plain in chunks",
        1.10,
        memory(SMOLLM2, "hiddenkey@0.1", CHUNKED),
    ),
    Target(
        "peak memory, `hiddenkey@0.1` step, LLaMA with 152k words, over plain in chunks",
        1.10,
        memory(LLAMA, "hiddenkey@0.1", CHUNKED),
    ),
    Target("`hidden[:]:column@0.2` step, SmolLM2, all layers", 0.95, ratio(SMOLLM2, "hidden[:]:column@0.2")),
    Target("`import hiddenkey`, without torch and transformers", 0.5, seconds("startup", "import hiddenkey"), " s"),
    Target("`hiddenkey --help`, without torch and transformers", 0.5, seconds("startup", "hiddenkey --help"), " s"),
)
