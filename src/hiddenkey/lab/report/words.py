"""Numbers as words: one way of writing means, differences, intervals and p-values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .statistics import Difference, Seed, Summary

MINUS = "\N{MINUS SIGN}"
NOT_RUN = "not run"
NO_RESULT = "run, no result"
NOT_TIMED = "never timed on one day and one kind of machine"
NO_COMMON = "run, but no seed with a result on both sides"
NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
_PLAIN = re.compile(r"[A-Za-z0-9 .,:+-]*")


def number(value: float | None, digits: int = 2) -> str:
    """A number with a true minus sign."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}f}".replace("-", MINUS) if round(value, digits) else f"{0:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference with its sign."""
    text = number(value, digits)
    return text if value is None or text.startswith(MINUS) or not round(value, digits) else f"+{text}"


def mean_sd(found: Summary | None, digits: int = 2, nothing: str = NOT_RUN) -> str:
    """Mean ± sd; `nothing`: why there is none."""
    if found is None:
        return nothing
    return number(found.mean, digits) + ("" if found.sd is None else f" ± {number(found.sd, digits)}")


def difference(found: Difference | None, digits: int = 2, nothing: str = NOT_RUN) -> str:
    """Mean difference with Student's interval; `nothing`: why there is none."""
    if found is None:
        return nothing
    if found.low is None:
        return f"{signed(found.mean, digits)} (no interval)"
    return f"{signed(found.mean, digits)} [{signed(found.low, digits)}, {signed(found.high, digits)}]"


def paired(found: Difference | None, n: int, digits: int = 2, nothing: str = NOT_RUN) -> str:
    """The same beside a result of n seeds: with its own number of pairs where that is another."""
    return difference(found, digits, nothing) + (f" (n = {found.n})" if found and found.n != n else "")


def bootstrapped(found: Difference | None, digits: int = 2) -> str:
    """The bootstrap's interval alone."""
    if found is None or found.bootstrap_low is None:
        return NOTHING
    return f"[{signed(found.bootstrap_low, digits)}, {signed(found.bootstrap_high, digits)}]"


def p_value(value: float | None) -> str:
    """Two or three places."""
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def p_equals(value: float | None) -> str:
    """`p = 0.03`, `p < 0.001`."""
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def counted(values: Iterable[str]) -> str:
    """`0.1 ×3, 0.2 ×2`: the most frequent first, then by value."""
    counts = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{value} {TIMES}{count}" for value, count in counts) or NOTHING


def parameters(params: dict[str, Any]) -> str:
    """What was chosen: `0.1` for a lone rate, else names and values."""
    if list(params) == ["p"]:
        return _short(params["p"])
    return " ".join(f"{name} {_short(value)}" for name, value in params.items()) or "as given"


def listed(names: Iterable[str]) -> str:
    """`a, b and c`."""
    *front, last = list(names) or [NOTHING]
    return f"{', '.join(front)} and {last}" if front else last


def seeds(values: Iterable[Seed]) -> str:
    """`11, 12`; with the seed of the data where it is another one: `11/3`."""
    return ", ".join(f"{seed}" if data in (0, seed) else f"{seed}/{data}" for seed, data in sorted(values))


def seeds_of(lost: Mapping[str, Collection[Seed]]) -> str:
    """Seeds of methods: ``1, 2 (`hiddenkey`), 3 (`dropkey column`)``."""
    return ", ".join(f"{seeds(values)} (`{method}`)" for method, values in lost.items() if values)


def left_out(lost: Mapping[str, Collection[Seed]]) -> str:
    """A sentence with the seeds that differences do without, by method; nothing where there are none."""
    named = seeds_of(lost)
    return f"Seeds left out, as a task or a side has no result of them: {named}." if named else ""


def plural(count: int, noun: str) -> str:
    """`1 seed`, `5 seeds`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _short(value: Any) -> str:
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return f"`{value}`"  # what Markdown would take for emphasis, a link or a tag
    return f"{value:.3g}" if isinstance(value, float) else str(value)
