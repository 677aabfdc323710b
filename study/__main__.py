"""`python -m study [RECORDS] [OUT]`: write the study's report from its records."""

import sys
from pathlib import Path

from .records import Study
from .report import write_report

HERE = Path(__file__).parent
RECORDS, RESULTS = HERE / "records" / "2026-11", HERE / "results"

if __name__ == "__main__":
    records, out = (*map(Path, sys.argv[1:]), *(RECORDS, RESULTS)[len(sys.argv) - 1 :])[:2]
    write_report(Study.read(records), out)
    print(out / "report.md")
