"""The reading chain: from train.py through every concept file once, and back.

Each module docstring of the method ends with its number and the file to read next. A file without
the line, one that is named twice and one that nothing leads to fail.
"""

import ast
import re

import pytest
from conftest import ROOT

pytestmark = pytest.mark.fast
LINE = re.compile(r"Chain: (\d+) of (\d+)\. Read next: (?:back to )?`([\w/]+\.py)`[\s\S]*\Z")


def test_the_chain_leads_through_every_concept_file_once():
    names = [p.name for p in ROOT.glob("ssis/*.py") if not p.name.startswith("__")]
    files = {"train.py", *(f"ssis/{name}" for name in names)}
    path, seen = "train.py", []
    while path not in seen:
        docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        # Only the last paragraph, so nothing stands behind it.
        line = LINE.fullmatch(docstring.split("\n\n")[-1])
        assert line, f"{path}: does not end with its place in the chain"
        seen.append(path)
        assert (int(line[1]), int(line[2])) == (len(seen), len(files)), path
        path = line[3]
    assert path == "train.py" and set(seen) == files
