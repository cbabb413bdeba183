"""Everything that a GPU can show of this project, in one command of ten minutes: a list of items in the order of worth.

    benchmarks/prepare_gpu_session.sh                    # once, where there is a network: wheels, corpus, tokenizer
    python3 benchmarks/gpu_session.py                    # on the GPU; needs neither network nor git
    python benchmarks/gpu_session.py --small --data CORPUS --tokenizer TOKENIZER      # dry run on a CPU

Each result is appended to ``results.jsonl`` of the record's folder as it comes, and README.md and raw.json are written
anew before and after each item: killed at any moment, the session leaves a valid record. Each item has a limit and a
failure of its own. Items that train share processes that import torch once (``session/items.py``, one per rank); what a
user types and loops that bring their own launcher run in processes of their own. What to bring: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from record import REPOSITORY, ask_gpus, last_words, record_folder, record_parser, write_record

sys.path[:0] = [str(REPOSITORY)]

from session.pages import median_of, text  # noqa: E402
from session.plan import ON_CPU, ON_GPU, Item, plan  # noqa: E402
from session.workers import Workers, end_group  # noqa: E402

from codeparrot_ds.supervision.process_end import signal_at_parents_end  # noqa: E402

WORKER = [sys.executable, str(REPOSITORY / "benchmarks" / "session" / "items.py")]
PEERS = str(REPOSITORY / "benchmarks" / "peer_loops.py")
TRAIN = [sys.executable, "-m", "codeparrot_ds", "train"]
WORKSPACE_BYTES = 55e9
LEAST_SECONDS = 5.0  # an item with less than this left is not begun
DEVICE = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm")
DEVICE += ("clocks.mem", "temperature.gpu", "pstate", "pcie.link.gen.max", "pcie.link.width.max")
SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu")


class Session:
    """The record's folder, the processes, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.folder = record_folder(options.name, options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = (self.folder / "results.jsonl").open("w", encoding="utf-8")
        self.log = (self.folder / "log.txt").open("w", encoding="utf-8")
        self.facts: dict[str, Any] = {}
        self.items: list[Item] = []
        self.samples: list[tuple[float, list[float]]] = []
        self._children: list[subprocess.Popen] = []
        self.workspace = tempfile.TemporaryDirectory(prefix="gpu-session-", dir=roomiest())
        self.environment = dict(os.environ)
        self.workers: Workers | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.options.seconds - self.elapsed

    # ---- before the list

    def prepare(self) -> None:
        """Wheels, what the device is, its clocks from now on, and operators that build while ceilings are measured."""
        # A driver that does not know one of these says nothing of any.
        self.facts["device"] = ask_gpus(*DEVICE) or ask_gpus(*DEVICE[:3])
        (self.folder / "calibration").mkdir(exist_ok=True)
        (self.folder / "calibration" / "device.json").write_text(json.dumps(self.facts["device"], indent=1) + "\n")
        site = bring_wheels(Path(self.options.bundle), Path(self.workspace.name) / "site", self.log)
        if site is not None:
            sys.path[:0] = [str(site)]
        paths = [str(REPOSITORY), *([str(site)] if site else []), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.options.small:  # on a busy machine threads mostly wait for each other, and a dry run measures nothing
            self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.environment["HF_HUB_OFFLINE"] = "1"  # no wait for a network that is not there
        self.facts["wheels"] = sorted(path.name for path in site.glob("*.dist-info")) if site else []
        self.facts["wheels_seconds"] = round(self.elapsed, 1)
        if self.options.ranks > 1 and self.facts["device"]:
            self.facts["topology"] = self.ask("nvidia-smi", "topo", "-m")
        self._follow_clocks()
        self._build_operators()
        self.workers = Workers(WORKER, self.options.ranks, self.environment, self.log)
        from codeparrot_ds.data.encoder import load_encoder  # only now: its packages may be among the wheels

        vocab_size = load_encoder(self.options.tokenizer).vocab_size
        self.items = plan(self.options, vocab_size=vocab_size, folder=self.folder, workspace=self.workspace.name)
        self.append({"session": self.facts})

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def start(self, command: list[str], **streams: Any) -> subprocess.Popen:
        """A process that ends with this one, however that ends."""
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=self.environment, start_new_session=True, text=True,
            preexec_fn=signal_at_parents_end(signal.SIGKILL, os.getpid()), **streams,
        )  # fmt: skip
        self._children.append(process)
        return process

    def _follow_clocks(self) -> None:
        """Samples clock, power and temperature twice a second, into ``clocks.csv``."""
        if not self.facts["device"]:
            return
        query = ["nvidia-smi", f"--query-gpu=index,{','.join(SAMPLED)}", "--format=csv,noheader,nounits", "-lms", "500"]
        sampler = self.start(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        def follow() -> None:
            with (self.folder / "clocks.csv").open("w", encoding="utf-8") as file:
                file.write(f"seconds,index,{','.join(SAMPLED)}\n")
                for line in sampler.stdout or ():
                    now, values = self.elapsed, [value.strip() for value in line.split(",")]
                    file.write(f"{now:.1f},{','.join(values)}\n")
                    file.flush()
                    with contextlib.suppress(ValueError):  # a GPU that does not say one of them: "[N/A]"
                        self.samples.append((now, [float(value) for value in values[1:]]))

        threading.Thread(target=follow, daemon=True).start()

    def _build_operators(self) -> None:
        """Builds what configs of the list need, the optimizer that all need first, beside the ceilings."""
        from codeparrot_ds.engine.operators import are_built

        if are_built(["fused_adam", "cpu_adam", "pin_memory", "async_io"]):
            return
        script = (
            "import sys\n"
            "from codeparrot_ds.ds_config.file import open_ds_config\n"
            "from codeparrot_ds.engine.operators import build_operators\n"
            "for name in ('zero1_fp32', 'zero2_offload', 'zero3_nvme'):\n"
            "    build_operators(open_ds_config(name, ('bf16', 'fp32')).config, sys.argv[1])\n"
            "    print('operators of', name, 'are built', flush=True)\n"
        )
        device = "cuda" if self.facts["device"] else "cpu"
        command = ["nice", "-n", "10", sys.executable, "-c", script, device]
        self.start(command, stdout=self.log, stderr=self.log)

    # ---- items

    def run(self, item: Item) -> None:
        """Runs one item within its limit and the session's, and keeps whatever came of it."""
        item.began, began = round(self.elapsed, 1), time.monotonic()
        seconds = min(item.limit, self.left)
        if item.lacks is not None:
            item.status, item.error = "not in this checkout", item.lacks
        elif seconds < LEAST_SECONDS:
            item.status, item.error = "no time left", f"{max(0.0, self.left):.0f} s were left of the session"
        else:
            item.status = "running"
            self.write()
            try:
                if item.peer is not None:
                    self._rest()
                    self.peer(item, min(item.limit, self.left))
                elif item.order is None:
                    self._rest()
                    self.story(item, min(item.limit, self.left))
                else:
                    assert self.workers is not None
                    item.error = self.workers.run(item.order, seconds, lambda part: self.keep(item, part), self.left)
            except ItemFailure as failure:
                item.error = str(failure)
            except Exception as error:  # an item's, and no reason to lose those that come after it
                item.error = f"{type(error).__name__}: {error}"
                self.log.write(traceback.format_exc())
            item.status = "done" if item.error is None else "failed"
        item.seconds = round(time.monotonic() - began, 1)
        during = [values for at, values in self.samples if item.began <= at <= self.elapsed]
        if during:
            item.device = dict(zip(SAMPLED, map(statistics.median, zip(*during, strict=True)), strict=True))
        self.append(item.as_json() | {"parts": None})
        self.write()

    def _rest(self) -> None:
        """Has the workers leave the device to another process."""
        assert self.workers is not None
        if not self.workers.alive:
            return
        error = self.workers.run({"does": "rest"}, 20, lambda part: None)
        if error is not None:
            self.workers.stop()

    def keep(self, item: Item, part: dict[str, Any]) -> None:
        """A part of an item's result: on the disk before the next one is measured."""
        item.parts.append(part)
        self.append({"name": item.name, "part": part})

    def append(self, line: dict[str, Any]) -> None:
        self.results.write(json.dumps(line) + "\n")
        self.results.flush()

    def write(self) -> None:
        """The record as it is now."""
        raw = {"session": self.facts | {"seconds": round(self.elapsed, 1)}, "items": [i.as_json() for i in self.items]}
        write_record(
            self.options.name, title=f"GPU session: {self.options.ranks} rank(s)",
            text=text(self.items, self.facts, self.options.sizes, self.elapsed, self.options.seconds), raw=raw,
            out=self.folder,
        )  # fmt: skip

    def command(self, command: list[str], seconds: float) -> str:
        """What a command printed; `ItemFailure` where it failed or took too long."""
        started = time.monotonic()
        with tempfile.TemporaryFile("w+") as errors:
            process = self.start(command, stdout=subprocess.PIPE, stderr=errors)
            try:
                printed, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                raise ItemFailure(f"not done in the {seconds:.0f} s that it had left") from None
            finally:
                end_group(process)
                errors.seek(0)
                said = errors.read()
                self.log.write(f"{' '.join(command)}: {time.monotonic() - started:.1f} s\n{said}")
                self.log.flush()
        if process.returncode != 0:
            raise ItemFailure(f"exit {process.returncode}: {last_words(said)}")
        return printed

    def peer(self, item: Item, seconds: float) -> None:
        """A peer in a process of its own, or under torchrun."""
        assert item.peer is not None
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.options.ranks}"]
        command = [sys.executable, *(launcher if item.peer[0] == "trainer" else []), PEERS, *item.peer]
        found = json.loads(self.command(command, seconds).splitlines()[-1])
        for speed, loss in zip(found["step_tokens_per_second"], found["losses"][1:], strict=False):
            memory = {} if found["memory_bytes"] is None else {"memory_bytes": found["memory_bytes"]}
            self.keep(item, {"window": {"tokens_per_second": speed, "loss": loss} | memory})
        self.keep(item, {"loop": found})

    def story(self, item: Item, seconds: float) -> None:
        """``train`` with its defaults to the end, and again from its checkpoint in the middle."""
        deadline, steps = time.monotonic() + seconds, self.options.sizes.story_steps
        folder = Path(self.workspace.name) / "story"
        command = [
            *(*TRAIN, *self.options.sizes.story, "--data", self.options.data, "--tokenizer", self.options.tokenizer),
            *("--num-gpus", str(self.options.ranks), "--max-train-steps", str(steps), "--log-steps", "1"),
            *("--save-checkpoint-steps", str(steps // 2), "--max-eval-steps", "4", "--wandb", "off"),
            *("--output-dir", self.workspace.name, "--run-name", folder.name),
        ]
        self.keep(item, {"command": command[2:]})
        self.command(command, deadline - time.monotonic())
        whole = self.story_rows(item, folder)
        shutil.rmtree(folder / "checkpoints" / f"step-{steps:08d}")
        self.command(command, deadline - time.monotonic())
        again = self.story_rows(item, folder)
        losses, losses_again = ({row["step"]: row["loss"] for row in rows} for rows in (whole, again))
        gap = max(abs(losses[step] - losses_again[step]) for step in losses)
        self.keep(item, {"loss_gap": gap, "equal": losses == losses_again})
        shutil.rmtree(folder)

    def story_rows(self, item: Item, folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "loss" in row]
        start = json.loads((folder / "run.json").read_text())["starts"][-1]
        speed = statistics.median(row["tokens_per_second"] for row in rows[-3:])
        figures = {"tokens_per_second": speed, "startup_seconds": start["startup_seconds"]}
        self.keep(item, {"run": figures, "losses": [row["loss"] for row in rows]})
        return rows

    def close(self) -> None:
        """Ends everything that was started."""
        if self.workers is not None:
            self.workers.stop()
        for process in self._children:
            end_group(process)
        self.workspace.cleanup()
        self.results.close()
        self.log.close()


class ItemFailure(Exception):
    """Why an item has no result, in one line."""


def roomiest() -> str:
    """A folder for what is not kept: a run of 1.5B parameters wants room for two checkpoints before it starts."""
    places = [tempfile.gettempdir(), "/dev/shm"]  # NVMe configs want a disk, so memory only where that is too small
    free = {place: shutil.disk_usage(place).free for place in places if os.access(place, os.W_OK)}
    return places[0] if free.get(places[0], 0) > WORKSPACE_BYTES else max(free, key=lambda place: free[place])


def bring_wheels(bundle: Path, site: Path, log: IO[str]) -> Path | None:
    """Installs the wheels of packages that this Python lacks into a folder of their own; None where it lacks none."""
    missing = []
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(wheel))
    if not missing:
        return None
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    answer = subprocess.run([*pip, "--target", str(site), *missing], stdout=log, stderr=log, check=False)
    if answer.returncode != 0:
        sys.exit(f"gpu_session: the wheels in {bundle / 'wheels'} do not install here: {log.name} says why")
    return site


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = record_parser(__doc__, name="gpu-session")
    parser.add_argument("--bundle", default=str(REPOSITORY / "gpu-session"), help="folder of prepare_gpu_session.sh")
    parser.add_argument("--data", help="corpus folder (default: the bundle's)")
    parser.add_argument("--tokenizer", help="tokenizer folder (default: the bundle's)")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, a rank on each")
    parser.add_argument(
        "--seconds", type=float, default=570, help="that the session may take; then the record is whole"
    )
    parser.add_argument("--patience", type=float, default=1.0, help="times the items' limits, on a busy machine")
    parser.add_argument("--small", action="store_true", help="the demo's shape on short rows: a dry run on a CPU")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="items whose name has one of these words in it")
    parser.add_argument("--list", action="store_true", help="print the items and end")
    options = parser.parse_args(arguments)
    options.bundle = os.path.abspath(options.bundle)
    options.sizes = ON_CPU if options.small else ON_GPU
    for name, folder in (("data", "corpus"), ("tokenizer", "tokenizer")):
        path = os.path.abspath(getattr(options, name) or os.path.join(options.bundle, folder))
        if not os.path.exists(path):
            parser.error(f"--{name} {path} is not there: make it with benchmarks/prepare_gpu_session.sh")
        setattr(options, name, path)
    gpus = len(ask_gpus("name"))
    if not gpus and not options.small and not options.list:
        parser.error("there is no GPU here (nvidia-smi names none); --small is a dry run on a CPU")
    if gpus and options.ranks > gpus:
        parser.error(f"--ranks {options.ranks}, and there are {gpus} GPU(s) here")
    commit_file = Path(options.bundle) / "COMMIT"
    if not (REPOSITORY / ".git").exists() and commit_file.is_file():
        os.environ.setdefault("COMMIT", commit_file.read_text().strip())
    return options


def main() -> int:
    options = parse_arguments()
    if options.list:
        for item in plan(options, vocab_size=32_768, folder=Path(), workspace=""):
            print(f"{item.limit:4.0f} s  {item.name}{f': {item.lacks}' if item.lacks else ''}")
        return 0
    session = Session(options)
    # A session that is asked to end does so as one whose time is up: through `finally`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        session.write()
        session.prepare()
        for item in session.items:
            session.run(item)
            windows = item.all("window")
            speed = f" {median_of(windows, 'tokens_per_second'):,.0f} tokens/s" if windows else ""
            print(f"{session.elapsed:5.0f} s  {item.name}: {item.status}{speed} {item.error or ''}", flush=True)
        session.facts["device_at_the_end"] = ask_gpus(*DEVICE)
        session.write()
    finally:
        session.close()
    print((session.folder / "README.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
