"""What every page is made of: tables, and the templates that put a page together as HTML and as Markdown.

Every text is escaped where a template shows it, by the rules of its format.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from codeparrot_ds.report.plots import THEMES, png_size

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")


class Cell(NamedTuple):
    """A text, of which a second line is set small, and its CSS classes; of kind ``label`` it is the head of its row."""

    text: str
    kind: str = ""

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def rest(self) -> str:
        return self.text.partition("\n")[2]


@dataclass(frozen=True)
class Table:
    """A table of texts by row; a cell that is not of its column's kind says so."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    kinds: Sequence[str] = ()
    """By column; none for those that are missing."""

    @property
    def head_cells(self) -> list[Cell]:
        return self._cells(self.head)

    @property
    def cells(self) -> list[list[Cell]]:
        return [self._cells(row) for row in self.rows]

    def _cells(self, texts: Sequence[str | Cell]) -> list[Cell]:
        kinds = [*self.kinds, *[""] * (len(texts) - len(self.kinds))]
        return [each if isinstance(each, Cell) else Cell(each, kind) for each, kind in zip(texts, kinds, strict=True)]


def render(template: str, **content: Any) -> str:
    """A page from a template whose name ends in ``.html.j2`` or ``.md.j2``."""
    return writable(_environment(template.split(".")[1]).get_template(template).render(content))


def writable(text: str) -> str:
    """A text without halves of characters, which JSON and file names can hold and no file of text can."""
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def _environment(form: str) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_markdown if form == "md" else None,
    )  # fmt: skip
    environment.globals |= {
        "breakable": _breakable, "colours": _colours, "embedded": _embedded, "fenced": _fenced, "png_size": png_size,
    }  # fmt: skip
    return environment


def _markdown(value: Any) -> Markup:
    """Plain text in Markdown: no table cell, tag, link or emphasis can begin in it, and a second line is in brackets.

    Already marked text is left as it is, so that Jinja's own escaping, which is for HTML, changes nothing after it.
    """
    if isinstance(value, Markup):
        return value
    escaped = "".join(f"\\{sign}" if sign in "\\`*_<>|[]&" else sign for sign in str(value))
    first, _, rest = escaped.partition("\n")
    return Markup(f"{first} ({' '.join(rest.splitlines())})" if rest else first)


def _fenced(text: str, language: str = "") -> Markup:
    """Source in Markdown, in a fence that nothing in it can close."""
    fence = "`" * (3 + text.count("`"))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def _breakable(name: str) -> Markup:
    """A name in HTML that may be broken where it has parts."""
    return escape(name).replace(",", Markup(",<wbr>")).replace("_", Markup("_<wbr>")).replace(" on ", " on\xa0")


def _colours(theme: str) -> str:
    """The colours of a theme as CSS variables."""
    return " ".join(f"--{name}: {THEMES[theme][name]};" for name in ("paper", "ink", "faint", "grid"))


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
