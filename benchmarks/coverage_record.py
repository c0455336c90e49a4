"""Record the share of the package's lines and branches that the tests run: the last step of `make coverage`.

python benchmarks/coverage_record.py build/coverage/totals.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RECORDS, provenance, save


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read what coverage.py reports and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("totals", type=Path, help="the JSON report of coverage.py")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(argv)
    totals = json.loads(options.totals.read_text())["totals"]
    record = {
        "benchmark": "test-coverage",
        "lines": totals["num_statements"],
        "lines_run": totals["covered_lines"],
        "branches": totals["num_branches"],
        "branches_run": totals["covered_branches"],
        **provenance("cpu"),
    }
    save(record, "test-coverage", folder=options.out, indent=1)
    return record


if __name__ == "__main__":
    main()
