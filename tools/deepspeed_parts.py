"""Writes the tables of ``docs/deepspeed.md``: ``python -m tools.deepspeed_parts``. Their source is the package's."""

from __future__ import annotations

from pathlib import Path

from codeparrot_ds.engine.deepspeed_fixes import FIXES
from codeparrot_ds.engine.private_parts import LAUNCHER, PARTS, Part

PAGE = Path(__file__).resolve().parents[1] / "docs" / "deepspeed.md"
LEVELS = {
    "class": "class or module",
    "submodule": "module",
    "code": "code that names it",
    LAUNCHER: "a test of what parses it",
}


def render(page: str) -> str:
    """A page with its tables replaced by the current ones."""
    for name, table in (("fixes", _fixes()), ("parts", _parts())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def _fixes() -> str:
    lines = ["| fix | configs | what it corrects in DeepSpeed | test that notices when it is no longer needed |"]
    lines.append("|---|---|---|---|")
    for fix in FIXES:
        configs = " or ".join(map(str, fix.configs))
        code = "<br>".join(f"`{where}`" for where in fix.corrects)
        lines.append(f"| `{fix.name}` | {configs} | {code} | `{fix.noticed_by}` |")
    return "\n".join(lines)


def _parts() -> str:
    lines = ["| part | where it is looked for | configs | used by | why | newer than |", "|---|---|---|---|---|---|"]
    rows: dict[tuple[str, ...], list[Part]] = {}
    for part in PARTS:
        configs = str(part.configs) if part.configs else "parsed" if part.held == LAUNCHER else "before the engine"
        where = f"`deepspeed.{part.module}`, {LEVELS.get(part.held, f'`{part.held}`')}"
        rows.setdefault((where, configs, ", ".join(part.users), part.why, part.newer_than), []).append(part)
    for row, parts in rows.items():
        lines.append("| " + " | ".join(["<br>".join(f"`{part.name}`" for part in parts), *row]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
