"""What Slurm sets in the environment of processes, for tests that stand in for ``srun`` with real processes."""

from __future__ import annotations

from collections.abc import Sequence


def batch(nodes: str, num_tasks: int, *, job: int) -> dict[str, str]:
    """Of a batch script, which is no task of ``srun``: on the first node, and once."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }


def step(nodes: str, tasks: Sequence[int], *, job: int, number: int = 0) -> list[dict[str, str]]:
    """Of each task of a step, in the order of their ranks: ``tasks[n]`` of them on node n."""
    shared = batch(nodes, sum(tasks), job=job) | {
        "SLURM_STEP_ID": str(number),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_TASKS": str(sum(tasks)),
        "SLURM_STEP_NUM_NODES": str(len(tasks)),
        "SLURM_NNODES": str(len(tasks)),
    }
    places = [(node, local) for node, count in enumerate(tasks) for local in range(count)]
    return [
        shared | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
        for rank, (node, local) in enumerate(places)
    ]
