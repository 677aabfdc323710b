"""What the doctor found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "wrong", "skipped", "note"]
MARKS: dict[Verdict, str] = {"ok": "ok ", "wrong": "RED", "skipped": "-- ", "note": ".. "}


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, where, how it went and why.

    verdict: `ok`; `wrong`, which is red; `skipped`, with the reason; `note`: for information. values: the numbers.
    """

    check: str
    verdict: Verdict
    reason: str
    where: str = ""
    values: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{MARKS[self.verdict]}  {self.check:<14}  {where}{self.reason}"


@dataclass(frozen=True)
class Diagnosis:
    """The findings of `doctor`. `print(diagnosis)` shows them, a line each; `.ok`: none is red."""

    recipe: str
    model: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no line is red."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The red lines."""
        return tuple(finding for finding in self.findings if finding.verdict == "wrong")

    @property
    def summary(self) -> str:
        """The last line."""
        done = sum(finding.verdict in ("ok", "wrong") for finding in self.findings)
        if self.ok:
            return f"{done} checks, none red: '{self.recipe}' is on"
        return f"{len(self.wrong)} of {done} checks are red"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: None where a number is not finite."""
        findings = [{**asdict(finding), "values": _finite(finding.values)} for finding in self.findings]
        return {"recipe": self.recipe, "model": self.model, "ok": self.ok, "findings": findings}

    def __str__(self) -> str:
        head = [f"recipe  {self.recipe}", f"model   {self.model}", ""]
        return "\n".join([*head, *map(str, self.findings), "", self.summary])


def _finite(values: Mapping[str, float | str]) -> dict[str, float | str | None]:
    return {name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in values.items()}
