"""Each private part of DeepSpeed, renamed in turn: every config that needs it is refused, and no other one."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import operator
import re
import sys
import types
from pathlib import Path

import pytest

from codeparrot_ds.engine import deepspeed_fixes, private_parts
from codeparrot_ds.engine.collectives import collectives_backend
from codeparrot_ds.engine.deepspeed_fixes import FIXES, import_muon_uncompiled, warn_of_unverified_version
from codeparrot_ds.engine.fragments import owned_fragments
from codeparrot_ds.engine.operators import _build, _load_built
from codeparrot_ds.engine.private_parts import (
    LAUNCHER,
    PARTS,
    VERIFIED,
    WRAPPERS,
    PrivatePartError,
    Use,
    check_parts,
    installed_version,
    use_of,
    wrapper_of,
)
from codeparrot_ds.engine.ranks import SharedError, build_no_shared_memory_operator
from codeparrot_ds.engine.traced import MAKERS, replace_backend, replace_operators, replace_pinning
from codeparrot_ds.errors import UserError
from codeparrot_ds.train import is_said_here
from tools.deepspeed_parts import PAGE, render

PACKAGE = Path(private_parts.__file__).resolve().parents[1]
TORCH_ADAM = {"torch_adam": True}
# A real engine of every wrapper, and of each trait that a CPU can have.
ENGINES = {
    "zero0_fp32": ({}, "bare optimizer", {"FusedAdam", "cpu"}),
    "zero0": ({}, "FP16_Optimizer", {"FusedAdam", "cpu"}),
    "zero0_fp16": ({}, "FP16_Optimizer", {"FusedAdam", "cpu", "fp16", "dynamic scale"}),
    "zero0_fp16 with torch's Adam": (
        {"optimizer": TORCH_ADAM}, "FP16_UnfusedOptimizer", {"AdamW", "cpu", "fp16", "dynamic scale"},
    ),
    "zero1_fp32_accumulation": ({}, "BF16_Optimizer", {"FusedAdam", "cpu"}),
    "zero2": ({}, "DeepSpeedZeroOptimizer", {"FusedAdam", "cpu"}),
    "zero2_fp16": ({}, "DeepSpeedZeroOptimizer", {"FusedAdam", "cpu", "fp16", "dynamic scale"}),
    "zero2_offload": ({}, "DeepSpeedZeroOptimizer", {"DeepSpeedCPUAdam", "cpu", "offloaded optimizer"}),
    "zero3": ({}, "DeepSpeedZeroOptimizer_Stage3", {"FusedAdam", "cpu"}),
    "zero3_fp16": ({}, "DeepSpeedZeroOptimizer_Stage3", {"FusedAdam", "cpu", "fp16", "dynamic scale"}),
}  # fmt: skip
EARLY = [part for part in PARTS if part.configs is None and part.held != LAUNCHER]


@contextlib.contextmanager
def renamed(part, engine=None):
    """DeepSpeed as if a part had another name, in the class or module, or in the engine that was made."""
    with pytest.MonkeyPatch.context() as patch:
        if part.held == "submodule":
            patch.setitem(sys.modules, f"deepspeed.{part.module}.{part.attribute}", None)
        elif part.held in ("class", "code"):
            module = importlib.import_module(f"deepspeed.{part.module}")
            holder = operator.attrgetter(part.owner)(module) if part.owner else module
            if part.held == "class":
                owner = next(each for each in getattr(holder, "__mro__", [holder]) if part.attribute in vars(each))
                patch.delattr(owner, part.attribute)
            elif isinstance(holder, type):
                patch.setattr(holder, "__init__", _with_other_names(holder.__init__, part.attribute))
            else:
                inside, _, name = part.owner.rpartition(".")
                owner = getattr(module, inside) if inside else module
                patch.setattr(owner, name, _with_other_names(holder, part.attribute))
        else:
            if part.held == "parameter":
                holder = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
            else:
                holder = functools.reduce(getattr, part.held.split(".")[1:], engine)
            for owner in (holder, *type(holder).__mro__):
                if part.attribute in vars(owner):
                    patch.delattr(owner, part.attribute)
        yield


def _with_other_names(function, name):
    """The function with another name where its code has this one."""
    code = function.__code__
    names = tuple(f"renamed_{each}" if each == name else each for each in code.co_names)
    return types.FunctionType(code.replace(co_names=names), function.__globals__, closure=function.__closure__)


def refusal(use, engine) -> str:
    """What the check says; empty where it is content."""
    try:
        check_parts(use, engine)
    except PrivatePartError as error:
        return str(error)
    return ""


def variants(use):
    """A use as it is, on a GPU, traced, with lean steps at stages 0 to 2, and at stage 3 with the optimizer on NVMe."""
    yield use
    yield dataclasses.replace(use, traits=use.traits - {"cpu"})
    yield dataclasses.replace(use, traits=use.traits | {"traced"})
    if use.wrapper in ("bare optimizer", "FP16_Optimizer", "DeepSpeedZeroOptimizer"):
        yield dataclasses.replace(use, traits=use.traits | {"lean step"})
    if use.wrapper == "DeepSpeedZeroOptimizer_Stage3":
        yield dataclasses.replace(use, traits=use.traits | {"offloaded optimizer", "optimizer on NVMe"})


@pytest.mark.parametrize("name", ENGINES)
def test_a_renamed_part_is_refused_by_the_configs_that_need_it(build, fp16, name):
    changes, wrapper, traits = ENGINES[name]
    engine = build(name.split()[0], **changes)
    use = use_of(engine, engine.config)
    assert (use.wrapper, use.traits) == (wrapper, traits)
    uses = list(variants(use))
    for each in uses:
        assert refusal(each, engine) == ""
    needed = 0
    for part in PARTS:
        if part.configs is None:
            continue
        in_an_engine = part.held not in ("class", "code", "submodule")
        if in_an_engine and not (wrapper in part.configs.wrappers and part.is_there(engine)):
            continue  # this engine has no such part that could be renamed
        # A part may be in the table twice, for two uses of it.
        rows = [row.configs for row in PARTS if dataclasses.replace(row, **uses_of(part)) == part]
        with renamed(part, engine):
            for each in uses:
                said = refusal(each, engine)
                assert bool(said) == any(configs.include(each) for configs in rows), part
                assert not said or part.name in said, said
                needed += bool(said)
    assert needed > 10
    assert refusal(use, engine) == ""


@pytest.mark.parametrize("part", [each for each in PARTS if each.held == "code"], ids=lambda part: part.name)
def test_a_part_is_missing_where_what_names_it_has_no_code_of_its_own(part):
    """As of a class whose constructor a release moves into another one."""
    module = importlib.import_module(f"deepspeed.{part.module}")
    inside, _, name = part.owner.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator.attrgetter(inside)(module) if inside else module, name, type(name, (), {}))
        assert not part.is_there()
    assert part.is_there()


def uses_of(part):
    """What another row of the same part may have otherwise."""
    return {name: getattr(part, name) for name in ("configs", "users", "why", "newer_than")}


def test_every_part_is_needed_by_some_engine_here():
    """So that the test above renames it: none is in the table for a config that nobody has."""
    uses = [Use(wrapper=wrapper, traits=frozenset(traits)) for _, wrapper, traits in ENGINES.values()]
    everything = [each for use in uses for each in variants(use)]
    for part in PARTS:
        assert part.configs is None or any(part.configs.include(use) for use in everything), part
    assert {use.wrapper for use in uses} == set(WRAPPERS)


TOUCHING = {
    "compiler.compile": import_muon_uncompiled,
    "muon.original_muon": import_muon_uncompiled,
    "comm.cdb": collectives_backend,
    "OpBuilder._loaded_ops": lambda: _load_built("fused_adam"),
    "OpBuilder.cxx_args": lambda: _build("fused_adam"),
    "build_shm_op.__compatible_ops__": build_no_shared_memory_operator,
    "partitioned_param_coordinator.assert_ints_same_as_other_ranks": lambda: replace_backend(None),
    **dict.fromkeys(
        [part.name for part in EARLY if part.owner == "DeepSpeedAccelerator"],
        lambda: replace_pinning(type("Accelerator", (), {}), pin=None, empty=None, is_pinned=None),
    ),
}


@pytest.mark.parametrize("part", EARLY, ids=lambda part: part.name)
def test_a_part_that_is_touched_before_there_is_an_engine_is_refused_there(part):
    with renamed(part):
        with pytest.raises(PrivatePartError, match=re.escape(part.name)):
            TOUCHING[part.name]()
        if part.name == "comm.cdb":
            with pytest.raises(PrivatePartError):
                replace_backend(None)
        if part.name == "OpBuilder._loaded_ops":
            with pytest.raises(PrivatePartError):
                replace_operators()


def test_the_refusal_names_the_version_and_what_to_do(build):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(DeepSpeedZeroOptimizer, "check_overflow")
        patch.delattr(DeepSpeedZeroOptimizer, "update_lp_params")
        with pytest.raises(PrivatePartError) as refused:
            build("zero2")
        build("zero3")
    said = str(refused.value)
    assert "DeepSpeedZeroOptimizer.check_overflow" in said and "DeepSpeedZeroOptimizer.update_lp_params" in said
    assert f"DeepSpeed {installed_version()} has no" in said and f"install deepspeed=={VERIFIED[-1]}" in said
    assert refused.value.exit_code == 2 and "\n" not in said


@pytest.mark.parametrize(
    ("rank", "local_rank", "said"),
    [(0, 0, [True, True, True]), (1, 1, [False, False, True]), (8, 0, [False, True, True])],
)
def test_a_refusal_is_said_once_per_host(monkeypatch, rank, local_rank, said):
    """The ranks of a host all meet it; the hosts may have different versions of DeepSpeed."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert [is_said_here(error("why")) for error in (SharedError, PrivatePartError, UserError)] == said


@pytest.mark.parametrize("name", ["zero0", "zero0_fp32", "zero2", "zero3"])
def test_an_optimizer_of_unknown_class_is_refused_and_not_taken_for_stage_0(build, name):
    engine = build(name)
    assert wrapper_of(engine) in WRAPPERS
    engine.optimizer.__class__ = type("AnotherOptimizer", (type(engine.optimizer),), {})
    for ask in (lambda: list(owned_fragments(engine)), lambda: use_of(engine, engine.config)):
        with pytest.raises(PrivatePartError, match="AnotherOptimizer of DeepSpeed .* is not known"):
            ask()


@pytest.fixture
def warned(monkeypatch, caplog):
    """What is said of an installed version."""

    def say(version):
        warn_of_unverified_version.cache_clear()
        monkeypatch.setattr(deepspeed_fixes, "installed_version", lambda: version)
        caplog.clear()
        for _ in range(2):
            warn_of_unverified_version()
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    yield say
    warn_of_unverified_version.cache_clear()


def test_another_version_is_warned_of_once(warned, monkeypatch):
    assert warned(VERIFIED[-1]) == []
    for version in ("0.19.7", "0.20.0"):
        (said,) = warned(version)
        assert version in said and VERIFIED[-1] in said and "what the fixes correct has not changed" in said
    fix = dataclasses.replace(FIXES[0], corrects={where: "another" for where in FIXES[0].corrects})
    monkeypatch.setattr(deepspeed_fixes, "FIXES", (fix, *FIXES[1:]))
    (said,) = warned("0.20.0")
    assert "undo_construction_step (runtime.fp16.fused_optimizer:FP16_Optimizer.initialize_optimizer_states" in said


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name)
def test_a_fix_finds_the_code_that_it_was_verified_with(fix):
    assert fix.changed_code() == []
    assert deepspeed_fixes.text_digest(f"{next(iter(fix.corrects))}_renamed") == ""


@pytest.mark.parametrize("fix", FIXES, ids=lambda fix: fix.name)
def test_a_fix_has_parts_and_a_test_that_notices_when_it_is_no_longer_needed(fix):
    tests = (Path(__file__).parent / "test_engine.py").read_text(encoding="utf-8")
    assert f"def {fix.noticed_by}(" in tests
    for configs in fix.configs:
        own = [part.configs for part in PARTS if fix.name in part.users]
        for wrapper in configs.wrappers if len(configs.wrappers) < len(WRAPPERS) else [next(iter(WRAPPERS))]:
            use = Use(wrapper=wrapper, traits=configs.traits)
            assert any(each.include(use) for each in own), use


def test_users_are_fixes_or_known():
    others = {"import_muon_uncompiled", "fragments", "loss-scale", "bad-steps", "trace", "profile", "parts"}
    others |= {"operators", "ranks", "launch", "compare"}
    assert {user for part in PARTS for user in part.users} == others | {fix.name for fix in FIXES}
    functions = {name for files in MAKERS.values() for names in files.values() for name in names} - {"*"}
    files = {name.removesuffix(".py") for files in MAKERS.values() for name in files} - {"stage_1_and_2"}
    assert functions | files <= {part.attribute for part in PARTS if "trace" in part.users}


# What only reads like a private part, or is what DeepSpeed documents.
PUBLIC = {"compile", "save", "start", "numel", "buffer", "dynamic", "loss_scaler"}


def _touched(tree):
    """Attributes that are read, set or asked for by name in a module, and what it imports from within DeepSpeed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            yield from (str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant))
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("deepspeed."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_outside_engine_touches_a_private_part():
    private = {part.attribute for part in PARTS if part.held != LAUNCHER} - PUBLIC
    # Classes to derive from and functions that DeepSpeed documents.
    public = {"deepspeed.comm.torch.TorchBackend", "deepspeed.accelerator.get_accelerator"}
    public |= {"deepspeed.accelerator.set_accelerator", "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator"}
    public |= {"deepspeed.accelerator.abstract_accelerator.DeepSpeedAccelerator"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "engine":
            touched = set(_touched(ast.parse(path.read_text(encoding="utf-8"))))
            inside = {name for name in touched if name.startswith("deepspeed.")} - public
            assert ((touched & private) | inside) == set(), path


def test_engine_touches_no_private_part_that_is_not_in_the_table():
    """By the names that optimizers, their scalers and engines have in the modules of ``engine/``."""
    holders = {"optimizer", "wrapper", "base", "basic", "basic_optimizer", "scaler", "scaling", "bucket", "mapping"}
    holders |= {"loss_scaler", "loss_scale_config", "checkpoint_engine", "engine", "comm", "compiler", "OpBuilder"}
    public = {"step", "param_groups", "state", "overflow", "register_step_post_hook"}  # of torch's, and of the engine:
    public |= {"optimizer", "basic_optimizer", "module", "device", "global_rank", "gradient_clipping", "backward"}
    public |= {
        "lr_scheduler",
        "skipped_steps",
        "_opt_called",
        "lean_step",
    }  # the last but one torch's, the last our own
    for name in ("deepspeed_fixes", "engine", "fragments", "lean_step", "traced", "collectives", "operators", "ranks"):
        for node in ast.walk(ast.parse((PACKAGE / "engine" / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr != "get":  # a dict of the same name
                holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
                if holder in holders:
                    assert node.attr in public | {part.attribute for part in PARTS}, f"{name}.py:{node.lineno}"


def test_nothing_private_is_asked_for_with_a_silent_alternative():
    allowed = {"_zero_padding"}  # padding alone has the mark
    for path in (PACKAGE / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                names = {each.value for each in node.args[1:2] if isinstance(each, ast.Constant)}
                assert not names & {part.attribute for part in PARTS} - allowed, f"{path.name}:{node.lineno}"


def test_the_page_for_people_has_the_tables():
    """When this fails: ``python -m tools.deepspeed_parts``."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page)
    assert all(f"`{part.name}`" in page for part in PARTS) and all(f"`{fix.name}`" in page for fix in FIXES)
