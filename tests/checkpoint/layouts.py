"""Engines that are saved at one layout and reopened at another: the layouts, what ranks do with them, what must hold.

A layout is a DeepSpeed config at a world size. A job is what ranks do with one: save it, reopen what another saved.
``run_plans`` starts ranks (``layout_ranks.py``) that do jobs one after another, and ``Results`` holds their answers to
account. The model is tiny and odd: its partitions cut parameters in the middle and end in padding at two and three
ranks, and at stage 3 its matrices are shared out.

What a reopened engine is compared with:

- **State.** Masters and both moments, bit for bit, against those gathered from the engine that was saved (rounded to
  nearest where the reopened engine keeps bf16 states); Adam's step counter and the learning rate exactly; the working
  weights against the masters, rounded, bit for bit.
- **Losses, the same arithmetic.** The next 10 against those of the saved engine, which simply went on: equal at the
  same layout, within ``FP32_TOLERANCE`` in fp32. In bf16 another layout adds gradients up in another order and rounds
  each sum to 8 bits: two runs from one state part by up to ``BF16_BAND``, whether one of them was reopened or not.
- **Losses, another precision.** The run that was saved cannot be the reference: fp32 weights rounded to bf16 give
  other losses with nothing wrong. Compared is a plain PyTorch loop in the new precision, from the same masters, moments
  and step (``plain_continuation``), that knows nothing of DeepSpeed and of checkpoints and rounds what the reopened
  engine keeps in bf16. In fp32 it stays within ``PLAIN_TOLERANCE`` of every engine, in bf16 within ``BF16_BAND``.

``CONTROLS`` are continuations from a damaged state: what the comparison shows when a moment is lost.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.config.schedule import learning_rate_factor
from codeparrot_ds.ds_config.facts import TORCH_DTYPES, precision, zero_stage
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.model.shapes import GPT2Shape

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = str(Path(__file__).with_name("layout_ranks.py"))
# 15 and 61 are odd and 61 is prime: no parameter but the position embeddings divides by two or three ranks.
SHAPE = GPT2Shape(n_layer=2, n_embd=15, n_head=3, vocab_size=61, n_positions=16)
# Large enough that a rank's group of Adam's states goes to the disk: DeepSpeed keeps those below 1 MiB in memory.
NVME_SHAPE = GPT2Shape(n_layer=2, n_embd=173, n_head=1, vocab_size=61, n_positions=16)
SEQ_LENGTH = 16
SAVED_AT, COMPARED_STEPS = 6, 10
BETAS = (0.9, 0.999)
FP32_TOLERANCE = 2e-6
PLAIN_TOLERANCE = 5e-6
BF16_BAND = 5e-3

NATIVE = "native:"
TOKENIZER = "tokenizer"
"""Beside the plans: the folder of what all exports have."""
WORLD_SIZES = (1, 2, 3)
STAGES = [f"zero{stage}{suffix}" for suffix in ("", "_fp32") for stage in range(4)]
OFFLOADED = ["zero2_offload", "zero3_offload", "zero2_offload_fp32", "zero3_offload_fp32"]
CONTROLS = {"first moment lost": "exp_avg", "second moment lost": "exp_avg_sq", "step counter lost": "step"}
"""What is zero in the state that a control continues from."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A DeepSpeed config at a world size, written ``zero2_fp32@3``.

    A ``native`` one, ``native:zero2_fp32@3``, is saved by ``engine.save_checkpoint``, and the checkpoint imported.
    """

    name: str
    world_size: int
    native: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        name, _, world_size = text.removeprefix(NATIVE).partition("@")
        return cls(name, int(world_size), text.startswith(NATIVE))

    def __str__(self) -> str:
        return f"{NATIVE if self.native else ''}{self.name}@{self.world_size}"

    @property
    def title(self) -> str:
        """For people: ``zero2_fp32-on-3``, ``native-zero2_fp32-on-3``."""
        return f"{'native-' if self.native else ''}{self.name}-on-{self.world_size}"

    @property
    def precision(self) -> str:
        return precision(ds_config_of(self.name))

    @property
    def arithmetic(self) -> tuple[str, str]:
        """What decides the losses from a state, up to the order of sums: precision, and that of masters and moments."""
        states = next((ending for ending in ("_bf16_states", "_bf16_masters") if self.name.endswith(ending)), "")
        return self.precision, states

    @property
    def shape(self) -> GPT2Shape:
        return NVME_SHAPE if self.name.endswith(("_nvme", "_infinity", "_large")) else SHAPE


def ds_config_of(name: str) -> dict[str, Any]:
    """A shipped DeepSpeed config, or one of the combinations that have no file of their own.

    ``…_large`` is the same config, for the larger model that NVMe takes; ``…_offload_fp32`` the fp32 file with the
    other's offload block; ``…_bf16_masters`` is ``…_bf16_states`` with Adam's moments in fp32; ``…_round_robin`` has
    ``round_robin_gradients``; ``…_torch_adam`` has PyTorch's AdamW.
    """
    name = name.removesuffix("_large")
    if name.endswith("_offload_fp32"):
        config = ds_config_of(name.replace("_offload", ""))
        zero = ds_config_of(name.removesuffix("_fp32"))["zero_optimization"]
        config["zero_optimization"] |= {key: zero[key] for key in zero if key.startswith("offload")}
        return config
    if name.endswith("_bf16_masters"):
        config = ds_config_of(name.replace("_bf16_masters", "_bf16_states"))
        del config["bf16"]["bf16_optimizer_states"]
        return config
    if name.endswith("_round_robin"):
        config = ds_config_of(name.removesuffix("_round_robin"))
        config["zero_optimization"]["round_robin_gradients"] = True
        return config
    if name.endswith("_torch_adam"):
        config = ds_config_of(name.removesuffix("_torch_adam"))
        config["optimizer"]["params"]["torch_adam"] = True
        return config
    config = copy.deepcopy(open_ds_config(name).config)
    zero = config["zero_optimization"]
    # The files with bf16 states have another beta2: after 6 steps that alone changes the next ones a lot.
    config["optimizer"]["params"]["betas"] = list(BETAS)
    if zero_stage(config) == 3:
        # As in a real model, matrices are shared out and biases are not, and a rank's parameters are several groups.
        zero["stage3_param_persistence_threshold"] = 100
        zero["sub_group_size"] = 2500
    return config


def run_config(world_size: int, *, dropout: float = 0.0, accumulation: int | None = None) -> RunConfig:
    """12 rows per step, cut differently at each world size; or ``accumulation`` micro-batches of 2 rows a rank."""
    micro = 2 if accumulation else {1: 4, 2: 3, 3: 2}[world_size]
    return RunConfig(
        global_batch_size=micro * world_size * accumulation if accumulation else 12,
        micro_batch_size=micro,
        seq_length=SEQ_LENGTH,
        learning_rate=5e-3,
        num_warmup_steps=3,
        max_train_steps=40,
        dropout=dropout,
    )


# --------------------------------------------------------------------------------------------------------------------
# Jobs


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing that the ranks of a layout do."""

    do: str
    layout: str
    source: str = ""
    """The layout whose checkpoint is taken."""
    kept_in_bf16: str = ""
    control: str = ""


def save_job(layout: Layout) -> Job:
    """Train, save, go on."""
    return Job("save", str(layout))


def reopen_job(source: Layout, target: Layout) -> Job:
    """Reopen what ``source`` saved at ``target`` and train on."""
    return Job("reopen", str(target), str(source))


def exact_job(layout: Layout) -> Job:
    """Stop and go on at the same layout, with dropout."""
    return Job("exact", str(layout))


def native_job(layout: Layout) -> Job:
    """Save as DeepSpeed does and read that."""
    return Job("native", str(layout))


def failing_job(layout: Layout) -> Job:
    """Fail to save and go on."""
    return Job("failing", str(layout))


def plain_job(source: Layout, target: Layout, control: str = "") -> Job:
    """Continue from what ``source`` saved in the precision and with the model of ``target``, without DeepSpeed."""
    name = "zero0" if target.precision == "bf16" else "zero0_fp32"
    if target.shape is NVME_SHAPE:
        name += "_large"
    return Job("plain", f"{name}@1", str(source), target.arithmetic[1], control)


def needs_plain(source: Layout, target: Layout) -> bool:
    """Whether the saved run itself cannot be the reference, for want of the same arithmetic."""
    return source.arithmetic != target.arithmetic


def pair_jobs(source: Layout, target: Layout) -> list[Job]:
    """All that a pair takes, with the reference of its losses."""
    plain = [plain_job(source, target)] if needs_plain(source, target) else []
    return [save_job(source), reopen_job(source, target), *plain]


# --------------------------------------------------------------------------------------------------------------------
# What the results are held to


class Results:
    """The finished jobs, and what is wrong with them."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.answers = answers
        self._by_job = {
            Job(**{key: value for key, value in answer.items() if key != "result"}): answer["result"]
            for answer in answers
        }

    def of(self, job: Job) -> dict[str, Any]:
        """What a job found."""
        return self._by_job[job]

    def reference(self, source: Layout, target: Layout) -> list[float]:
        """The losses that a reopened engine is compared with."""
        if needs_plain(source, target):
            return self.of(plain_job(source, target))["losses"]
        return self.of(save_job(source))["next_losses"]

    def loss_difference(self, source: Layout, target: Layout) -> float:
        """The largest difference of a pair's next losses."""
        return _largest(self.of(reopen_job(source, target))["losses"], self.reference(source, target))

    def control_difference(self, source: Layout, target: Layout, control: str) -> float:
        """The same for a continuation from a damaged state."""
        return _largest(
            self.of(plain_job(source, target, control))["losses"], self.of(plain_job(source, target))["losses"]
        )

    def problems_of_source(self, source: Layout) -> list[str]:
        """What is wrong with what a layout exported, in words."""
        export = self.of(save_job(source))["export"]
        problems = [f"export differs in {name}" for name in export["differing"]]
        dtype = f"torch.{TORCH_DTYPES[source.precision]}"
        if export["dtypes"] != [dtype]:
            problems.append(f"export is in {export['dtypes']}, not {dtype}")
        if export["evaluation_difference"] > 1e-6:
            problems.append(f"evaluation loss of the export is off by {export['evaluation_difference']:.1e}")
        return problems

    def problems_of_pair(self, source: Layout, target: Layout) -> list[str]:
        """What is wrong with a reopened checkpoint, in words."""
        result = self.of(reopen_job(source, target))
        problems = [f"{name} differs" for name in result["differing"]]
        problems += [f"working weight of {name} differs" for name in result["differing_weights"]]
        config = run_config(1)
        factor = learning_rate_factor("cosine", SAVED_AT, config.num_warmup_steps, config.max_train_steps)
        expected = {"optimizer_step": SAVED_AT, "global_steps": SAVED_AT, "learning_rate": 5e-3 * factor}
        problems += [f"{key} is {result[key]}" for key, value in expected.items() if result[key] != value]
        difference, limit = self.loss_difference(source, target), loss_limit(source, target)
        if not difference <= limit:
            problems.append(f"losses differ by {difference:.1e}, more than {limit:.0e}")
        return problems

    def problems_of_exact(self, layout: Layout) -> list[str]:
        """What is wrong with a run that stopped and went on at the same layout, in words."""
        result = self.of(exact_job(layout))
        problems = []
        for which, same_end in zip(("saved", "resumed"), result["same_ends"], strict=True):
            pairs = enumerate(zip(result["losses"], result[which], strict=True), start=1)
            different = [step for step, (loss, other) in pairs if loss != other]
            if different:
                problems.append(f"the run that was {which} has other losses from step {different[0]} on")
            if not same_end:
                problems.append(f"the run that was {which} ends with another state")
        return problems


def loss_limit(source: Layout, target: Layout) -> float:
    """How far the next losses of a pair may be off."""
    if source == target:
        return 0.0
    if source.arithmetic == target.arithmetic == ("fp32", ""):
        return FP32_TOLERANCE
    return PLAIN_TOLERANCE if target.arithmetic == ("fp32", "") else BF16_BAND


def pair_class(source: Layout, target: Layout) -> str:
    """The row of a table that a pair belongs to."""
    if source == target:
        return f"same layout, {source.precision}"
    return " → ".join(f"{layout.precision}{layout.arithmetic[1].replace('_', ' ')}" for layout in (source, target))


def _largest(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Starting the ranks


def plans_of(jobs: Iterable[Job]) -> dict[int, list[Job]]:
    """The jobs by the number of ranks that do them, each once: what saves comes before what waits for a checkpoint."""
    plans: dict[int, list[Job]] = {}
    first = {"save": 0, "reopen": 1}
    for job in sorted(dict.fromkeys(jobs), key=lambda job: first.get(job.do, 2)):
        plans.setdefault(Layout.parse(job.layout).world_size, []).append(job)
    if len(plans) > 1 and all(job.do == "plain" for job in plans.get(1, [])):
        # They need no ranks: the others do them as well, and a process less is started.
        plain = plans.pop(1, [])
        plans[min(plans)] += plain
    return plans


def run_plans(
    plans: dict[int, list[Job]], folder: Path, *, timeout: float, tell: Callable[[int], None] = lambda count: None
) -> Results:
    """Runs the jobs of every world size, all world sizes at once.

    A job that needs another's checkpoint waits for it, whichever ranks save it: plans must save before they reopen.

    Args:
        plans: jobs by world size.
        folder: for the checkpoints, new.
        timeout: seconds for all of it.
        tell: called with the number of finished jobs now and then.
    """
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    Tokenizer(models.BPE({"<|endoftext|>": 0}, [])).save(str(folder / TOKENIZER / "tokenizer.json"))
    processes, answers = [], {}
    for world_size, jobs in plans.items():
        (folder / f"plan-{world_size}.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        answers[world_size] = folder / f"answers-{world_size}.jsonl"
        answers[world_size].write_text("")
        port = _free_port()
        for rank in range(world_size):
            environment = _rank_environment(rank, world_size, port)
            log = (folder / f"log-{world_size}-{rank}").open("w")
            command = [sys.executable, RANKS, str(folder / f"plan-{world_size}.json"), str(answers[world_size])]
            processes.append(
                (log.name, subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log))
            )
            log.close()
    try:
        _wait(processes, timeout, lambda: tell(sum(path.read_text().count("\n") for path in answers.values())))
    finally:
        for _, process in processes:
            process.kill()
            process.wait()
    return Results([json.loads(line) for path in answers.values() for line in path.read_text().splitlines()])


def _wait(processes: list[tuple[str, subprocess.Popen]], timeout: float, tell: Callable[[], None]) -> None:
    end = time.monotonic() + timeout
    running = processes
    while running:
        for log, process in running:
            if process.poll():
                tail = Path(log).read_text()[-4000:]
                raise RuntimeError(f"{Path(log).name} ended with {process.returncode}:\n{tail}")
        running = [(log, process) for log, process in running if process.poll() is None]
        if time.monotonic() > end:
            tails = "\n".join(f"{Path(log).name}: {Path(log).read_text()[-1000:]}" for log, _ in running)
            raise TimeoutError(f"ranks were not done after {timeout} s:\n{tails}")
        tell()
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }


def source_folder(folder: Path, layout: Layout | str) -> Path:
    """Where a layout's checkpoint, its state and its losses lie."""
    return folder / str(layout)
