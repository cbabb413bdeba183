"""This process as one rank of the run: memory, threads, products, process group, and which run it is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from codeparrot_ds.checkpoint.run_folder import new_run_name, with_checkpoint
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.engine.engine import keep_freed_pages
from codeparrot_ds.engine.hardware import rank_precisions
from codeparrot_ds.engine.operators import use_operators_folder
from codeparrot_ds.engine.ranks import Ranks, join_ranks
from codeparrot_ds.launch.preflight import for_ranks, preflight
from codeparrot_ds.model.products import multiply_in_fp32_where_needed
from codeparrot_ds.resolved_run import ResolvedRun


def join_as_rank() -> Ranks:
    """Prepares this process and joins the others; collective."""
    keep_freed_pages()
    if "OMP_NUM_THREADS" not in os.environ:
        # Otherwise every rank would use all cores and oversubscribe the machine.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, usable_cores() // ranks_here))
    use_operators_folder(os.environ)
    ranks = join_ranks()
    if ranks.device.type == "cpu":
        multiply_in_fp32_where_needed(torch.bfloat16)  # DeepSpeed trains no fp16 where a CPU has none
    return ranks


def agree_on_run(given: RunConfig | ResolvedRun, ranks: Ranks) -> ResolvedRun:
    """The run, the same on every rank: what the command made, or what rank 0 makes; collective.

    Rank 0's name, paths and precision count: another rank may have another working directory, its host another home.
    """
    mine = given if isinstance(given, ResolvedRun) else None

    def decide() -> dict[str, Any]:
        nonlocal mine
        precisions = rank_precisions(ranks.device)
        here = (ranks.world_size, ranks.device.type, precisions)
        # Where the command saw other devices than the ranks have (GPUs of a hostfile), it decided for the wrong ones.
        if mine is None or (mine.world_size, mine.device, mine.precisions) != here:
            config = with_checkpoint(_named(given if isinstance(given, RunConfig) else given.config))
            found = preflight(config, device=ranks.device.type, world_size=ranks.world_size, precisions=precisions)
            mine = for_ranks(found, config.tokenizer)
        return mine.as_json()

    content = ranks.on_main(decide)
    is_known = mine is not None and mine.as_json() == content
    return ranks.together(lambda: mine if mine is not None and is_known else ResolvedRun.from_json(content))


def _named(config: RunConfig) -> RunConfig:
    return config if config.run_name else dataclasses.replace(config, run_name=new_run_name(Path(config.output_dir)))
