"""The documentation as a site: pages, pictures, and every file line by line.

    python docs/scripts/make_site.py --out site          then open site/index.html

README becomes the start page; docs/ and the annotated files (docs/scripts/annotate.py) stand beside
it, all with navigation, search, light and dark, by Zensical (docs/zensical.toml). Formulas become
MathML, so nothing is loaded from elsewhere. A link to a source leads to its annotated page, and one
to what is not on the site loses its address and keeps its words.

Needs `pip install -r docs/requirements.txt`.
"""

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import annotate

ROOT = Path(__file__).resolve().parents[2]
# Pages that do not lie in docs/, and their names on the site.
ABOVE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^][]*)\]\((?P<target>[^()\s]+)\)")
# Where the annotated files are, and the page that leads to them.
LINES, LEAD = "lines", "lines.md"


def places() -> dict[str, str]:
    """Each page, picture and annotated file of the repository -> its place on the site."""
    found = dict(ABOVE)
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".png", ".svg", ".jpg", ".ipynb"):
            name = path.relative_to(ROOT / "docs").as_posix()
            found[f"docs/{name}"] = name
    for page, path in annotate.sources().items():
        found[path.relative_to(ROOT).as_posix()] = f"{LINES}/{Path(page).stem}.md"
    return found


def relinked(text: str, source: str, known: dict[str, str]) -> str:
    """A page's text with the links of the site.

    Args:
        text: Markdown.
        source: the page in the repository, "docs/papers.md".
        known: of `places`.

    Raises:
        annotate.Mistake: a picture that is not on the site.
    """
    here = posixpath.dirname(known[source])

    def link(match: re.Match) -> str:
        target, _, place = match["target"].partition("#")
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path not in known:
            if match["picture"]:
                raise annotate.Mistake(f"{source}: the picture {target} is not on the site")
            return match["words"]
        where = posixpath.relpath(known[path], here or ".")
        # Line numbers are no places on the annotated pages.
        where += f"#{place}" if place and not path.endswith(".py") else ""
        return f"{match['picture']}[{match['words']}]({where})"

    return LINK.sub(link, text)


def with_formulas(text: str, source: str) -> str:
    """Markdown with its displayed formulas as MathML, outside of code."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    for k in range(0, len(parts), 2):
        parts[k] = re.sub(
            r"\$\$(.+?)\$\$",
            lambda match: scrolled(annotate.mathml(match[1], source, display=True)),
            parts[k],
            flags=re.DOTALL,
        )
    return "".join(parts)


def scrolled(formula: str) -> str:
    """A formula that is wider than a phone scrolls by itself."""
    return f'<div style="overflow-x: auto; overflow-y: hidden">{formula}</div>'


def annotated(folder: Path) -> None:
    """Every file line by line, as pages of the site: with its navigation, search and colors."""
    for made in annotate.build(folder):
        body = made.read_text(encoding="utf-8").split("<body>", 1)[1].split("</body>", 1)[0]
        heading = re.search(r"<h1>(.+?)</h1>", body)[1]
        front = f"---\ntitle: {heading}\nhide: [toc]\n---\n"
        text = f'{front}<div class="annotated">\n{body}\n</div>\n'
        made.with_suffix(".md").write_text(text, encoding="utf-8")
        made.unlink()


def style() -> str:
    """annotate.css for a part of a page: the site's own colors, sizes and switch to dark."""
    text = annotate.STYLE.read_text(encoding="utf-8")
    colors = "--text: var(--md-default-fg-color); --soft: var(--md-default-fg-color--light); "
    colors += "--panel: var(--md-code-bg-color); --line: var(--md-default-fg-color--lightest); "
    colors += "--link: var(--md-typeset-a-color);"
    text = re.sub(r":root \{.*?\}|^body \{.*?\}", "", text, flags=re.DOTALL | re.MULTILINE)
    text = text.replace("@media (prefers-color-scheme: dark)", '[data-md-color-scheme="slate"] &')
    # The site's rem has 20 pixels, a browser's own 16.
    text = re.sub(r"([\d.]+)rem", lambda size: f"{0.8 * float(size[1]):g}rem", text)
    # Words and code side by side need more room than words.
    wide = "body:has(.annotated) .md-grid { max-width: 84rem; }"
    return f"{wide}\n.annotated {{ {colors}\n{text}}}\n"


def build(out: Path) -> None:
    """Render the site.

    Raises:
        annotate.Mistake: a source or a formula cannot be rendered.
        subprocess.CalledProcessError: Zensical has found something wrong.
    """
    known = places()
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        for source, name in known.items():
            target = pages / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.endswith(".md"):
                text = (ROOT / source).read_text(encoding="utf-8")
                text = with_formulas(relinked(text, source, known), source)
                target.write_text(text, encoding="utf-8")
            elif not source.endswith(".py"):
                shutil.copyfile(ROOT / source, target)
        annotated(pages / LINES)
        (pages / "annotated.css").write_text(style(), encoding="utf-8")
        (pages / LEAD).write_text(
            "# Line by line\n\nEvery file with its words on the left and its code on the right: "
            f"[begin with train.py]({LINES}/train.md), or see [all of them]({LINES}/index.md)."
            "\n",
            encoding="utf-8",
        )
        shutil.copyfile(ROOT / "docs" / "zensical.toml", Path(folder) / "zensical.toml")
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
        subprocess.run(command, cwd=folder, check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(folder) / "site", out)


def broken(site: Path) -> list[str]:
    """Links of the site's pages to files, or places within a page, that are not there."""
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(site.rglob("*.html"))}
    places = {page.resolve(): set(re.findall(r'\bid="([^"]+)', t)) for page, t in texts.items()}
    wrong = []
    for page, text in texts.items():
        for target, place in re.findall(
            r'(?:href|src)="([^"#?]*)(?:\?[^"#]*)?(?:#([^"]*))?"', text
        ):
            # What begins with a slash is of the page for addresses that are not there.
            if re.match(r"[a-z]+:|/", target):
                continue
            there = (page.parent / target if target else page).resolve()
            if not there.exists() or (place and place not in places.get(there, {place})):
                wrong.append(f"{page.relative_to(site)}: {target}{'#' * bool(place)}{place}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the site")
    given = parser.parse_args()
    if given.out.exists() and not (given.out / "search.json").exists() and any(given.out.iterdir()):
        sys.exit(f"error: {given.out}: is there and no site; give another")
    try:
        build(given.out)
    except (annotate.Mistake, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    if wrong := broken(given.out):
        sys.exit("\n".join(["error: links that lead nowhere:", *wrong]))
    print(f"open {given.out / 'index.html'}")


if __name__ == "__main__":
    main()
