"""``check`` and ``plan``: what a DeepSpeed config means, and what it takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codeparrot_ds import devices
from codeparrot_ds.cli.common import KINDS, PROGRAM, add_command, default_of
from codeparrot_ds.config import option_types as types
from codeparrot_ds.config.arguments import config_from_arguments
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import find_run, name_argument, path_argument
from codeparrot_ds.terminal import progress_line


def add_check(commands: Any) -> None:
    parser = add_command(
        commands,
        "check",
        _run_check,
        "checks DeepSpeed JSONs and the run config together; exit code 1 when something is wrong",
    )
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names (default: the run config's own)",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=name_argument, metavar="FILE", help="run config to check against (default: none)"
    )
    parser.add_argument("--preset", metavar="NAME", help=f"run preset to check against: {', '.join(PRESETS)}")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help=default_of("what the ranks will have", "auto")
    )
    parser.add_argument(
        "--world-size", type=types.count, metavar="N",
        help="ranks that share the batch and the lanes (default: any; for --explain those of a run here)",
    )  # fmt: skip
    parser.add_argument(
        "--explain", action="store_true",
        help="also print the config that a run would hand to DeepSpeed, and where each value came from",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_check(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.ds_config.lint import version_notice

    has_config = arguments.config or arguments.preset
    if not has_config and not arguments.ds_configs:
        raise UserError("nothing to check: name a DeepSpeed JSON, --config FILE or --preset NAME")
    config = config_from_arguments(arguments) if has_config else None
    run = config or RunConfig()
    shape, model = _model_of(run) if config or arguments.explain else (None, None)
    names = arguments.ds_configs or [run.ds_config_name]
    of_run = [] if config is None else _check_run_config(config, arguments)
    # Of a run that cannot start nothing is handed to DeepSpeed.
    explain = arguments.explain and all(finding["severity"] != "error" for finding in of_run)
    files = [_check_file(name, arguments, config, shape, explain=explain) for name in names]
    notice = version_notice()
    findings = [*of_run, *(finding for file in files for finding in file["findings"])]
    num = {kind: sum(finding["severity"] == kind for finding in findings) for kind in KINDS}
    if arguments.json:
        report = {"errors": num["error"], "warnings": num["warning"], "notice": notice, "model": model}
        print(json.dumps(report | {"run_config": of_run, "files": files}, indent=2))
    else:
        lines = [line for line in (model, notice) if line]
        lines += [f"{finding['file']}: {finding['severity']}: {finding['message']}" for finding in of_run]
        for file in files:
            lines += file.pop("text")
        print("\n".join(lines))
    return 1 if num["error"] else 0


def _check_run_config(config: RunConfig, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What of the run config does not go with the ranks or can hardly be meant, in the form of the JSONs' findings."""
    from codeparrot_ds.checkpoint.run_folder import continued_from
    from codeparrot_ds.config.warnings import config_warnings
    from codeparrot_ds.data.stream import check_world_size
    from codeparrot_ds.ds_config.lint import Finding

    place = arguments.config or f"preset {arguments.preset}"
    findings = [
        Finding(place, warning.field, "warning", warning.sentence)
        for warning in config_warnings(config, continued_from(config))
    ]
    if (ranks := arguments.world_size) is not None:
        checks: dict[str, Callable[[], Any]] = {"num_lanes": lambda: check_world_size(config.num_lanes, ranks)}
        if not config.auto_micro_batch:
            checks["global_batch_size"] = lambda: config.gradient_accumulation_steps(ranks)
        for field, check in checks.items():
            try:
                check()
            except UserError as error:
                findings.append(Finding(place, field, "error", str(error)))
    return [finding.as_json() for finding in findings]


def _check_file(
    name: str, arguments: argparse.Namespace, config: RunConfig | None, shape: Any, *, explain: bool
) -> dict[str, Any]:
    """The findings of one DeepSpeed JSON, and what it resolves to when asked."""
    from codeparrot_ds.ds_config.file import CPU_PRECISIONS, GPU_PRECISIONS, find_ds_config, name_in, open_ds_config
    from codeparrot_ds.ds_config.lint import Finding, libaio_installed, lint_file
    from codeparrot_ds.ds_config.precision import device_precisions
    from codeparrot_ds.engine.operators import are_built
    from codeparrot_ds.model.shapes import num_parameters

    # Only what is asked about this machine is judged by this machine.
    is_here = arguments.device == "auto"
    other = GPU_PRECISIONS if arguments.device == "cuda" else CPU_PRECISIONS
    precisions = device_precisions(device_here()) if is_here else other
    path = name
    try:
        path = str(find_ds_config(name_in(name, precisions[0])))
        file = open_ds_config(path, precisions)
        findings = lint_file(
            file,
            config=config,
            device=device_here() if is_here else arguments.device,
            world_size=arguments.world_size,
            parameters=num_parameters(shape) if shape else None,
            model_hidden_size=shape.n_embd if shape else None,
            libaio=(libaio_installed() or are_built(["async_io"])) if is_here else None,
        )
    except UserError as error:
        findings = [Finding(path, "", "error", str(error))]
        text = [f"error: {error}"]
    else:
        text = [str(finding) for finding in findings] or [f"{path}: nothing wrong"]
    report: dict[str, Any] = {"file": path, "findings": [finding.as_json() for finding in findings]}
    if explain and not any(finding.severity == "error" for finding in findings):
        try:
            resolved = _resolve_file(file, arguments, config, shape)
        except UserError as error:
            report["findings"].append(Finding(path, "", "error", str(error)).as_json())
            text.append(f"error: {error}")
        else:
            text += resolved.pop("text")
            report |= resolved
    return report if arguments.json else report | {"text": text}


def _resolve_file(file: Any, arguments: argparse.Namespace, config: RunConfig | None, shape: Any) -> dict[str, Any]:
    from codeparrot_ds.devices import local_ranks
    from codeparrot_ds.ds_config.changes import explain, field_origins, sources_as_json
    from codeparrot_ds.ds_config.resolve import nvme_folder, resolve

    world_size = arguments.world_size or local_ranks(device_here())
    run = config or RunConfig()
    resolved = resolve(
        file,
        run,
        world_size=world_size,
        model_hidden_size=shape.n_embd,
        nvme_path=nvme_folder(run),
        origins=field_origins(arguments.preset, arguments.config, {}),
    )
    lines = [f"resolved for {world_size} rank(s):", *("  " + line for line in explain(resolved))]
    values = {"world_size": world_size, "resolved": resolved.config, "sources": sources_as_json(resolved)}
    return values | {"text": lines}


def device_here() -> str:
    from codeparrot_ds.devices import local_device

    return local_device()


def _model_of(config: RunConfig) -> tuple[Any, str]:
    """The shape of a run's model, and a line about it."""
    from codeparrot_ds.model.shapes import find_shape, flops_per_token, num_parameters

    vocab_size, source = 32_768, "the recipe's vocabulary"
    if config.tokenizer:
        from codeparrot_ds.data.encoder import load_encoder

        vocab_size, source = load_encoder(config.tokenizer).vocab_size, config.tokenizer
    shape = find_shape(config.model, vocab_size=vocab_size, seq_length=config.seq_length)
    return shape, (
        f"model {config.model}: {num_parameters(shape):,} parameters, "
        f"{flops_per_token(shape, config.seq_length) / 1e9:.3f} GFLOP per token (vocabulary {vocab_size:,}: {source})"
    )


def add_plan(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        _run_plan,
        "predicts the memory of DeepSpeed configs for a model, before a GPU is touched",
        usage=f"{PROGRAM} plan MODEL [DS_JSON ...] [options]",
        epilog="By formulas, in under a second; --trace runs DeepSpeed's own engine on tensors without memory, "
        "and replaces the formulas from then on (marked *). Several numbers have commas: 1,8,64.",
    )
    parser.add_argument(
        "model", nargs="?", type=name_argument, metavar="MODEL",
        help=f"preset ({', '.join(PRESETS)}), known shape (gpt2, gpt2-xl ...) or a GPT-2 config.json",
    )  # fmt: skip
    parser.add_argument(
        "ds_configs", nargs="*", type=name_argument, metavar="DS_JSON",
        help="files or shipped names (default: all that are shipped)",
    )  # fmt: skip
    group = parser.add_argument_group("run")
    group.add_argument("--world-size", type=types.counts, default=(1,), metavar="N,...", help=default_of("ranks", 1))
    group.add_argument(
        "--micro-batch-sizes",
        type=types.counts,
        metavar="N,...",
        help="rows per rank and forward pass (default: the preset's)",
    )
    group.add_argument(
        "--global-batch-size", type=types.count, metavar="N", help="rows per step of all ranks (default: the preset's)"
    )
    group.add_argument("--seq-length", type=types.count, metavar="N", help="tokens per row (default: the preset's)")
    group.add_argument(
        "--vocab-size", type=types.count, metavar="N", help=default_of("tokens of the vocabulary", 32768)
    )
    group.add_argument(
        "--attention", choices=("flash", "math"), default="flash",
        help=default_of("kernel: fused, or one that keeps whole scores", "flash"),
    )  # fmt: skip
    group.add_argument("--dropout", type=types.real(minimum=0), metavar="X", help="probability (default: the preset's)")
    group.add_argument(
        "--chunked-loss",
        action="store_true",
        default=None,
        help="as the run config's chunked_loss (default: the preset's)",
    )
    group.add_argument(
        "--no-fused-loss",
        dest="fused_loss",
        action="store_false",
        default=None,
        help="as without the run config's fused_loss (default: the preset's)",
    )
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, as 80GB or 80GiB (default: this machine's smallest GPU)"
    )
    group.add_argument(
        "--calibrate", type=name_argument, metavar="RUN",
        help="measure the overhead per rank, in addition to tensors, in this GPU run, for later plans (default: none)",
    )  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--trace", action="store_true", help="trace every row that is shown: exact, minutes")
    group.add_argument("--num-workers", type=types.count, metavar="N", help="traces at a time (default: one a core)")
    group.add_argument("--json", action="store_true", help="print one JSON object, with every micro-batch")
    group.add_argument(
        "--out", type=path_argument, metavar="PNG", help="draw stacked bars into this file (default: none)"
    )


def _check_picture(path: Path) -> None:
    """Refuses the path of a picture that could not be written, or would be one under another kind's name."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: name a file in it, such as {path / 'plan.png'}")
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: the picture is a PNG, so its name ends in .png")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")


def _run_plan(arguments: argparse.Namespace) -> int:
    from codeparrot_ds.ds_config.file import GPU_PRECISIONS
    from codeparrot_ds.ds_config.precision import device_precisions
    from codeparrot_ds.memory import device as device_memory
    from codeparrot_ds.memory.choice import choices_of
    from codeparrot_ds.memory.plan import as_json, describe, plan_of

    if arguments.out is not None:
        _check_picture(arguments.out)
    device = devices.smallest_gpu() if arguments.device_memory is None else None
    memory = device[1] if device else None
    if arguments.device_memory is not None:
        memory = device_memory.parse_memory(arguments.device_memory)
    if arguments.calibrate is not None:
        overhead, measured = device_memory.calibrate(find_run(arguments.calibrate))
        path = device_memory.save_overhead(overhead, measured)
        said = f"calibrated: overhead per rank, in addition to tensors: {overhead}; kept in {path}, remove to undo"
        print(said, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.model is None:
        if arguments.calibrate is not None:
            return 0
        raise UserError(f"nothing to plan: name a model, such as {PROGRAM} plan large --world-size 8")
    with progress_line("traces") as progress:
        plan = plan_of(arguments, memory, device_memory.load_overhead(), lambda done, all_: progress("", done, all_))
    # Of a GPU that is not here nothing but its memory is known.
    chosen = choices_of(plan, device_precisions("cuda")[0] if device else GPU_PRECISIONS[0])
    if arguments.json:
        print(json.dumps(as_json(plan) | {"chosen": chosen}, indent=2))
    else:
        says = "on {world_size} rank(s) train chooses {config}, micro-batch {micro_batch_size}, unless they are named"
        print("\n".join([describe(plan), "", *(says.format(**each) for each in chosen)]).rstrip())
    if arguments.out is not None:
        from codeparrot_ds.report.plan_chart import draw_plan

        arguments.out.write_bytes(draw_plan(plan))
    return 0
