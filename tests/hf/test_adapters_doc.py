"""docs/adapters.md lists the tuners and bases that are tested, no more and no fewer."""

from pathlib import Path

import pytest

from .adapters import FULL, TUNERS
from .bases import BASES

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first column has this head."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_tuners():
    assert [row[0] for row in table("tuner")] == [FULL, *TUNERS]


@pytest.mark.parametrize("row", table("tuner")[1:], ids=lambda row: row[0])
def test_what_is_said_of_a_tuner(row):
    tuner, merges, dropouts, remarks = row
    case = TUNERS[tuner]
    assert (merges == "yes") is case.mergeable
    assert dropouts == ", ".join(f"`{name}`" for name in case.dropout)
    assert ("draws by itself" in remarks) is case.draws
    assert ("decoder only" in remarks) is (case.families == ("llama",))
    assert ("encoder only" in remarks) is (case.families == ("bert",))


def test_the_bases():
    assert [row[0] for row in table("base")] == list(BASES)
