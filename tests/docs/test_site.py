"""The documentation as a site: everything is on it, and every link leads somewhere."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "docs" / "scripts"


@pytest.fixture
def make_site(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_site

    return make_site


def test_the_whole_site(tmp_path, make_site):
    """By its command; Zensical and the program itself look for links that lead nowhere."""
    site = tmp_path / "site"
    command = [sys.executable, str(SCRIPTS / "make_site.py"), "--out", str(site)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    start = (site / "index.html").read_text()
    # The command to copy, the scoreboard, every picture, and a formula as MathML elsewhere.
    pictures = re.findall(r"!\[[^]]*\]\(docs/([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(pictures) >= 3 and all(f'src="{picture}"' in start for picture in pictures)
    assert "torchrun train.py" in start and "labels alone" in start and "img/dataflow.svg" in start
    assert "<math" in (site / "equations.html").read_text()
    assert 'href="lines/ssis-filters.html"' in (site / "equations.html").read_text()
    # The annotated files are pages of the site, and are found by its search.
    lines = (site / "lines" / "ssis-filters.html").read_text()
    assert 'href="../results.html"' in lines and "annotated.css" in lines and "<math" in lines
    assert "lines/ssis-filters.html" in (site / "search.json").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.name).with_suffix(".html").exists(), page.name
    # Every page of docs/ is in the navigation.
    assert all(f'href="{page.stem}.html"' in start for page in (ROOT / "docs").glob("*.md"))
    # A second call replaces it; what is no site is left alone.
    (site / "search.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "is there and no site; give another" in done.stderr


@pytest.mark.fast
def test_links_by_hand(make_site):
    known = {
        "docs/papers.md": "papers.md",
        "README.md": "index.md",
        "ssis/filters.py": "lines/ssis-filters.html",
        "docs/assignments/02_filters.md": "assignments/02_filters.md",
    }
    text = "[a](../ssis/filters.py#L3) [b](results/raw.json) [c](https://x.y) [d](#here)"
    assert make_site.relinked(text, "docs/papers.md", known) == (
        "[a](lines/ssis-filters.html) b [c](https://x.y) [d](#here)"
    )
    text = "[a](../papers.md#part) [b](../../README.md)"
    assert make_site.relinked(text, "docs/assignments/02_filters.md", known) == (
        "[a](../papers.md#part) [b](../index.md)"
    )
    # A file loses its link, a picture would lose everything.
    with pytest.raises(make_site.annotate.Mistake, match=r"picture img/x\.jpg is not on"):
        make_site.relinked("![A tiger](img/x.jpg)", "docs/papers.md", known)


@pytest.mark.fast
def test_a_broken_link_is_found(tmp_path, make_site):
    (tmp_path / "a.html").write_text('<a href="b.html#x"> <img src="c.png"> <a href="https://d">')
    (tmp_path / "b.html").write_text('<a id="x" href="a.html"> <a href="#x"> <a href="#y">')
    (tmp_path / "c.html").write_text('<a href="b.html#z"> <a href="b.html?q#x">')
    found = ["a.html: c.png", "b.html: #y", "c.html: b.html#z"]
    assert make_site.broken(tmp_path) == found


@pytest.mark.fast
def test_formulas_in_code_stay(make_site):
    text = "$$a_1$$\n\n```\n$$b$$\n```\n"
    made = make_site.with_formulas(text, "a page")
    assert "<math" in made and "$$b$$" in made and "$$a_1$$" not in made
