"""What a GPU session measures in a process that imports torch once: a rank that works on one order after another.

Orders come as lines of JSON on standard input, results go as lines of JSON to the file descriptor that is the first
argument; what anything prints goes to the session's log. Training is that of ``codeparrot-ds train``: the product's
set-up, step and meter, so that a lever is a change of the run config. Two engines live side by side while a lever is
compared with the run as it is, window by window.

After an item that failed in an unforeseen way the process ends: what the item left on the device would be measured with
the next one. The session starts another.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]  # instead of this folder
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # as in `codeparrot_ds.train`: the profiler reports each of its stages

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from codeparrot_ds.config.run_config import RunConfig  # noqa: E402
from codeparrot_ds.errors import UserError  # noqa: E402
from codeparrot_ds.metrics import TrainingRow  # noqa: E402
from codeparrot_ds.model.shapes import find_shape  # noqa: E402
from codeparrot_ds.training.loop import Observer, train_session, train_step  # noqa: E402
from session.pages import loss_gap  # noqa: E402

ON_GPU = torch.cuda.is_available()
LOSSES = ("causal_lm_loss", "chunked_lm_loss", "fused_lm_loss")  # of model/loss.py, as far as this checkout has them
LEFT_BYTES = 2e9  # that an item may leave on the device before the next one gets a fresh process

Order = dict[str, Any]
Emit = Callable[..., None]


# --------------------------------------------------------------------------------------------------------------------
# Training


class Training(Observer):
    """A run of ``codeparrot-ds train`` in this process, from one logged step to the next."""

    def __init__(self, fields: Order, patch: Callable[[Any], None] | None = None) -> None:
        from codeparrot_ds.training.setup import start_session

        started = time.perf_counter()
        self.fields, self.before_bytes = fields, allocated()
        self.is_compiled = patch is not None
        self.session = start_session(RunConfig(**fields))
        if patch is not None:
            patch(self.session.engine.module)
        self.is_compiled |= self.session.config.compile
        self._batches: Iterator[Any] = iter(self.session.loader)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.start_seconds = time.perf_counter() - started
        self._left = time.perf_counter()

    def logged(self, row: TrainingRow) -> None:
        self.rows.append(row.as_json())

    def window(self) -> dict[str, Any]:
        """Trains to the next step that is logged, and returns its row; ``memory_bytes`` is this run's alone."""
        session = self.session
        session.meter.pause(time.perf_counter() - self._left)  # in which another run had the device
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(session.config.log_steps):
            self.step += 1
            train_step(session, self._batches, self.step, self)
        self._left = time.perf_counter()
        if ON_GPU:
            self.rows[-1]["memory_bytes"] -= self.before_bytes
        return self.rows[-1]

    @property
    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in self.rows}

    def close(self) -> None:
        """Ends the run without a checkpoint, and gives back what it has of the device."""
        session = self.session
        del self.session, self._batches
        session.finish(self.step, "stopped")
        session.engine.destroy()
        del session
        release(compiled=self.is_compiled)


class Bench:
    """What lives on from one item to the next: the run as it is, beside which levers are measured."""

    def __init__(self, more_seconds: Callable[[float], None]) -> None:
        self._more_seconds = more_seconds
        self.baseline: Training | None = None
        self._started = 0

    def keep(self, fields: Order) -> Training:
        """The run of these fields, after its warm-up; started where it is not there, in time of its own."""
        if self.baseline is None or without_name(self.baseline.fields) != without_name(fields):
            started = time.perf_counter()
            self.rest()
            self._started += 1
            # Each start is a run of its own, also that of a process which follows one that broke.
            self.baseline = Training(fields | {"run_name": f"as-it-is-{os.getpid()}-{self._started}"})
            self.baseline.window()
            self._more_seconds(time.perf_counter() - started)
        return self.baseline

    def rest(self) -> None:
        """Ends what lives."""
        if self.baseline is not None:
            self.baseline.close()
            self.baseline = None


def without_name(fields: Order) -> Order:
    return {name: value for name, value in fields.items() if name not in ("run_name", "profile")}


def allocated() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else 0


def release(*, compiled: bool = False) -> None:
    """Gives back the memory of what nothing refers to any more; ``compiled``: and torch.compile begins anew.

    It compiles a function for a few models and then, without a word, no more.
    """
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def train_windows(bench: Bench, order: Order, emit: Emit) -> None:
    """A run, window by window; against the run as it is, where the order names one, in turns with it."""
    patch = PATCHES[order["patch"]]() if order["patch"] else None
    base = bench.keep(order["against"]) if order.get("against") else None
    if base is None:
        bench.rest()
    run = Training(order["fields"], patch)
    for _ in range(order["warmup"]):  # the compiler's time and the profile are in it
        emit(start_seconds=run.start_seconds, warmup=run.window())
    if base is not None and base.is_compiled:
        base.window()  # the item before may have had everything compiled anew
    for _ in range(order["windows"]):
        emit(window=run.window(), **({} if base is None else {"baseline": base.window()}))
    same_rows = base is not None and base.fields["global_batch_size"] == order["fields"]["global_batch_size"]
    emit(losses=run.losses, loss_gap=loss_gap(run.losses, base.losses) if base is not None and same_rows else None)
    session = run.session
    emit(
        parameters=session.run.parameters,
        flops_per_token=session.meter.flops_per_token,
        peak_flops=session.meter.peak_flops,
        precision=session.run.precision,
        zero_stage=session.run.zero_stage,
        profile=read_if_there(session.folder.path / "profile" / "profile.json"),
        # Beside another run the device counts what both take.
        memory=read_if_there(session.folder.path / "run.json").get("memory") if base is None else None,
    )
    if order.get("keep_files") and session.ranks.is_main:
        keep_files(session.folder.path, Path(order["keep_files"]))
    if order.get("keep"):
        bench.baseline = run
    else:
        run.close()


def keep_files(run: Path, place: Path) -> None:
    """What a plan is calibrated from: the run's folder without checkpoints and trace."""
    names = ["run.json", "config.yaml", "ds_config.json", "metrics.jsonl", "profile/profile.json"]
    for name in names:
        if (run / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / name, place / name)


def read_if_there(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def compiled_loss() -> Callable[[Any], None]:
    def patch(model: Any) -> None:
        model.loss_function = torch.compile(model.loss_function)

    return patch


def liger_loss() -> Callable[[Any], None]:
    """Liger's kernel, which writes the gradient over the logits."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError as error:
        raise UserError(f"no Liger here: {error}") from error

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        return liger_cross_entropy(logits.view(-1, vocab_size), targets, ignore_index=-100)

    def patch(model: Any) -> None:
        model.loss_function = loss

    return patch


PATCHES = {"compiled loss": compiled_loss, "liger": liger_loss}


def resume(bench: Bench, order: Order, emit: Emit) -> None:
    """A run to its end, and again from its checkpoint in the middle: the losses after it are the very same."""
    bench.rest()
    fields = order["fields"]
    folder = Path(fields["output_dir"]) / fields["run_name"]
    train_to_the_end(fields)
    whole = losses_of(folder)
    emit(losses=whole)
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder / "checkpoints" / f"step-{fields['max_train_steps']:08d}")
    torch.distributed.barrier()
    train_to_the_end(fields)
    again = losses_of(folder)
    emit(losses_again=again, loss_gap=loss_gap(again, whole), equal=again == whole)
    torch.distributed.barrier()
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder)


def train_to_the_end(fields: Order) -> None:
    """`codeparrot_ds.training.loop.train`, and the engine's hooks taken away, which would keep all of the run alive."""
    from codeparrot_ds.training.setup import start_session

    session = start_session(RunConfig(**fields))
    train_session(session)
    session.engine.destroy()
    del session
    release()


def losses_of(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def memory(bench: Bench, order: Order, emit: Emit) -> None:
    """Some steps of a config, and what its plan said beside what the device counts."""
    bench.rest()
    emit(left_before_bytes=allocated())
    run = Training(order["fields"])
    emit(row=run.window(), memory=read_if_there(run.session.folder.path / "run.json").get("memory"))
    run.close()


def peer(bench: Bench, order: Order, emit: Emit) -> None:
    """A loop of peer_loops.py, in turns with the run as it is."""
    import peer_loops

    base = bench.keep(order["against"])
    if base.is_compiled:
        base.window()  # as in `train_windows`
    before = allocated()
    options = peer_loops.parse_arguments(order["arguments"])
    rows = peer_loops.load_rows(options)
    tokens = peer_loops.rows_per_step(options) * options.seq_length
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as log_dir:
        steps = peer_loops.run_loop(options, rows, log_dir)
        for number in range(order["windows"] + 1):
            baseline = base.window() if number else None
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            step = next(steps)
            losses[(number + 1) * options.log_steps] = step.loss
            window = {"tokens_per_second": tokens / step.seconds, "step_seconds": step.seconds, "loss": step.loss}
            if ON_GPU:
                window["memory_bytes"] = torch.cuda.max_memory_allocated() - before
            emit(**({"window": window, "baseline": baseline} if number else {"warmup": window}))
        steps.close()
    emit(losses=losses, loss_gap=loss_gap(losses, base.losses))
    del steps
    release(compiled=True)


# --------------------------------------------------------------------------------------------------------------------
# Ceilings: what the device does with the very shapes of a step


def timed(work: Callable[[], Any], seconds: float) -> float:
    """Mean seconds of a call, over about so many seconds, after two that do not count."""
    for _ in range(2):
        work()
    count = 1
    while True:
        wait()
        started = time.perf_counter()
        for _ in range(count):
            work()
        wait()
        took = time.perf_counter() - started
        if took >= seconds or count >= 1000:
            return took / count
        count = min(1000, int(count * max(2.0, 1.2 * seconds / max(took, 1e-6))) + 1)


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def device_name() -> str:
    return "cuda" if ON_GPU else "cpu"


def products(bench: Bench, order: Order, emit: Emit) -> None:
    """The matrix products of a micro-batch in bf16, as the model makes them: forward, by its input, by its weight."""
    shape = find_shape(order["model"], vocab_size=order["vocab_size"], seq_length=order["seq_length"])
    tokens, d = order["rows"] * order["seq_length"], shape.n_embd
    layers = shape.n_layer
    # Name, input and output features, how often; GPT-2's own weights are (in, out), the head's (vocabulary, in).
    matrices = [("qkv", d, 3 * d, layers), ("attention out", d, d, layers), ("mlp in", d, 4 * d, layers)]
    matrices += [("mlp out", 4 * d, d, layers), ("head", d, shape.vocab_size, 1)]
    total = flops = 0.0
    for name, inputs, outputs, times in matrices:
        x, dy = (torch.randn(tokens, size, device=device_name(), dtype=torch.bfloat16) for size in (inputs, outputs))
        stored = (outputs, inputs) if name == "head" else (inputs, outputs)
        weight = torch.randn(stored, device=device_name(), dtype=torch.bfloat16)
        matrix = weight.t() if name == "head" else weight
        ways = {"forward": lambda x=x, m=matrix: x @ m, "by its input": lambda dy=dy, m=matrix: dy @ m.t()}
        ways["by its weight"] = (
            (lambda x=x, dy=dy: dy.t() @ x) if name == "head" else (lambda x=x, dy=dy: x.t() @ dy)
        )  # fmt: skip
        for way, work in ways.items():
            seconds = timed(work, order["seconds"])
            total += times * seconds
            flops += times * 2 * tokens * inputs * outputs
            emit(
                product={
                    "name": f"{name}, {way}",
                    "size": [tokens, inputs, outputs],
                    "tflops": 2e-12 * tokens * inputs * outputs / seconds,
                    "seconds_per_micro_batch": times * seconds,
                }
            )
    emit(micro_batch_seconds=total, tflops=flops / total / 1e12)


def passes(bench: Bench, order: Order, emit: Emit) -> None:
    """Copies, softmax and the loss over the vocabulary: bytes per second."""
    from codeparrot_ds.model import loss as module

    seconds = copy_seconds(order["copy_bytes"], order["seconds"])
    bytes_per_second = 2 * order["copy_bytes"] / seconds
    emit(measured={"name": "copy", "seconds": seconds, "tb_per_second": 1e-12 * bytes_per_second})
    rows, seq, vocab = order["rows"], order["seq_length"], order["vocab_size"]
    logits = torch.randn(rows, seq, vocab, device=device_name(), dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (rows, seq), device=device_name())
    seconds = timed(lambda: torch.log_softmax(logits.detach(), -1, dtype=torch.float32), order["seconds"])
    moved = 6 * logits.numel()  # bf16 in, fp32 out
    emit(measured={"name": "log-softmax in fp32", "seconds": seconds, "tb_per_second": 1e-12 * moved / seconds})

    def forward_and_backward(loss: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def work() -> None:
            logits.grad = None
            loss(logits, labels, vocab).backward()

        return work

    losses = {name: vars(module)[name] for name in LOSSES if name in vars(module)}
    if ON_GPU:  # a CPU's compiler takes longer than all of this
        losses["causal_lm_loss, compiled"] = torch.compile(module.causal_lm_loss)
    for name, loss in losses.items():
        seconds = timed(forward_and_backward(loss), order["seconds"])
        per_logit = bytes_per_second * seconds / logits.numel()  # that a copy moves in this time
        emit(measured={"name": f"{name}, forward and backward", "seconds": seconds, "bytes_per_logit": per_logit})


def copy_seconds(num_bytes: int, seconds: float) -> float:
    a = torch.randn(num_bytes // 4, device=device_name())
    b = torch.empty_like(a)
    return timed(lambda: b.copy_(a), seconds)


def attention(bench: Bench, order: Order, emit: Emit) -> None:
    """Causal attention by each of PyTorch's backends, forward and backward; which one runs, a profile says."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = find_shape(order["model"], vocab_size=order["vocab_size"], seq_length=order["seq_length"])
    size = (order["rows"], shape.n_head, order["seq_length"], shape.n_embd // shape.n_head)
    q, k, v = (
        torch.randn(size, device=device_name(), dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )  # fmt: skip
    gradient = torch.randn(size, device=device_name(), dtype=torch.bfloat16)
    # Causal: half of two products forward, and of five backward.
    flops = 7 * size[0] * size[1] * size[2] ** 2 * size[3]

    def work() -> None:
        q.grad = k.grad = v.grad = None
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)

    backends = [backend for backend in SDPBackend.__members__.values() if backend not in (SDPBackend.ERROR,)]
    for backend in (*backends, None):
        if backend is not None and "OVERRIDEABLE" in backend.name:
            continue
        name = "by default" if backend is None else backend.name.lower()
        try:
            if backend is None:
                seconds = timed(work, order["seconds"])
            else:
                with sdpa_kernel(backend):
                    seconds = timed(work, order["seconds"])
        except RuntimeError as error:  # this device or shape has no such kernel: that is the result
            emit(backend={"name": name, "failure": str(error).splitlines()[0][:200]})
            continue
        emit(backend={"name": name, "seconds": seconds, "tflops": 1e-12 * flops / seconds})


def device(bench: Bench, order: Order, emit: Emit) -> None:
    """What torch says of the device."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "import_seconds": order["ready"],
        "threads": torch.get_num_threads(),
    }
    if ON_GPU:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory}
        facts |= {"multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda}
        facts |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    emit(**facts)


def rest(bench: Bench, order: Order, emit: Emit) -> None:
    """Leaves the device to another process."""
    bench.rest()
    release()


ITEMS = {
    "attention": attention,
    "device": device,
    "memory": memory,
    "passes": passes,
    "peer": peer,
    "products": products,
    "rest": rest,
    "resume": resume,
    "train": train_windows,
}


# --------------------------------------------------------------------------------------------------------------------
# One order after another


def main() -> int:
    results, ready = int(sys.argv[1]), time.perf_counter() - STARTED

    def send(**fields: Any) -> None:
        os.write(results, (json.dumps(fields) + "\n").encode())

    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    bench = Bench(lambda seconds: send(more_seconds=seconds))
    send(ready=ready)
    for line in sys.stdin:
        order = json.loads(line) | {"ready": ready}
        try:
            ITEMS[order["does"]](bench, order, lambda **part: send(part=part))
            end = {"end": "done"}
        except UserError as error:
            end = {"end": "failed", "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            send(end="failed", error=describe(error), leaves=True)
            return 1
        left = allocated() - (0 if bench.baseline is None else baseline_bytes(bench.baseline))
        send(**end, leaves=left > LEFT_BYTES)
        if left > LEFT_BYTES:
            print(f"{left / 1e9:.1f} GB are left on the device; the next item gets a fresh process", flush=True)
            return 0
    return 0


def baseline_bytes(baseline: Training) -> int:
    """What the kept run holds between its steps: parameters, gradients, masters and Adam's states, at most 20 bytes."""
    return 20 * baseline.session.run.parameters


def describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    from codeparrot_ds.supervision.process_end import end_process

    code = main()
    from codeparrot_ds.engine.ranks import leave_ranks

    leave_ranks()
    end_process(code)
