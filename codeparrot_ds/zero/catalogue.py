"""Composes the shipped ``ds_configs/*.json`` from a few parts: ``python -m codeparrot_ds.zero.catalogue`` writes them.

The files are the product, plain JSON to read, copy and edit; this module only keeps them consistent. Why each part has
the values it has is told in ``ds_configs/README.md``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.zero.ds_config import ds_configs_folder, offload_device, precision, zero_stage

TABLE_BEGIN, TABLE_END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True)
class Entry:
    """One shipped file."""

    config: dict[str, Any]
    use: str


def _optimizer() -> dict[str, Any]:
    return {"type": "AdamW", "params": {"betas": [0.9, 0.999], "eps": 1e-8}}


def _precision(name: str) -> dict[str, Any]:
    blocks: dict[str, dict[str, Any]] = {
        "bf16": {"bf16": {"enabled": True}},
        "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}},
        "fp32": {},
    }
    return {**blocks[name], "data_types": {"grad_accum_dtype": name}}


def _zero(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"reduce_bucket_size": 50_000_000, "overlap_comm": True}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 10_000}
    return zero


def _config(stage: int, precision_name: str = "bf16", **zero: Any) -> dict[str, Any]:
    return {
        "zero_optimization": _zero(stage) | zero,
        **_precision(precision_name),
        "optimizer": _optimizer(),
    }


def _with_activation_checkpointing(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}}


def catalogue() -> dict[str, Entry]:
    """File name (without ``.json``) → config and what it is for."""
    stages = {
        0: "plain data parallel: everything on every rank; fastest when it fits",
        1: "optimizer states shared out; the speed of stage 0 for a fraction of its memory",
        2: "gradients shared out as well; the default",
        3: "weights shared out as well: models that no single GPU holds; pays with communication",
    }
    entries = {f"zero{stage}": Entry(_config(stage), use) for stage, use in stages.items()}
    for stage in stages:
        entries[f"zero{stage}_fp16"] = Entry(_config(stage, "fp16"), "GPUs without bf16; dynamic loss scaling")
        entries[f"zero{stage}_fp32"] = Entry(_config(stage, "fp32"), "reference runs and comparisons; slow")
    cpu = {"device": "cpu", "pin_memory": True}
    nvme = {"device": "nvme", "nvme_path": "auto", "pin_memory": True, "buffer_count": 4}
    entries["zero2_offload"] = Entry(
        _config(2, offload_optimizer=cpu), "optimizer in CPU memory: little GPU memory, CPU Adam sets the pace"
    )
    entries["zero3_offload"] = Entry(
        _config(3, offload_optimizer=cpu, offload_param=cpu),
        "optimizer and weights in CPU memory: the least GPU memory",
    )
    entries["zero3_nvme"] = Entry(
        _config(3, sub_group_size=100_000_000, offload_optimizer=nvme, offload_param=cpu),
        "optimizer on NVMe, weights in CPU memory: when CPU memory is short too",
    )
    for stage in (2, 3):
        entries[f"zero{stage}_activation_checkpointing"] = Entry(
            _with_activation_checkpointing(_config(stage)),
            "recomputes activations in the backward pass: a third more compute, far less memory",
        )
    return entries


def table() -> str:
    """The Markdown table of the shipped files."""
    lines = ["| file | stage | precision | optimizer in | weights in | for |", "|---|---|---|---|---|---|"]
    for name, entry in catalogue().items():
        where = [offload_device(entry.config, what) for what in ("optimizer", "parameters")]
        places = " | ".join({"none": "device", "cpu": "CPU", "nvme": "NVMe"}[device] for device in where)
        stage, dtype = zero_stage(entry.config), precision(entry.config)
        lines.append(f"| `{name}.json` | {stage} | {dtype} | {places} | {entry.use} |")
    return "\n".join(lines)


def render(config: dict[str, Any]) -> str:
    """The text of a shipped file."""
    return json.dumps(config, indent=2) + "\n"


def render_readme(text: str) -> str:
    """`text` with its table replaced by the current one."""
    before, _, rest = text.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_BEGIN}\n{table()}\n{TABLE_END}{after}"


def write_catalogue(folder: Path) -> None:
    """Writes every file of the catalogue and the table of the README into `folder`."""
    for name, entry in catalogue().items():
        (folder / f"{name}.json").write_text(render(entry.config), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(render_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_catalogue(ds_configs_folder())
