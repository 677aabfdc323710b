"""Every model type of the installed transformers: docs/models.md says what is found, and no check fails."""

from pathlib import Path

import pytest
import torch
import transformers

from . import page
from .children import examine_apart
from .kinds import model_types
from .record import BROKEN, NOT_BUILT

PAGE = Path(__file__).parents[2] / "docs/models.md"


def written() -> list[str]:
    """The lines of the page; none where it is of other versions."""
    text = PAGE.read_text()
    return text.splitlines() if page.versions() in text else []


def test_the_page_has_a_row_for_every_model_type():
    if not written():
        pytest.skip("the page is of other versions")
    rows = [line.split("`")[1] for line in written() if line.startswith("| `")]
    assert sorted(rows) == model_types()


@pytest.mark.full
@pytest.mark.parametrize("kind", model_types())
def test_the_page_says_what_is_found(kind):
    torch.set_num_threads(1)
    record = examine_apart(kind)
    assert record.status != BROKEN, record.problems
    lines = written()
    if not lines:
        pytest.skip(f"the page is of other versions than transformers {transformers.__version__}")
    if record.status == NOT_BUILT:  # The reasons of other libraries may differ in numbers.
        assert any(line.startswith(f"| `{kind}` | {record.model} |") for line in lines[lines.index("## Not built") :])
    else:
        assert page.row(record) in lines
