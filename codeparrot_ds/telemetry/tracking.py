"""What a run writes down: a log per rank, metrics.jsonl, TensorBoard, Weights & Biases, and the console.

``metrics.jsonl`` is the source of truth; the others repeat it. Rank 0 alone writes them; the other ranks log to their
own file and speak on the console only of errors.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import logging
import math
import netrc
import os
import shlex
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.run_folder import RunFolder
from codeparrot_ds.json_files import lines_of
from codeparrot_ds.metrics import EvaluationRow, TrainingRow, read_row
from codeparrot_ds.secret_forms import hide_secrets
from codeparrot_ds.terminal import duration

logger = logging.getLogger("codeparrot_ds")
WANDB_TIMEOUT_SECONDS = 60
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # wandb's cloud in ~/.netrc, by its old and its new name


class AboveTheBar:
    """Standard error as a stream whose lines come to stand above the bars that this process shows on a terminal."""

    def write(self, text: str) -> None:
        if not sys.stderr.isatty():
            sys.stderr.write(text)
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _WithoutSecrets(logging.Formatter):
    """Libraries log what they were given: URLs that are signed, environments, errors of a proxy with its password."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))


def set_up_logging(folder: Path, rank: int) -> Path:
    """Sends this rank's log records to ``log/debug_<rank>.log``; rank 0 shows progress, the others errors only.

    Returns:
        The log file.
    """
    (folder / "log").mkdir(parents=True, exist_ok=True)
    path = folder / "log" / f"debug_{rank}.log"
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler(AboveTheBar())
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console.setFormatter(_WithoutSecrets("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [file, console]
    others = logging.StreamHandler(AboveTheBar())
    others.setFormatter(_WithoutSecrets("%(message)s"))
    others.setLevel(logging.ERROR)
    # DeepSpeed reports every setting of the engine at INFO: to the file with it, the console is for the run's progress.
    for name in ("DeepSpeed", "transformers", "datasets", "huggingface_hub"):
        library = logging.getLogger(name)
        library.handlers = [file, others]
        library.propagate = False
    # Python's warnings (torch deprecates what DeepSpeed calls) go to the file alone.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [file]
    logging.getLogger("py.warnings").propagate = False
    return path


class Metrics:
    """``metrics.jsonl``: one JSON object per line, appended and flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate_after(self, step: int) -> None:
        """Drops the rows of steps that a restart will do again, and a line that a crash left half-written."""
        if self.path.is_file():
            durable.replace_file(self.path, self._kept(step))

    def _kept(self, step: int) -> Iterator[bytes]:
        part = bytearray()
        for line in lines_of(self.path):
            row = read_row(line)
            if row is not None and row["step"] <= step:
                part += line.rstrip(b"\n") + b"\n"
            if len(part) >= durable.PIECE:
                yield bytes(part)
                part.clear()
        yield bytes(part)

    def losses(self, points: int) -> list[tuple[int, float]]:
        """The training losses so far by step that are finite, thinned evenly to so many; the last is among them."""
        steps, losses = array("q"), array("d")
        for row in map(read_row, lines_of(self.path)):
            if row is not None and isinstance(row.get("loss"), (int, float)) and math.isfinite(row["loss"]):
                steps.append(row["step"])
                losses.append(row["loss"])
        # Counted from the end, so that the last one is among them.
        every = slice(None, None, -max(1, math.ceil(len(steps) / points)))
        return list(zip(steps[every][::-1], losses[every][::-1], strict=True))

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row; a number that JSON has no word for (NaN, infinity) becomes a string that ``float`` reads."""
        plain = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")


class Tracker:
    """Rank 0's record of a run; on the other ranks every method does nothing."""

    def __init__(
        self, folder: RunFolder, *, active: bool, mode: str, hyperparameters: dict[str, Any], last_step: int = -1
    ) -> None:
        """Opens TensorBoard and wandb, where ``active`` (on rank 0), and drops the rows after ``last_step``.

        Args:
            mode: ``auto``, ``online``, ``offline`` or ``off`` for wandb.
            hyperparameters: the run config and derived figures, flat.
            last_step: the last whose rows of earlier starts stay; -1 keeps none.
        """
        self.metrics = Metrics(folder.path / "metrics.jsonl")
        self.samples = Metrics(folder.path / "samples.jsonl")
        self.tensorboard: Any = None
        self._wandb: concurrent.futures.Future[Any] | None = None
        self._told_wandb: list[concurrent.futures.Future[None]] = []
        self._untold_wandb: list[Callable[[Any], Any]] = []
        self.hyperparameters = {key: value for key, value in hyperparameters.items() if value is not None}
        self.last_evaluation: EvaluationRow | None = None
        if active:
            from torch.utils.tensorboard import SummaryWriter

            for log in (self.metrics, self.samples):
                log.truncate_after(last_step)
            # A file of its own per start: its first event makes TensorBoard forget the later steps in those before.
            self.tensorboard = SummaryWriter(str(folder.path / "tensorboard"), purge_step=last_step + 1)
            # wandb takes seconds to start, longer without an answer from its server: training does not wait, nor for
            # what it is sent, and it starts beside the second step. One thread keeps the order.
            self._wandb_thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="wandb")
            self._start = functools.partial(_start_wandb, folder, mode, self.hyperparameters)

    @property
    def wandb(self) -> Any:
        """The wandb run, waiting for its start; None when it is off and on the other ranks."""
        return None if self.tensorboard is None else self._started_wandb().result()

    def _started_wandb(self) -> concurrent.futures.Future[Any]:
        """Starts wandb in its thread, if nothing has yet, and tells it what was kept for it."""
        if self._wandb is None:
            self._wandb = self._wandb_thread.submit(self._start)
            for tell in self._untold_wandb:
                self._to_wandb(tell)
        return self._wandb

    def train(self, row: TrainingRow) -> None:
        """Records a training row."""
        self._write(row, "train")
        if self.tensorboard is not None:
            self._started_wandb()

    def evaluation(self, row: EvaluationRow) -> None:
        """Records an evaluation row."""
        self.last_evaluation = row
        self._write(row, "validation")

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Records what the model wrote at an evaluation: ``samples.jsonl``, TensorBoard's text, a table of wandb's."""
        if self.tensorboard is None:
            return
        for row in rows:
            self.samples.append({"step": step, **row})
        texts = [
            f"{row.get('verdict', '')}\n\n```python\n{row['prompt']}{row['completion']}\n```".strip() for row in rows
        ]
        self.tensorboard.add_text("completions", "\n\n---\n\n".join(texts), step)

        def tell(run: Any) -> None:
            import wandb

            columns = ["step", "prompt", "completion", "log_probability", "parses", "verdict"]
            data = [[{"step": step, **row}.get(name) for name in columns] for row in rows]
            run.log({"completions": wandb.Table(columns=columns, data=data), "step": step})

        self._to_wandb(tell)

    def _write(self, measured: TrainingRow | EvaluationRow, group: str) -> None:
        if self.tensorboard is None:
            return
        row = measured.as_json() | {"time": time.time()}
        self.metrics.append(row)
        numbers = {
            f"{group}/{key}": value
            for key, value in row.items()
            if key not in ("step", "time") and isinstance(value, int | float)
        }
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, row["step"])
        self._to_wandb(lambda run: run.log(numbers | {"step": row["step"]}))

    def _to_wandb(self, tell: Callable[[Any], Any]) -> None:
        """Has the thread of wandb tell its run something, after all before; raises what went wrong with any of it."""
        while self._told_wandb and self._told_wandb[0].done():
            self._told_wandb.pop(0).result()
        started = self._wandb
        if started is None:
            self._untold_wandb.append(tell)
            return

        def work() -> None:
            run = started.result()
            if run is not None:
                tell(run)

        self._told_wandb.append(self._wandb_thread.submit(work))

    def close(self) -> None:
        """Writes the hyperparameters with the final figures and ends TensorBoard and wandb."""
        if self.tensorboard is None:
            return
        last = {} if self.last_evaluation is None else self.last_evaluation.as_json()
        figures = {
            f"final/{key}": float(value)
            for key, value in last.items()
            if key in ("eval_loss", "perplexity", "bits_per_byte") and value is not None
        }
        plain = {
            key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in self.hyperparameters.items()
        }
        # At its own step, so that the figures of the next start do not stand beside these at the same one.
        step = last.get("step")
        self.tensorboard.add_hparams(plain, figures, run_name=".", global_step=step)
        self.tensorboard.close()
        self._started_wandb()
        self._to_wandb(lambda run: run.finish())
        self._wandb_thread.shutdown()
        for told in self._told_wandb:
            told.result()


def _start_wandb(folder: RunFolder, mode: str, hyperparameters: dict[str, Any]) -> Any:
    if mode == "off" or (mode == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        logger.info("wandb: off")
        return None
    if mode == "auto":
        wished = os.environ.get("WANDB_MODE", "")
        mode = wished if wished in ("online", "offline") else "online" if _logged_in_to_wandb() else "offline"
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        init_timeout=WANDB_TIMEOUT_SECONDS,
        # It would upload the working directory's remote, of which it removes a password but no token in the place of
        # the user, and a patch of what is not committed.
        disable_git=True,
    )
    (folder.path / "wandb").mkdir(exist_ok=True)  # otherwise wandb turns to a temporary folder
    options: dict[str, Any] = {
        "project": "codeparrot-ds",
        "name": folder.name,
        "id": folder.record["id"],
        "resume": "allow",
        "dir": str(folder.path),
        "config": hyperparameters,
        "settings": settings,
    }
    try:
        run = wandb.init(mode=mode, **options)
    except (wandb.Error, TimeoutError) as error:
        if mode != "online":
            raise
        logger.warning("wandb: cannot reach the server (%s); continuing offline", error)
        wandb.teardown()  # Its service still holds the run's id and would refuse it.
        mode = "offline"
        run = wandb.init(mode=mode, **options)
    run.define_metric("*", step_metric="step")
    offline = shlex.quote(str(folder.path / "wandb"))  # the star is the shell's
    # In one command, since wandb syncs the parts of one run in their order, which is that of the run's starts.
    hint = "" if mode == "online" else f"; upload later with: wandb sync {offline}/offline-run-*"
    logger.info("wandb: %s, run %s%s", mode, folder.name, hint)
    return run


def warm_up() -> None:
    """Imports TensorBoard and wandb and starts wandb's service in the background, while the model is being built."""

    def work() -> None:
        import wandb
        from torch.utils import tensorboard  # noqa: F401

        wandb.setup()

    threading.Thread(target=work, name="tracking-warm-up", daemon=True).start()


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = [server.split("://")[-1].split("/")[0]] if server else WANDB_HOSTS
    try:
        credentials = netrc.netrc(os.environ.get("NETRC"))
        return any(credentials.authenticators(host) for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


LEAST_BAR, GOOD_BAR = 4, 14  # columns


class Bar:
    """A bar on a terminal with as many fields beside it as its width has room for; lines go above it."""

    def __init__(self, *, start: int, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=start, dynamic_ncols=True, file=sys.stderr, bar_format=bar_format(80, 0))

    @property
    def columns(self) -> int:
        """Of the terminal, as wide as it is now."""
        return int(self._bar.format_dict["ncols"] or 80)

    def show(self, done: int, fields: Sequence[str], more: Sequence[str] = ()) -> None:
        """Draws it anew; for the other arguments see `bar_format`."""
        self._bar.bar_format = bar_format(self.columns, int(self._bar.total), fields, more)
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Leaves it as it is; what follows goes below."""
        self._bar.close()


def bar_format(columns: int, total: int, fields: Sequence[str] = (), more: Sequence[str] = ()) -> str:
    """tqdm's ``bar_format`` for a terminal of so many columns: percentage, bar, counts, and the fields that fit.

    Args:
        columns: of the terminal.
        total: what the bar counts up to.
        fields: to be seen wherever a short bar leaves them room, the most important first.
        more: to be seen where a long one does.
    """
    text = ""
    room = columns - len(f"100%|| {total}/{total}")
    for least, chosen in ((LEAST_BAR, fields), (GOOD_BAR, more)):
        for field in chosen:
            if len(text) + len(f", {field}") > room - least:
                break
            text += f", {field}"
    escaped = text.replace("{", "{{").replace("}", "}}")
    return "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" + escaped


class Progress:
    """Rank 0's progress: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, *, active: bool, start: int, total: int) -> None:
        self.active = active
        self.total = total
        self.bar = Bar(start=start, total=total) if active and sys.stderr.isatty() else None

    def show(self, row: TrainingRow, eta_seconds: float) -> None:
        """Shows a training row, and the time that is left."""
        if not self.active:
            return
        loss, rate = f"loss {row.loss:.4f}", f"lr {row.learning_rate:.2e}"
        speed, left = f"{row.tokens_per_second:,.0f} tokens/s", f"{duration(eta_seconds)} left"
        if self.bar is not None:
            norm = [] if row.grad_norm is None else [f"gradient norm {row.grad_norm:.2f}"]
            self.bar.show(row.step, [loss, speed, left], [rate, *norm])
        else:
            logger.info("step %d/%d: %s, %s, %s, %s", row.step, self.total, loss, rate, speed, left)

    def say(self, message: str, *args: Any) -> None:
        """A line, above the bar where there is one."""
        if self.active:
            logger.info(message, *args)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
