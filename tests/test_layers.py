"""The order of the house: imports point down, no circles, no folder that takes everything."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "codeparrot_ds"
MODULES = {
    ".".join(("codeparrot_ds", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the ground up: a module imports from its own folder and from those before it. Files beside the folders are the
# ground, but for those that are named here.
ORDER = (
    *("ground", "rows", "supervision", "sandbox", "config", "model", "data", "ds_config", "resolved_run", "engine"),
    *("corpus", "hub", "checkpoint", "memory", "telemetry", "problem_sets", "evaluation", "report", "launch"),
    *("training", "train", "compare", "demo", "cli", "__main__"),
)
MAX_FILES = 12  # beside __init__.py
MAX_SHARE = 0.15  # of the package's lines
HEAVY = {"torch", "deepspeed", "transformers"}
# Importing a module of these folders imports nothing heavy: `check`, `plan`, `--help` and errors answer at once.
LIGHT = {
    "ground",
    "rows",
    "supervision",
    "sandbox",
    "config",
    "ds_config",
    "corpus",
    "hub",
    "problem_sets",
    "launch",
    "demo",
    "cli",
    "__main__",
}
# Of the other folders, what commands import before they know that a rank or a model is needed.
LIGHT_MODULES = ("resolved_run", "data.datasets", "checkpoint.run_folder", "memory.plan", "memory.trace")
LIGHT_MODULES += ("report.run_report", "train", "compare.run", "compare.trial")


def folder(module):
    """Where a module lives, by its name in `ORDER`."""
    parts = module.split(".")[1:]
    if not parts:
        return "ground"
    return parts[0] if parts[0] in ORDER else "ground"


def imports(tree):
    """Yields (module, whether at module level) for every import in a file; `if TYPE_CHECKING` blocks do not count."""

    def walk(node, top):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from package import submodule` imports the submodule.
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)
        top = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top)

    yield from walk(tree, True)


def own_module(name):
    """The module of the package that `from … import` means: a module, or what holds the name."""
    return name if name in MODULES else name.rpartition(".")[0]


def graph():
    """By module, the modules of the package that it imports anywhere, inside functions too."""
    return {
        module: {
            own_module(name)
            for name, _ in imports(ast.parse(path.read_text()))
            if name.split(".")[0] == "codeparrot_ds"
        }
        for module, path in MODULES.items()
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    own = ORDER.index(folder(module))
    for name, top in imports(ast.parse(MODULES[module].read_text())):
        root = name.split(".")[0]
        if root == "codeparrot_ds":
            other = folder(own_module(name))
            assert ORDER.index(other) <= own, f"{module} imports {name}, and {other} lies above {folder(module)}"
        elif root in HEAVY and top:
            assert folder(module) not in LIGHT, f"{module} imports {root} when it is imported"


def test_nothing_heavy_is_imported_on_the_way():
    """What answers at once imports nothing heavy, nor does any module that it imports."""
    at_import = {
        module: sorted({name for name, top in imports(ast.parse(path.read_text())) if top})
        for module, path in MODULES.items()
    }
    starts = {module for module in MODULES if folder(module) in LIGHT}
    ways = [[start] for start in sorted(starts | {f"codeparrot_ds.{name}" for name in LIGHT_MODULES})]
    seen = {way[0] for way in ways}
    while ways:
        way = ways.pop()
        for name in at_import[way[-1]]:
            assert name.split(".")[0] not in HEAVY, f"{' -> '.join(way)} imports {name} when it is imported"
            if name.split(".")[0] == "codeparrot_ds" and own_module(name) not in seen:
                seen.add(own_module(name))
                ways.append([*way, own_module(name)])


def test_no_circles():
    edges, done = graph(), set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module] - {module}):
                visit(other, [*way, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])


def test_the_set_up_of_a_rank_fits_in_a_head():
    tree = ast.parse((PACKAGE / "training" / "setup.py").read_text())
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "codeparrot_ds" in node.module]
    assert len({node.module for node in own}) <= 20
    assert sum(len(node.names) for node in own) <= 40


def test_no_folder_is_a_drawer():
    lines = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    for each in (path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        own = [path for path in lines if path.parent == each]
        assert len(own) - 1 <= MAX_FILES, f"{each.name} has {len(own) - 1} files"
        share = sum(lines[path] for path in own) / sum(lines.values())
        assert share <= MAX_SHARE, f"{each.name} has {share:.0%} of the lines"


@pytest.mark.parametrize("module", sorted(module for module, path in MODULES.items() if path.name == "__init__.py"))
def test_a_folder_says_what_it_is_for(module):
    if module == "codeparrot_ds":
        return
    tree = ast.parse(MODULES[module].read_text())
    assert len(ast.get_docstring(tree).splitlines()) == 1 and len(tree.body) == 1, "one line, and nothing else"


def test_the_order_names_what_is_there():
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(ORDER) - {"ground"} <= names
    assert {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "ds_configs")
    } <= (set(ORDER))
