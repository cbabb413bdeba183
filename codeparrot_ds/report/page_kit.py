"""Tables and the dress of all pages."""

from __future__ import annotations

import html

NOTHING = "–"

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2430; --faint: #5c6475; --line: #e4e7ee; --back: #f4f5f8; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #1a1d24; --ink: #e8eaf0; --faint: #a0a8b8;
  --line: #2d323d; --back: #12141a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .8rem; }
.subtitle { color: var(--faint); margin: .3rem 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin-top: 1.5rem; }
.tile, figure, .table, details { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: .8rem 1rem; }
.tile span { color: var(--faint); font-size: .8rem; display: block; }
.tile strong { display: block; font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .8rem;
  margin-top: 1.5rem; }
figure { margin: 0; padding: .6rem; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .42rem .9rem; text-align: left; white-space: nowrap; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
tbody th { width: 1%; font-weight: 400; color: var(--faint); position: sticky; left: 0; background: var(--paper); }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
details { margin-top: .6rem; padding: .7rem 1rem; }
summary { cursor: pointer; }
details ul { margin: .5rem 0 0; padding-left: 1.2rem; font-size: .88rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: .6rem 0 0; }
@media print { body { background: none; font-size: 11pt; } main { max-width: none; padding: 0; }
  .charts { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; } details:not([open]) { display: none; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_LONG_ROWS = {"checkpoints at steps", "branch", "slowest rank"}


Table = list[tuple[str, list[str]]]
"""Rows of a label and a text a run; the first row is the head."""


def html_table(table: Table) -> str:
    (corner, names), *rows = table
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = ""
    for label, values in rows:
        kind = ' class="wrap"' if label in _LONG_ROWS else ""
        cells = "".join(f"<td{kind}>{html.escape(value)}</td>" for value in values)
        body += f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>'
    corner_cell = f'<th scope="col">{html.escape(corner)}</th>'
    return f'<div class="table"><table><thead><tr>{corner_cell}{head}</tr></thead><tbody>{body}</tbody></table></div>'


def md_table(table: Table) -> str:
    (corner, names), *rows = table
    lines = [[corner, *names], ["---"] * (1 + len(names)), *([label, *values] for label, values in rows)]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else escape_md(cell) for cell in line) + " |" for line in lines
    )


def escape_md(text: str) -> str:
    """Plain text in Markdown: no table cell, tag, link or emphasis can begin in it."""
    escaped = html.escape(text, quote=False)
    return "".join(f"\\{character}" if character in "|[]*_`\\" else character for character in escaped)
