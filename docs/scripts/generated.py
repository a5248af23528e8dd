"""What the programs that generate a page share: wrapping it, writing it, checking it."""

import re
import sys
import textwrap
from pathlib import Path

COLUMNS = 100
ITEM = re.compile(r"( *)([*-]|\d+\.) +")
# Lines that stand for themselves: headings, tables, formulas, comments, pictures.
ALONE = re.compile(r" *(#|\||\$\$|<!--|!\[)")


def reflow(text: str) -> str:
    """Markdown with its paragraphs and list items wrapped at 100 columns.

    Code, tables, headings and formulas stay as they are.
    """
    made, paragraph, code = [], [], False

    def flush() -> None:
        if paragraph:
            made.append(wrap(paragraph))
            paragraph.clear()

    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        # Four spaces after a blank line are code as well.
        verbatim = code or fence or (line.startswith("    ") and not paragraph)
        code ^= fence
        if verbatim or not line.strip() or ALONE.match(line):
            flush()
            made.append(line)
            continue
        if ITEM.match(line):
            flush()
        paragraph.append(line)
    flush()
    return "\n".join(made) + "\n"


def wrap(lines: list[str]) -> str:
    """One paragraph, or one item of a list with its lines indented."""
    item = ITEM.match(lines[0])
    first = item.group() if item else re.match(" *", lines[0]).group()
    words = " ".join([lines[0][len(first) :], *lines[1:]])
    # What would begin a list at the beginning of a line stays behind the word before it.
    words = re.sub(r" (?=([+*-]|#+|\d+[.)]) )", "\0", " ".join(words.split()))
    wrapped = textwrap.wrap(
        words,
        COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(wrapped).replace("\0", " ")


def write_or_check(page: Path, made: str) -> None:
    """Write a page; with `--check` end with status 1 when it is not what it would be."""
    if "--check" in sys.argv[1:]:
        sys.exit(not page.exists() or page.read_text(encoding="utf-8") != made)
    page.write_text(made, encoding="utf-8")
