"""Every file as a page to be read: the words on the left, the code on the right.

    python docs/scripts/annotate.py --out pages          then open pages/index.html

The source alone is rendered: docstrings and full-line comments become the left column, with
their equations as MathML, what follows them the right one. The pages are static, without
JavaScript, work from the disk, and have one column on a phone. Nothing of this is committed;
a test renders all of it, and fails where a file does not render, a formula does not convert,
or a docstring speaks of arguments that its function does not have.

Needs `pip install -r docs/requirements.txt`.
"""

import argparse
import ast
import html
import inspect
import io
import re
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[2]
STYLE = Path(__file__).with_name("annotate.css")
# A name such as "PL-DC Eq. (DICC)"; it is the equation's address on every page.
LABEL = re.compile(r"(GD|PL-DC|S4M|ssis)\s+Eq\. \(([^)]+)\)")
DISPLAY = re.compile(r"\$\$(.+?)\$\$(?:\s+((?:GD|PL-DC|S4M|ssis)\s+Eq\. \([^)]+\)))?", re.DOTALL)
INLINE = re.compile(r"(?<![\\$])\$([^$]+?)\$")
# The sections of a Google-style docstring that list names.
LISTS = ("Args", "Attributes", "Raises")
SECTIONS = (*LISTS, "Returns", "Yields")
# How many parts an element of MathML has.
CHILDREN = dict(mfrac=2, msub=2, msup=2, msubsup=3, mover=2, munder=2, munderover=3, mroot=2)
MARKDOWN = MarkdownIt("commonmark", {"html": False})


class Mistake(Exception):
    """Something in a source that cannot be rendered; says where."""


@dataclass
class Section:
    """Some words, and the lines of code that they are about."""

    words: str = ""
    lines: list[int] = field(default_factory=list)
    # The function or class that begins here, as "name" or "Class.name".
    name: str = ""
    docstring: bool = False


# ------------------------------------------------------------------ source into sections


def docstrings(tree: ast.Module) -> dict[int, tuple[ast.AST, str]]:
    """First line of each docstring -> its node, and the name of what it describes."""
    found = {}

    def visit(node, name):
        body = getattr(node, "body", [])
        if not isinstance(body, list):
            return
        if ast.get_docstring(node, clean=False) is not None:
            found[body[0].lineno] = (body[0], name)
        for child in body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                visit(child, f"{name}.{child.name}".lstrip("."))

    visit(tree, "")
    return found


def starts(tree: ast.Module) -> dict[int, str]:
    """First line (of the decorators) of each function and class -> its name."""
    found = {}

    def visit(node, name):
        for child in getattr(node, "body", []):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                own = f"{name}.{child.name}".lstrip(".")
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                found[first] = own
                visit(child, own)

    visit(tree, "")
    return found


def comments(source: str) -> dict[int, str]:
    """Line -> text of each comment that has the line to itself."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            text = token.string[1:]
            # A ruler between parts of a file is a heading: "# ---- one step".
            ruler = re.fullmatch(r"\s*-{3,}\s*(.*)", text)
            # What is meant for a program is not words: "# fmt: off".
            if not re.match(r"\s*(fmt|ruff|noqa|type):", text):
                found[token.start[0]] = f"**{ruler[1]}**" if ruler else text.removeprefix(" ")
    return found


def sections(source: str) -> list[Section]:
    """A file in the order in which it is read.

    A section begins with each block of comments, and with each function or class, whose
    docstring is its words; a comment right above a function is a section of its own.
    """
    tree, lines = ast.parse(source), source.splitlines()
    documented, begin, remarks = docstrings(tree), starts(tree), comments(source)
    result, number = [Section()], 1
    while number <= len(lines):
        if number in documented:
            node, _ = documented[number]
            words = inspect.cleandoc(node.value.value)
            # The article at the top of a file, or of a function that has just begun.
            result[-1].words = f"{result[-1].words}\n\n{words}".strip()
            result[-1].docstring = True
            number = node.end_lineno + 1
            continue
        if number in begin:
            result.append(Section(name=begin[number]))
        elif number in remarks:
            block = []
            while number in remarks:
                block.append(remarks[number])
                number += 1
            result.append(Section(words="\n".join(block)))
            continue
        result[-1].lines.append(number)
        number += 1
    for part in result:
        # Empty lines at either end are the spacing of the file, not of the page.
        while part.lines and not lines[part.lines[-1] - 1].strip():
            part.lines.pop()
        while part.lines and not lines[part.lines[0] - 1].strip():
            part.lines.pop(0)
    return [part for part in result if part.words or part.lines]


# ------------------------------------------------------------------------ words into HTML


def linked(match: re.Match) -> str:
    """A file's name as a link to its page."""
    return f'<a href="{match[1].replace("/", "-").replace(".py", ".html")}">{match.group()}</a>'


def slug(label: str) -> str:
    """The address of an equation."""
    return "eq-" + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def mathml(formula: str, where: str, display: bool = False) -> str:
    """A LaTeX formula as MathML.

    Raises:
        Mistake: it is no LaTeX that can be converted.
    """
    try:
        made = convert(" ".join(formula.split()), display="block" if display else "inline")
    # Every exception: the converter has no common one.
    except Exception as error:
        raise Mistake(f"{where}: {formula!r} does not convert ({error!r})") from error
    # What it does not know it passes on as it is, and half a fraction as well.
    parts = ElementTree.fromstring(made).iter()
    balanced = re.sub(r"\\[{}]", "", formula)
    braces = balanced.count("{") == balanced.count("}")
    whole = braces and all(
        len(part) == CHILDREN.get(part.tag.partition("}")[2], len(part)) for part in parts
    )
    if "\\" in made or not whole:
        raise Mistake(f"{where}: {formula!r} does not convert, see {made!r}")
    return made


class Words:
    """Renders the words of one file.

    Args:
        where: the file, for messages.
        homes: equation -> the page that defines it.
    """

    def __init__(self, where: str, homes: dict[str, str]):
        self.where, self.homes, self.kept = where, homes, []

    def keep(self, made: str) -> str:
        """Put finished HTML aside, so that Markdown leaves it alone."""
        self.kept.append(made)
        return f"\ue000{len(self.kept) - 1}\ue001"

    def display(self, match: re.Match) -> str:
        formula, label = match.groups()
        made, tag = mathml(formula, self.where, display=True), ""
        if label:
            label = " ".join(label.split())
            tag = f'<span class="label" id="{slug(label)}">{html.escape(label)}</span>'
        return "\n\n" + self.keep(f'<div class="equation">{made}{tag}</div>') + "\n\n"

    def reference(self, match: re.Match) -> str:
        label = " ".join(match.group().split())
        if label not in self.homes:
            raise Mistake(f"{self.where}: {label} is defined nowhere")
        page = self.homes[label]
        return self.keep(f'<a href="{page}#{slug(label)}">{html.escape(label)}</a>')

    def render(self, text: str) -> str:
        """Prose with equations, references to equations, and Markdown."""
        text = DISPLAY.sub(self.display, text)
        text = INLINE.sub(lambda m: self.keep(mathml(m[1], self.where)), text)
        text = LABEL.sub(self.reference, text)
        made = MARKDOWN.render(text)
        if lost := re.search(r"\$[^$]{0,40}", re.sub(r"<code>.*?</code>", "", made, flags=re.S)):
            raise Mistake(f"{self.where}: a formula without its end: {lost.group()!r}")
        made = re.sub(r"<p>(\ue000\d+\ue001)</p>", r"\1", made)
        made = re.sub(r"<code>(ssis/(?:\w+/)?\w+\.py|train\.py|evaluate\.py)</code>", linked, made)
        # Twice: what was kept may stand in what was kept.
        for _ in range(2):
            made = re.sub("\ue000(\\d+)\ue001", lambda m: self.kept[int(m[1])], made)
        return made

    def docstring(self, text: str) -> str:
        """A Google-style docstring: prose, then lists of names with their meaning."""
        parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
        made = self.render(parts[0])
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            # What is not indented comes after the section.
            after = re.search(r"^\S", body, re.MULTILINE)
            inside, rest = (body[: after.start()], body[after.start() :]) if after else (body, "")
            made += f"<h4>{title}</h4>"
            if title in LISTS:
                rows = "".join(
                    f"<dt>{html.escape(names)}</dt><dd>{self.render(meaning)}</dd>"
                    for names, meaning in listed(inside)
                )
                made += f"<dl>{rows}</dl>"
            else:
                made += self.render(inspect.cleandoc(inside))
            made += self.render(rest)
        return made


def listed(body: str) -> list[tuple[str, str]]:
    """The entries of a docstring's list: [("a, b", "what they mean"), ...]."""
    entries = re.split(r"^    (?=\S)", "\n" + body, flags=re.MULTILINE)[1:]
    pairs = [entry.partition(":") for entry in entries]
    return [(names.strip(), inspect.cleandoc(" " + meaning)) for names, _, meaning in pairs]


# ---------------------------------------------------------------- what a docstring promises


def disagreements(source: str, where: str) -> list[str]:
    """Docstrings that speak of other arguments than their functions have."""
    found = []

    def check(node, name, text, own, title="Args"):
        parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text or "", flags=re.MULTILINE)
        lists = dict(zip(parts[1::2], parts[2::2], strict=True))
        if title not in lists:
            return
        named = [n.strip() for names, _ in listed(lists[title]) for n in names.split(",")]
        if named != own:
            found.append(f"{where}:{node.lineno}: {name}({', '.join(own)}) is said to take {named}")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            makers = [c for c in node.body if getattr(c, "name", "") == "__init__"]
            fields = [c.target.id for c in node.body if isinstance(c, ast.AnnAssign)]
            own = arguments(makers[0]) if makers else fields
            check(node, node.name, ast.get_docstring(node), own)
            # Of a dataclass or a named tuple: what it has is what it is made of.
            if fields and not makers:
                check(node, node.name, ast.get_docstring(node), fields, "Attributes")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            check(node, node.name, ast.get_docstring(node), arguments(node))
    return found


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's arguments, without `self`."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [arg.arg for arg in every]
    names += [extra.arg for extra in (node.args.vararg, node.args.kwarg) if extra]
    return [name for name in names if name not in ("self", "cls")]


# ----------------------------------------------------------------------------- the pages


def sources() -> dict[str, Path]:
    """Page -> file, in the order of docs/files.md."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)
    return {name.replace("/", "-").replace(".py", ".html"): ROOT / name for name in files}


def definitions(pages: dict[str, Path]) -> dict[str, str]:
    """Equation -> the page where it is defined.

    Raises:
        Mistake: one is defined twice.
    """
    homes: dict[str, str] = {}
    for page, path in pages.items():
        for _, label in DISPLAY.findall(path.read_text(encoding="utf-8")):
            label = " ".join(label.split())
            if label in homes:
                raise Mistake(f"{path.name}: {label} is defined in {homes[label]} already")
            if label:
                homes[label] = page
    return homes


def page(name: str, path: Path, pages: dict[str, Path], homes: dict[str, str]) -> str:
    """The page of one file."""
    source = path.read_text(encoding="utf-8")
    where = path.relative_to(ROOT).as_posix()
    formatter = HtmlFormatter(nowrap=True)
    colored = highlight(source, PythonLexer(stripnl=False), formatter).splitlines()
    words, rows = Words(where, homes), []
    for number, part in enumerate(sections(source)):
        text = words.docstring(part.words) if part.docstring else words.render(part.words)
        code = "".join(
            f'<span class="line" id="L{k}"><a class="no" href="#L{k}">{k}</a>'
            f"{colored[k - 1]}\n</span>"
            for k in part.lines
        )
        anchor = f' id="{part.name}"' if part.name else ""
        kind = "article" if number == 0 else "row" if part.words else "row bare"
        # The article of a file stands alone; its imports come below it.
        code = f'<pre class="code">{code}</pre>' if code else ""
        left = f'<div class="words">{text}</div>'
        rows.append(f'<section class="{kind}"{anchor}>{left}{code}</section>')
    order = list(pages)
    place = order.index(name)
    before = f'<a href="{order[place - 1]}">← {title(pages[order[place - 1]])}</a>' if place else ""
    after = ""
    if place + 1 < len(order):
        after = f'<a href="{order[place + 1]}">{title(pages[order[place + 1]])} →</a>'
    bar = f'<nav>{before}<a href="index.html">all files</a>{after}</nav>'
    return whole(where, f"{bar}<h1>{where}</h1>" + "\n".join(rows) + bar)


def title(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    """The heading under which the index has a file: the method, a command, a folder."""
    folder = path.relative_to(ROOT).parts[:-1]
    if path.name == "evaluate.py":
        return "The command evaluate.py"
    return "The method, in reading order" if len(folder) < 2 else "/".join(folder) + "/"


def index(pages: dict[str, Path], homes: dict[str, str]) -> str:
    """The page that leads to all others: the files by room, the method first; the equations."""
    rooms: dict[str, list[str]] = {}
    for name, path in pages.items():
        first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
        link = f'<a href="{name}"><code>{title(path)}</code></a>'
        row = f"<tr><td>{link}</td><td>{MARKDOWN.renderInline(first)}</td></tr>"
        rooms.setdefault(room(path), []).append(row)
    files = "".join(
        f"<h2>{heading}</h2><table>{''.join(rows)}</table>" for heading, rows in rooms.items()
    )
    equations = "".join(
        f'<li><a href="{name}#{slug(label)}">{html.escape(label)}</a></li>'
        for label, name in sorted(homes.items())
    )
    return whole(
        "ssis, line by line",
        "<h1>ssis, line by line</h1><p>Semi-supervised instance segmentation: every file with "
        "its words on the left and its code on the right. Begin with <a href='train.html'>"
        "train.py</a>, the whole training loop; each file says what to read next.</p>"
        f"{files}<h2>Equations</h2><ul class='equations'>{equations}</ul>",
    )


def whole(heading: str, body: str) -> str:
    """A page around its body."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(heading)}</title><style>{style}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def build(out: Path) -> list[Path]:
    """Render everything into a folder.

    Raises:
        Mistake: a source has something that cannot be rendered, or says what is not so.
    """
    pages = sources()
    wrong = [
        line
        for path in pages.values()
        for line in disagreements(path.read_text(encoding="utf-8"), title(path))
    ]
    if wrong:
        raise Mistake("\n".join(wrong))
    homes = definitions(pages)
    out.mkdir(parents=True, exist_ok=True)
    made = {name: page(name, path, pages, homes) for name, path in pages.items()}
    made["index.html"] = index(pages, homes)
    for name, text in made.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pages")
    given = parser.parse_args()
    try:
        made = build(given.out)
    except (Mistake, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(made)} pages in {given.out}; open {given.out / 'index.html'}")


if __name__ == "__main__":
    main()
