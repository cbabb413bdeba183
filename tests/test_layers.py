"""Imports point down only, and the pure layer imports nothing heavy when it is imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "codeparrot_ds"
MODULES = {
    ".".join(("codeparrot_ds", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
}
# From what the user types (3) down to what is pure (0).
LAYERS = {
    "cli": 3,
    "demo": 3,
    "__main__": 3,
    "train": 2,
    "compare": 2,
    "search": 2,
    "trial": 2,
    "run": 1,
    "hub": 1,
    "evaluation": 1,
    "model.activation": 1,
    "model.attention": 1,
    "model.gpt2": 1,
    "model.loss": 1,
    "model.products": 1,
}
HEAVY = {"torch", "deepspeed", "transformers"}
# Loaders are torch's own; running without torch is not asked of them.
MAY_IMPORT_TORCH = {"codeparrot_ds.data.constant_length", "codeparrot_ds.data.loader"}


def layer(module):
    """The layer of a module of the package; 0, the pure one, unless `LAYERS` says otherwise."""
    inside = module.removeprefix("codeparrot_ds").lstrip(".")
    return next((LAYERS[name] for name in (inside, inside.split(".")[0]) if name in LAYERS), 0)


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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    own = layer(module)
    for name, top in imports(ast.parse(MODULES[module].read_text())):
        root = name.split(".")[0]
        if root == "codeparrot_ds":
            assert layer(name) <= own, f"{module} (layer {own}) imports {name} (layer {layer(name)})"
        elif root in HEAVY and top and (own == 0 or own == 3):
            assert module in MAY_IMPORT_TORCH and root == "torch", f"{module} imports {root} when it is imported"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.endswith("__init__")))
def test_importing_a_package_does_nothing(module):
    if module == "codeparrot_ds.__init__":
        return
    body = ast.parse(MODULES[module].read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_the_table_names_real_modules():
    for name in LAYERS:
        path = PACKAGE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    assert set(MODULES) >= MAY_IMPORT_TORCH
