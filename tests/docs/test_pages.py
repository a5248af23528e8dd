"""What is written about the code is true of the code: pages, equations, the papers' tables.

All pages of docs/scripts/annotate.py are rendered here, so one that does not render, a formula that
does not convert and a docstring that speaks of other arguments fail a test.
"""

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "scripts"))
import annotate
import make_dataflow
import make_equations

from ssis import config
from ssis.teacher import PseudoLabels

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    annotate.build(out)
    return out


class Reader(HTMLParser):
    """Links, addresses, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.text = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.links += [attrs["href"]] if "href" in attrs else []
        assert tag != "script"
        if tag not in ("meta", "br", "hr", "img", "mspace"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """One that closes itself: MathML's spaces."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_every_file_is_a_page_and_every_link_leads_somewhere(pages):
    found = {path.name: read(path) for path in pages.glob("*.html")}
    files = [path for path in ROOT.glob("ssis/**/*.py") if not path.name.startswith("__")]
    assert len(found) == len(files) + 2 + 1  # train, evaluate; an index
    for name, reader in found.items():
        for link in reader.links:
            target, _, place = link.partition("#")
            assert not place or place in found[target or name].ids, (name, link)
            assert target in found or not target, (name, link)


def test_the_index_has_the_files_by_room_the_method_first(pages):
    made = (pages / "index.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.+?)</h2>", made)
    rooms = {path.parent.name for path in ROOT.glob("ssis/*/*.py")}
    assert headings[0] == "The method, in reading order" and headings[-1] == "Equations"
    assert {f"ssis/{room}/" for room in rooms} == set(headings[2:-1])
    method = made.split("<h2>")[1]
    flat = {path.stem for path in ROOT.glob("ssis/*.py") if not path.name.startswith("__")}
    assert set(re.findall(r'href="ssis-(\w+)\.html"', method)) == flat


def test_no_line_of_code_and_no_word_is_lost(pages):
    for name, path in annotate.sources().items():
        source = path.read_text(encoding="utf-8")
        shown = {int(i[1:]) for i in read(pages / name).ids if re.fullmatch(r"L\d+", i)}
        words = {n for n in annotate.comments(source)}
        for node, _ in annotate.docstrings(annotate.ast.parse(source)).values():
            words |= set(range(node.lineno, node.end_lineno + 1))
        code = {n for n, line in enumerate(source.splitlines(), 1) if line.strip()} - words
        assert code <= shown and not shown & words, name
        text = " ".join("".join(read(pages / name).text).split())
        said = list(annotate.comments(source).values())
        for node, _ in annotate.docstrings(annotate.ast.parse(source)).values():
            # Less the formulas, which are letters and signs on the page.
            said.append(re.sub(r"\$.*?\$", "", node.value.value.replace("$$", "$"), flags=re.S))
        for remark in said:
            plain = [w for w in re.findall(r"[A-Za-z]{4,}", remark.strip("*"))]
            assert all(word in text for word in plain), (name, remark)


SMALL = '''r"""First.

$$x = {formula}$$ PL-DC Eq. (x)
"""


def f(a, b):
    """What it does.

    Args:
        a: one.
        {second}: other.
    """
    # PL-DC Eq. (x)
    return a + b
'''


@pytest.mark.parametrize(
    "formula, second, expected",
    [
        ("a < b", "b", None),
        (r"\nosuchthing{a}", "b", "does not convert"),
        (r"\frac{a", "b", "does not convert"),
        ("x_{a", "b", "does not convert"),
        ("a", "b: a lone $", "a formula without its end"),
        ("a", "c", r"f\(a, b\) is said to take"),
    ],
)
def test_mistakes_in_a_source_are_named(formula, second, expected, tmp_path, monkeypatch):
    path = tmp_path / "small.py"
    path.write_text(SMALL.replace("{formula}", formula).replace("{second}", second))
    monkeypatch.setattr(annotate, "sources", lambda: {"small.html": path})
    monkeypatch.setattr(annotate, "ROOT", tmp_path)
    if not expected:
        annotate.build(tmp_path / "out")
        made = (tmp_path / "out" / "small.html").read_text()
        assert "<mi>a</mi>" in made and 'href="small.html#eq-pl-dc-eq-x"' in made
        return
    with pytest.raises(annotate.Mistake, match=expected):
        annotate.build(tmp_path / "out")


def test_sections_follow_comments_and_functions():
    source = SMALL.replace("{formula}", "1").replace("{second}", "b")
    article, function, line = annotate.sections(source)
    assert article.docstring and not article.lines and function.name == "f"
    assert [source.splitlines()[n - 1].strip() for n in function.lines] == ["def f(a, b):"]
    assert line.words == "PL-DC Eq. (x)" and len(line.lines) == 1


def test_the_page_of_equations_is_generated_and_each_is_computed_somewhere():
    done = subprocess.run([sys.executable, "docs/scripts/make_equations.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_equations.py"
    found = make_equations.collect()
    assert len(found) > 18
    for name, entry in found.items():
        assert entry["uses"], f"{name} is computed nowhere"


def test_the_data_flow_figure_names_files_functions_and_equations_that_exist():
    done = subprocess.run([sys.executable, "docs/scripts/make_dataflow.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python docs/scripts/make_dataflow.py"
    known = make_equations.collect()
    for box in make_dataflow.BOXES:
        tree = annotate.ast.parse((ROOT / box.file).read_text(encoding="utf-8"))
        assert box.function in annotate.starts(tree).values(), box
        assert not box.equation or box.equation in known, box
        # The words fit into their box; 8.2 pixels are a wide letter of the titles' size.
        lines = (box.title, f"{Path(box.file).name}: {box.function}", box.equation)
        assert max(map(len, lines)) * 8.2 < make_dataflow.WIDTH, box
    places = [(box.column, box.row) for box in make_dataflow.BOXES] + [make_dataflow.LEGEND]
    assert len(set(places)) == len(places), "two boxes at one place"
    joined = {name for arrow in make_dataflow.ARROWS for name in arrow[:2]}
    assert joined == {box.name for box in make_dataflow.BOXES}


PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
# One text for each heading, on one line: a part of a paper, or a section and its method.
PARTS = [" ".join(part.split()) for part in re.split(r"^#+ ", PAPERS, flags=re.MULTILINE)]


def test_the_papers_page_names_files_functions_and_equations_that_exist():
    assert PAPERS.count("\n### ") > 40
    known, named = make_equations.collect(), set()
    for part in PARTS:
        for path, after in re.findall(r"\]\(\.\./([\w/]+\.py)\)((?:,? `[\w.]+`)*)", part):
            tree = annotate.ast.parse((ROOT / path).read_text(encoding="utf-8"))
            own = {name.rstrip(".") for name in annotate.starts(tree).values()}
            for function in re.findall(r"`([\w.]+)`", after):
                assert function in own, (path, function)
        for name in re.findall(make_equations.NAME, part):
            assert name in known, name
            named.add(name)
    # Each equation of the sources has its place.
    assert named == set(known), set(known) - named


def test_the_notation_names_what_there_is():
    """Settings and fields are real ones; each letter of an equation has its line."""
    page = (ROOT / "docs" / "notation.md").read_text(encoding="utf-8")
    fields = {f.name for c in (config.Config, PseudoLabels) for f in dataclasses.fields(c)}
    letters = page.split("## Names")[0]
    names = set(re.findall(r"`([a-z]\w+)`", letters))
    assert len(names) > 10 and names <= fields, names - fields
    for path in re.findall(r"`(ssis/\w+\.py)`", page):
        assert (ROOT / path).exists()
    first = " ".join(line.split("|")[1] for line in letters.splitlines() if line.startswith("| "))
    greek = dict(alpha="α", lambda_="λ", tau="τ", theta="θ")
    for name, entry in make_equations.collect().items():
        formula = re.sub(
            r"\\mathrm\{[^}]*\}|\\(frac|cos|left|right|pi|max|min)", " ", entry["formula"]
        )
        for word in set(re.findall(r"\\?[A-Za-z]+", formula)):
            if word.startswith("\\"):
                sign = greek.get(word[1:] + ("_" if word[1:] == "lambda" else ""))
                assert sign is None or sign in first, (name, word)
            elif len(word) == 1:
                assert re.search(rf"(?<![A-Za-z]){word}(?![A-Za-z])", first), (name, word)


def test_the_papers_pages_values_are_the_settings():
    method, seen = "guided-distillation", 0
    for part in PARTS:
        if found := re.search(r"`--method ([\w-]+)`", part):
            method = found[1]
        for flag, small, coco in re.findall(r"`--([\w-]+)` (\S+) / ([^\s;]+)", part):
            for preset, value in (("shapes", small), ("coco", coco)):
                # With the tiny SAM, for the checkpoint of the preset's own is not here.
                given = ["--preset", preset, "--method", method, "--sam", "tiny"]
                found = getattr(config.parse(given), flag.replace("-", "_"))
                if flag == "sam":
                    found = config.PRESETS[preset].get("sam", config.Config.sam)
                assert str(found) == value, (part, preset)
                seen += 1
    assert seen > 60
