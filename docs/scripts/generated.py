"""What the programs that generate a page share: write it, or say whether it is up to date."""

import sys
from pathlib import Path


def write_or_check(page: Path, made: str) -> None:
    """Write a page; with `--check` end with status 1 when it is not what it would be."""
    if "--check" in sys.argv[1:]:
        sys.exit(not page.exists() or page.read_text(encoding="utf-8") != made)
    page.write_text(made, encoding="utf-8")
