"""Saving and restoring a run: ours against DeepSpeed's own checkpoint, PyTorch's distributed one, and the bare disk.

python benchmarks/checkpoint_speed.py --model gpt2 --rounds 5

Two ranks on gloo hold one real DeepSpeed engine. In each round every way saves the same state and restores it, one
after the other, in turn. Ours hashes, syncs and exports besides; DeepSpeed's own syncs nothing, so it is also timed
with a sync of its files. PyTorch's gets the same fragments under the same names. The host memory is what a rank's first
save in the background takes at most, above what the rank had before; nothing trains meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import REPOSITORY, record_parser, write_record

WORLD_SIZE = 2


def main() -> None:
    parser = record_parser(__doc__, name="checkpoint-cpu")
    parser.add_argument("--model", default="gpt2", help="a shape that `train` knows")
    parser.add_argument("--deepspeed", default="zero2", help="a shipped DeepSpeed config")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder, for the vocabulary and the export")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workdir", type=Path, help="folder on the disk to measure (default: a temporary one)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        work_as_rank(options)
        return
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        rounds = run_ranks([*sys.argv, "--workdir", folder])
    folder = write_record(
        options.name,
        title=f"Saving and restoring {options.model}, {options.deepspeed}, {WORLD_SIZE} ranks",
        text=table(rounds),
        raw=rounds,
        out=options.out,
    )
    print((folder / "README.md").read_text())


def run_ranks(command: list[str]) -> list[dict[str, float]]:
    """Starts the ranks and returns what rank 0 measured, a table a round."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, (os.cpu_count() or 1) // WORLD_SIZE))
    shared = {"WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    shared |= {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    rounds = []
    for line in processes[0].stdout or ():
        if line.startswith("{"):
            rounds.append(json.loads(line))
            print(len(rounds), {key: round(value, 2) for key, value in rounds[-1].items()}, flush=True)
    if any(process.wait() for process in processes):
        sys.exit("a rank failed")
    return rounds


def work_as_rank(options: argparse.Namespace) -> None:
    """One rank: an engine, a few steps so that the moments are full, and the rounds."""
    import torch
    import torch.distributed as dist

    from codeparrot_ds.config.run_config import RunConfig
    from codeparrot_ds.data.encoder import load_encoder
    from codeparrot_ds.ds_config.facts import zero_stage
    from codeparrot_ds.ds_config.file import open_ds_config
    from codeparrot_ds.ds_config.resolve import resolve_ds_config
    from codeparrot_ds.engine.engine import create_engine
    from codeparrot_ds.engine.operators import build_operators, use_operators_folder
    from codeparrot_ds.engine.ranks import join_ranks, leave_ranks
    from codeparrot_ds.model.gpt2 import build_model
    from codeparrot_ds.model.shapes import find_shape
    from codeparrot_ds.supervision.process_end import end_process

    use_operators_folder(os.environ)
    ranks = join_ranks()
    encoder = load_encoder(options.tokenizer)
    shape = find_shape(options.model, vocab_size=encoder.vocab_size, seq_length=64)
    config = RunConfig(global_batch_size=WORLD_SIZE, micro_batch_size=1, seq_length=64, num_warmup_steps=0)
    ds_config = resolve_ds_config(
        open_ds_config(options.deepspeed).config,
        config,
        world_size=WORLD_SIZE,
        model_hidden_size=shape.n_embd,
    )
    build_operators(ds_config, ranks.device.type)
    model = build_model(
        shape,
        eos_token_id=encoder.eos_token_id,
        seed=1,
        dropout=0.0,
        zero3_config=ds_config if zero_stage(ds_config) == 3 else None,
        device=ranks.device,
    )
    engine = create_engine(model, ds_config, config)
    for _ in range(2):
        ids = torch.randint(shape.vocab_size, (1, 64), device=ranks.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    ways = Ways(engine, ranks, options)
    for number in range(options.rounds + 1):
        measured = ways.round()
        if number and ranks.is_main:  # the first one fills caches and allocates buffers
            print(json.dumps(measured), flush=True)
    dist.barrier()
    leave_ranks()
    end_process(0)


@dataclasses.dataclass
class Ways:
    """The ways to save and restore, on one rank."""

    engine: Any
    ranks: Any
    options: argparse.Namespace
    extra: int | None = None

    def __post_init__(self) -> None:
        from codeparrot_ds.checkpoint.saver import CheckpointSaver

        self.folder = Path(self.options.workdir)
        self.own_group = self.ranks.with_own_group().control  # PyTorch's thread must not use the ranks' own either
        self.saver = CheckpointSaver(
            self.engine,
            self.ranks,
            self.folder / "ours",
            in_background=True,
            published=lambda *_: None,
            report=lambda _: None,
        )

    def round(self) -> dict[str, float]:
        """Every way once; seconds (and MB) by name, of the slower rank."""
        measured: dict[str, float] = {}
        self._clean()
        self._ours(measured)
        self._clean()
        self._deepspeed(measured)
        self._clean()
        self._distributed(measured)
        self._clean()
        self._disk(measured)
        slowest = self.ranks.gather(measured)
        return {key: max(one[key] for one in slowest) for key in measured}

    def _clean(self) -> None:
        def remove() -> None:
            for name in ("ours", "deepspeed", "distributed", "disk"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir()
            os.sync()

        self.ranks.on_main(remove)

    def _timed(self, work: Callable[[], Any]) -> float:
        self.ranks.gather(None)  # together
        started = time.perf_counter()
        work()
        self.ranks.gather(None)
        return time.perf_counter() - started

    def _ours(self, measured: dict[str, float]) -> None:
        from codeparrot_ds.checkpoint.export import Export
        from codeparrot_ds.checkpoint.saver import load_checkpoint
        from codeparrot_ds.checkpoint.state import RunState

        layout = {"world_size": WORLD_SIZE}
        state = RunState(step=1, tokens=1, data={}, layout=layout, evaluations=[], config={}, ds_config={})
        export = Export(
            model_config=self.engine.module.config,
            tokenizer=Path(self.options.tokenizer),
            dtype="bfloat16",
            card="",
            training_state={},
        )
        with OwnMemory() as memory:
            measured["ours: training waits"] = self._timed(lambda: self.saver.save(state, export))
            waited = self._timed(self.saver.wait)
        if self.extra is None:  # the buffer of the first save is kept for the next
            self.extra = memory.peak - memory.before
        measured["ours: host memory MB"] = self.extra / 1e6
        measured["ours: a rank's fragments MB"] = self._fragment_bytes() / 1e6
        measured["ours: save, until complete"] = measured["ours: training waits"] + waited
        outcome = self.saver.outcomes[-1]
        if outcome.checkpoint is None:
            raise RuntimeError(f"the save failed: {outcome.error}")
        checkpoint, rank = outcome.checkpoint, self.ranks.rank
        measured["ours: MB"] = outcome.num_bytes / 1e6
        damage: list[str] = []
        measured["ours: verify"] = self._timed(
            lambda: damage.extend(checkpoint.damage(share=rank, num_shares=WORLD_SIZE))
        )
        if damage:
            raise RuntimeError(damage[0])
        loading = self._timed(lambda: load_checkpoint(self.engine, self.ranks, checkpoint))
        measured["ours: restore, verified"] = measured["ours: verify"] + loading

    def _fragment_bytes(self) -> int:
        from codeparrot_ds.engine.fragments import owned_fragments

        return sum(
            tensor.nbytes
            for fragments in owned_fragments(self.engine)
            for fragment in fragments
            for tensor in fragment.tensors.values()
        )

    def _deepspeed(self, measured: dict[str, float]) -> None:
        folder = self.folder / "deepspeed"
        measured["DeepSpeed: save"] = self._timed(
            lambda: self.engine.save_checkpoint(str(folder), tag="step-1", save_latest=False)
        )
        measured["DeepSpeed: save, synced"] = measured["DeepSpeed: save"] + self._timed(lambda: self._sync(folder))
        measured["DeepSpeed: MB"] = _megabytes(folder)
        measured["DeepSpeed: restore"] = self._timed(lambda: self.engine.load_checkpoint(str(folder), tag="step-1"))

    def _distributed(self, measured: dict[str, float]) -> None:
        import torch.distributed.checkpoint as dcp

        from codeparrot_ds.checkpoint.tensor_files import fragment_entries
        from codeparrot_ds.engine.fragments import owned_fragments

        folder = str(self.folder / "distributed")
        (fragments,) = list(owned_fragments(self.engine)) or [[]]
        entries, tensors = fragment_entries(fragments)
        # Names differ between the ranks, so nothing is taken for a copy of another rank's.
        state = {entry.name: tensor for entry, tensor in zip(entries, tensors, strict=True)}
        measured["PyTorch distributed: save"] = self._timed(lambda: dcp.save(state, checkpoint_id=folder))
        measured["PyTorch distributed: MB"] = _megabytes(Path(folder))
        measured["PyTorch distributed: restore"] = self._timed(lambda: dcp.load(state, checkpoint_id=folder))
        self._clean()
        futures: list[Any] = []
        measured["PyTorch distributed: training waits"] = self._timed(
            lambda: futures.append(dcp.async_save(state, checkpoint_id=folder, process_group=self.own_group))
        )
        futures[0].result()

    def _disk(self, measured: dict[str, float]) -> None:
        """The bytes of this rank's share of our checkpoint, written and synced with nothing else to do."""
        content = os.urandom(1 << 20) * 8
        count = round(measured["ours: MB"] * 1e6 / WORLD_SIZE / len(content))

        def write() -> None:
            with (self.folder / "disk" / str(self.ranks.rank)).open("wb", buffering=0) as file:
                for _ in range(count):
                    file.write(content)
                os.fsync(file.fileno())

        measured["disk: write and sync as many bytes"] = self._timed(write)

    def _sync(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*"))[self.ranks.rank :: WORLD_SIZE]:
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


class OwnMemory:
    """Looks at this process's memory of its own (RssAnon) a thousand times a second, for as long as it is entered.

    Pages of mapped files do not count: the system takes them back when it needs them.
    """

    def __enter__(self) -> OwnMemory:
        self.before = self.peak = _own_bytes()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._left.wait(0.001):
            self.peak = max(self.peak, _own_bytes())


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def table(rounds: list[dict[str, float]]) -> str:
    """Medians, and ours against each other way, round by round."""
    lines = ["| | median | min - max |", "|---|---|---|"]
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        unit = "MB" if name.endswith("MB") else "s"
        lines.append(f"| {name} | {statistics.median(values):.2f} {unit} | {min(values):.2f} - {max(values):.2f} |")
    lines += ["", "| ratio in the same round | median | min - max |", "|---|---|---|"]
    for ours, other in (
        ("ours: host memory MB", "ours: a rank's fragments MB"),
        ("ours: save, until complete", "DeepSpeed: save"),
        ("ours: save, until complete", "DeepSpeed: save, synced"),
        ("ours: save, until complete", "PyTorch distributed: save"),
        ("ours: save, until complete", "disk: write and sync as many bytes"),
        ("ours: training waits", "DeepSpeed: save"),
        ("ours: training waits", "PyTorch distributed: training waits"),
        ("ours: restore, verified", "DeepSpeed: restore"),
        ("ours: restore, verified", "PyTorch distributed: restore"),
    ):
        ratios = [one[ours] / one[other] for one in rounds]
        lines.append(f"| {ours} / {other} | {statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
