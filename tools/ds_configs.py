"""Composes the shipped ``ds_configs/*.json`` from a few parts: ``python -m tools.ds_configs`` writes them.

The files are the product, plain JSON to read, copy and edit; this module only keeps them consistent and says which to
choose. Why each part has the values it has is told in ``ds_configs/README.md``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.ds_config.facts import offload_device, precision, zero_stage
from codeparrot_ds.ds_config.file import ds_configs_folder

TABLE_BEGIN, TABLE_END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One shipped file.

    Attributes:
        config: the DeepSpeed config.
        use: what it is for, and when to choose it.
        cost: what it costs, in time, memory, exactness or set-up.
        gpu_only: it does not train on a CPU.
        needs: what else it needs.
    """

    config: dict[str, Any]
    use: str
    cost: str
    gpu_only: bool = False
    needs: str = ""


# --------------------------------------------------------------------------------------------------------------------
# Parts


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


def _with(config: Mapping[str, Any], **blocks: Any) -> dict[str, Any]:
    """A copy of `config` with keys added: into a block that it has, or as a new one."""
    changed = copy.deepcopy(dict(config))
    for name, value in blocks.items():
        changed[name] = changed.get(name, {}) | value if isinstance(value, Mapping) else value
    return changed


_CPU = {"device": "cpu", "pin_memory": True}
_NVME_OPTIMIZER = {"device": "nvme", "nvme_path": "auto", "pin_memory": True, "buffer_count": 4}
_NVME_PARAMETERS = {"device": "nvme", "nvme_path": "auto", "pin_memory": True, "buffer_count": 5}
# Being there switches it on; a block of values that are all false would look as if it did not.
_CHECKPOINTING: dict[str, Any] = {}
_CPU_CHECKPOINTING = {"cpu_checkpointing": True}
_BF16_STATES = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


# --------------------------------------------------------------------------------------------------------------------
# The files


def _stages() -> dict[str, Entry]:
    # Traffic is what a rank of many sends of N gradients or weights: N to reduce-scatter or gather, 2N to all-reduce.
    # Stages 1 and 2 all-reduce whatever reduce_scatter says (stage_1_and_2.py, average_tensor, where
    # use_multi_rank_bucket_allreduce is on, its default), and gather the weights after the step. Stage 3 keeps gathered
    # weights from forward to backward within stage3_max_live_parameters. Counted on two gloo ranks.
    said = {
        0: (
            "plain data parallel; the model and Adam fit into each GPU with room to spare; the least traffic",
            "16 bytes per parameter on every rank, 24 while Adam steps; traffic 2N per step",
        ),
        1: (
            "optimizer states shared out; slow networks: traffic once per step, however many micro-batches it has",
            "every rank keeps whole gradients; traffic 3N per step",
        ),
        2: (
            "gradients shared out as well; the default on a CPU",
            "traffic 2N per micro-batch and N per step: with many of them on a slow network take stage 1",
        ),
        3: (
            "weights shared out as well: models that no single GPU holds",
            "traffic 2N per micro-batch; 3N for models above half of `stage3_max_live_parameters`, whose weights are "
            "gathered again for the backward pass",
        ),
    }
    return {f"zero{stage}": Entry(config=_config(stage), use=use, cost=cost) for stage, (use, cost) in said.items()}


def _precisions() -> dict[str, Entry]:
    entries = {}
    names: dict[str, tuple[int, dict[str, Any]]] = {f"zero{stage}": (stage, {}) for stage in range(4)}
    names["zero2_activation_checkpointing"] = (2, {"activation_checkpointing": _CHECKPOINTING})
    for name, (stage, blocks) in names.items():
        entries[f"{name}_fp16"] = Entry(
            config=_with(_config(stage, "fp16"), **blocks),
            use="GPUs without bf16 (before Ampere)",
            cost="the loss scale has to be found: the first steps are skipped, and some later ones",
            gpu_only=True,
        )
        entries[f"{name}_fp32"] = Entry(
            config=_with(_config(stage, "fp32"), **blocks),
            use="CPUs without bf16 instructions; reference runs: losses of all stages agree to 1e-5",
            cost="slow on GPUs; activations take twice the memory",
        )
    return entries


def _accumulations() -> dict[str, Entry]:
    fp32 = {"grad_accum_dtype": "fp32"}
    use = "more than about 64 micro-batches a step, whose sum bf16 would round"
    return {
        "zero1_fp32_accumulation": Entry(
            config=_with(_config(1), data_types=fp32),
            use=f"{use}; reduced once a step",
            cost="4 bytes a parameter more than `zero1`, on every rank; another optimizer class (`BF16_Optimizer`)",
        ),
        "zero2_fp32_accumulation": Entry(
            config=_with(_config(2), data_types=fp32),
            use=f"{use}; the memory of stage 2",
            cost="2 bytes a parameter more than `zero2`, shared out; reduced with every micro-batch",
        ),
    }


def _bf16_states() -> dict[str, Entry]:
    cost = "updates below 1/512 of a weight are rounded away: small learning rates stall; compare losses first"
    # With a beta2 of 0.999 the second moment would lose a thousandth a step, less than bf16 can express: nothing.
    optimizer = {"params": _optimizer()["params"] | {"betas": [0.9, 0.95]}}
    return {
        "zero2_bf16_states": Entry(
            config=_with(_config(2), bf16=_BF16_STATES, optimizer=optimizer),
            use="no fp32 copy anywhere: 6 bytes a parameter to share out, not 12; where `zero2` just does not fit",
            cost=cost,
        ),
        "zero3_bf16_states": Entry(
            config=_with(_config(3), bf16=_BF16_STATES, optimizer=optimizer),
            use="the same at stage 3, where `zero3` just does not fit",
            cost=cost,
        ),
        "zero2_offload_bf16_states": Entry(
            config=_with(_config(2, offload_optimizer=_CPU), bf16=_BF16_STATES, optimizer=optimizer),
            use="`zero2_offload` where CPU memory is short: 10 bytes a parameter, not 18",
            cost=cost,
        ),
    }


def _offloads() -> dict[str, Entry]:
    nvme3 = _config(3, sub_group_size=100_000_000, offload_optimizer=_NVME_OPTIMIZER)
    return {
        "zero2_offload": Entry(
            config=_config(2, offload_optimizer=_CPU),
            use="one GPU or a few, whose memory holds the weights and gradients but not Adam: try this offload first",
            cost="CPU Adam sets the pace; 18 bytes of CPU memory a parameter, over all ranks",
        ),
        "zero3_offload_optimizer": Entry(
            config=_config(3, offload_optimizer=_CPU),
            use="the same with the weights shared out over several GPUs",
            cost="CPU Adam sets the pace; weights travel between the GPUs",
        ),
        "zero3_offload": Entry(
            config=_config(3, offload_optimizer=_CPU, offload_param=_CPU),
            use="weights in CPU memory too: the least GPU memory",
            cost="every weight crosses the bus twice a micro-batch; make micro-batches large",
        ),
        "zero3_nvme": Entry(
            config=nvme3 | {"zero_optimization": nvme3["zero_optimization"] | {"offload_param": _CPU}},
            use="Adam on NVMe, weights in CPU memory: when CPU memory is short too",
            cost="a step reads and writes 16 bytes a parameter on the disk",
            needs="libaio",
        ),
        "zero3_infinity": Entry(
            config=nvme3 | {"zero_optimization": nvme3["zero_optimization"] | {"offload_param": _NVME_PARAMETERS}},
            use="Adam and weights on NVMe: weights that CPU memory cannot hold, tens of billions of parameters",
            cost="1 GB of pinned buffers a rank, more than all but the largest GPT-2 weighs; bound by the disk",
            needs="libaio",
        ),
    }


def _activations() -> dict[str, Entry]:
    third = "a third more compute"
    return {
        "zero2_activation_checkpointing": Entry(
            config=_with(_config(2), activation_checkpointing=_CHECKPOINTING),
            use="activations are what does not fit; the default of `large` on a CPU",
            cost=third,
        ),
        "zero3_activation_checkpointing": Entry(
            config=_with(_config(3), activation_checkpointing=_CHECKPOINTING),
            use="neither weights nor activations fit",
            cost=f"{third}; above half of `stage3_max_live_parameters` weights are gathered once more",
        ),
        "zero2_offload_activation_checkpointing": Entry(
            config=_with(_config(2, offload_optimizer=_CPU), activation_checkpointing=_CHECKPOINTING),
            use="a large model on one GPU: Adam on the CPU, activations recomputed",
            cost=f"{third}; CPU Adam sets the pace",
        ),
        "zero2_cpu_checkpointing": Entry(
            config=_with(_config(2), activation_checkpointing=_CPU_CHECKPOINTING),
            use="very long rows or many layers, where even the inputs of the layers do not fit",
            cost=f"{third}; each layer's input crosses the bus twice, and waits in CPU memory",
            gpu_only=True,
        ),
        "zero3_offload_cpu_checkpointing": Entry(
            config=_with(
                _config(3, offload_optimizer=_CPU, offload_param=_CPU), activation_checkpointing=_CPU_CHECKPOINTING
            ),
            use="all that can leave the GPU leaves it: the last resort on one GPU",
            cost=f"{third}; the bus sets the pace",
            gpu_only=True,
        ),
    }


def _communication() -> dict[str, Entry]:
    zero_pp: dict[str, Any] = {
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    return {
        "zero1_fp32_bf16_communication": Entry(
            config=_with(_config(1, "fp32"), communication_data_type="bf16"),
            use="fp32 runs over a slow network: gradients travel as bf16, once a step",
            cost="gradients are rounded to bf16 before they are summed over the ranks",
        ),
        "zero3_hpz": Entry(
            config=_config(3, zero_hpz_partition_size=8),
            use="stage 3 on several hosts with a slow network between them: weights cross it once a step",
            cost="a second copy of the weights within each host: 2 bytes a parameter, shared by its GPUs",
            needs="several hosts; `zero_hpz_partition_size` = GPUs a host; no offload",
        ),
        "zero3_quantized_weights": Entry(
            config=_config(3, zero_quantized_weights=True),
            use="stage 3 on one host whose GPUs have no NVLink: weights travel as int8, half the bytes",
            cost="weights are rounded to 8 bits for the forward and backward pass; compare losses first",
            gpu_only=True,
            needs="a width that is a multiple of 8 x ranks",
        ),
        "zero3_zeropp": Entry(
            config=_with(_config(3), zero_optimization=zero_pp, communication_data_type="fp16"),
            use="ZeRO++, all three: a quarter of stage 3's traffic between hosts; where `zero3_hpz` is not enough",
            cost="int8 weights and int4 gradients, the memory of `zero3_hpz`; compare losses with `zero3` first",
            gpu_only=True,
            needs="as `zero3_hpz`; a width that is a multiple of 8 x ranks",
        ),
    }


def _compiled() -> dict[str, Entry]:
    return {
        f"zero{stage}_deepcompile": Entry(
            config=_with(_config(stage), compile={"deepcompile": True}),
            use=use,
            cost="compilation at the start; young code, untried here: compare losses first",
            gpu_only=True,
            needs="the run's `--compile`",
        )
        for stage, use in (
            (2, "compiled runs on several GPUs: reductions start inside the one compiled backward pass, not after it"),
            (3, "compiled runs at stage 3: the compiler places the gathering, and keeps weights that fit"),
        )
    }


def groups() -> dict[str, dict[str, Entry]]:
    """The catalogue by heading."""
    return {
        "Stages, in bf16": _stages(),
        "Other precisions": _precisions(),
        "Gradients added up in fp32": _accumulations(),
        "Masters, gradients and Adam's moments in bf16": _bf16_states(),
        "Offload to CPU memory and NVMe": _offloads(),
        "Activation checkpointing": _activations(),
        "Slow networks": _communication(),
        "DeepCompile": _compiled(),
    }


def catalogue() -> dict[str, Entry]:
    """File name (without ``.json``) → config and what it is for."""
    return {name: entry for entries in groups().values() for name, entry in entries.items()}


def names_for_cpu() -> list[str]:
    """The files that train on a machine without a GPU."""
    return [name for name, entry in catalogue().items() if not entry.gpu_only]


# --------------------------------------------------------------------------------------------------------------------
# What is written


def table() -> str:
    """The Markdown tables of the shipped files, one a group."""
    return "\n\n".join(f"### {heading}\n\n{_group_table(entries)}" for heading, entries in groups().items())


def _group_table(entries: Mapping[str, Entry]) -> str:
    lines = [
        "| file | stage | precision | optimizer in | weights in | choose it for | it costs | needs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        where = [offload_device(entry.config, what) for what in ("optimizer", "parameters")]
        places = " | ".join({"none": "device", "cpu": "CPU", "nvme": "NVMe"}[device] for device in where)
        stage, dtype = zero_stage(entry.config), precision(entry.config)
        needs = "; ".join(part for part in ("GPU" if entry.gpu_only else "", entry.needs) if part)
        lines.append(f"| `{name}.json` | {stage} | {dtype} | {places} | {entry.use} | {entry.cost} | {needs} |")
    return "\n".join(lines)


def render(config: dict[str, Any]) -> str:
    """The text of a shipped file."""
    return json.dumps(config, indent=2) + "\n"


def render_readme(text: str) -> str:
    """`text` with its tables replaced by the current ones."""
    before, _, rest = text.partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_BEGIN}\n{table()}\n{TABLE_END}{after}"


def write_catalogue(folder: Path) -> None:
    """Writes every file of the catalogue and the tables of the README into `folder`."""
    for name, entry in catalogue().items():
        (folder / f"{name}.json").write_text(render(entry.config), encoding="utf-8")
    readme = folder / "README.md"
    readme.write_text(render_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_catalogue(ds_configs_folder())
