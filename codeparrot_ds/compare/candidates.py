"""A comparison on disk: what is compared, and what each trial gave. No torch here.

::

    DIR/comparison.json            what must stay the same when it continues, and the peak that MFU is held against
    DIR/ds_configs/<name>.json     the DeepSpeed JSON of each, as it was when the comparison began
    DIR/initial/                   the weights that all begin with
    DIR/perturbed-<precision>/     the same with rounding errors
    DIR/trials/<trial>/            config.yaml, orders.json, output.log, end.json, found.json, result.json
    DIR/runs/<trial>/              what a run leaves behind, less its checkpoint
    DIR/report.html, .md, .json

``result.json`` is the only state: a trial that has one is done, whatever became of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.compare.results import COMPARISON, FINISHED, RESULT, TrialResult
from codeparrot_ds.compare.verdict import coarser
from codeparrot_ds.config.run_config import FIELDS, PATH_FIELDS, SET_BY_COMPARE, RunConfig, with_absolute_paths
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.devices import local_ranks, smallest_gpu
from codeparrot_ds.ds_config.facts import precision, with_settled_precision, zero_stage
from codeparrot_ds.ds_config.file import open_ds_config
from codeparrot_ds.ds_config.foreign import import_ds_config
from codeparrot_ds.ds_config.lint import libaio_installed, lint
from codeparrot_ds.ds_config.precision import device_precisions
from codeparrot_ds.ds_config.resolve import resolve_ds_config
from codeparrot_ds.engine.operators import are_built
from codeparrot_ds.errors import UserError
from codeparrot_ds.json_files import parts_of, read_object
from codeparrot_ds.launch.preflight import check_named, check_run
from codeparrot_ds.memory.choice import config_fitting, memory_budget, micro_batch_sizes, with_choices
from codeparrot_ds.memory.device import load_overhead
from codeparrot_ds.memory.plan import predict
from codeparrot_ds.memory.workload import Memory
from codeparrot_ds.model.shapes import GPT2Shape, num_parameters
from codeparrot_ds.paths import did_you_mean
from codeparrot_ds.resolved_run import encoder_and_shape
from codeparrot_ds.terminal import gigabytes

# What all candidates of a comparison share; the rest of the run config may differ from one to the next.
SHARED = (
    *("model", "tokenizer", "data", "seq_length", "global_batch_size", "init_from", "output_dir", "run_name"),
    *("deepspeed", "resume", "hub", "wandb"),
)
SENSITIVITY = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a comparison was asked for."""

    configs: Sequence[str]
    """Each a file or shipped name, with ``,field=value`` for what of the run config it changes."""
    config: RunConfig
    """The run config that all share."""
    world_sizes: Sequence[int]
    micro_batch_sizes: Sequence[int] | None = None
    """Of every config; None for its own."""
    steps: int = 30
    """Of a trial, warm-up and scored."""
    warmup_steps: int = 5
    """Of them, not scored."""
    repeats: int = 2
    """Trials of each candidate."""
    parts_steps: int = 3
    """Taken apart after the first trial of each."""
    checkpoint: bool = True
    """Whether the first trial of each saves one."""

    def __post_init__(self) -> None:
        if self.steps <= self.warmup_steps:
            raise UserError(f"--steps {self.steps} leaves none after --warmup-steps {self.warmup_steps}")
        if self.steps > self.config.max_train_steps:
            raise UserError(
                f"--steps {self.steps} is more than the run's max_train_steps {self.config.max_train_steps}, "
                "which its schedule ends with"
            )

    def same(self) -> dict[str, Any]:
        """What must not change when a comparison continues."""
        shared = fields_of(with_absolute_paths(self.config))
        kept = {name: value for name, value in shared.items() if name not in SET_BY_COMPARE}
        return {"steps": self.steps, "warmup_steps": self.warmup_steps, "config": kept}


def fields_of(config: RunConfig) -> dict[str, Any]:
    """A run config for JSON, where a micro-batch that each candidate chooses is a word."""
    return dataclasses.asdict(config) | ({"micro_batch_size": "auto"} if config.auto_micro_batch else {})


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One DeepSpeed config on one number of ranks."""

    label: str
    """The config as the user wrote it, with its micro-batch where that is not the run's."""
    world_size: int
    ds_config: Path
    """The JSON in the comparison's folder."""
    config: RunConfig
    """Its run config, without a name."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """The resolved DeepSpeed config; empty where it could not be."""
    predicted: Memory | None = None
    """By the plan."""
    skipped: str | None = None
    """Why it is not run."""
    notes: Sequence[str] = ()
    """What the user should know of it."""
    repeats: int = 1
    """Trials of it."""

    @property
    def name(self) -> str:
        """With the ranks, for a reader."""
        return f"{self.label} on {self.world_size}"

    @property
    def slug(self) -> str:
        """The same as a file's name, and a run's."""
        return slug_of(self.name)


def slug_of(text: str) -> str:
    """A text as a run's name: letters, digits and dashes; a hash keeps what was cut or replaced apart."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", text.replace("..", ".")).strip("-.")
    if plain == text.replace(" ", "-") and len(plain) <= 60:
        return plain
    return f"{plain[:60].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


# --------------------------------------------------------------------------------------------------------------------
# Candidates


def parse_config(text: str) -> tuple[str, dict[str, Any]]:
    """``zero2,micro_batch_size=4`` as a name or path and fields of the run config.

    Raises:
        UserError: an unknown field, one that all configs share, or a value that it cannot have.
    """
    name, *assignments = text.split(",")
    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or key not in FIELDS:
            raise UserError(f"{text!r}: after the comma comes field=value of the run config{did_you_mean(key, FIELDS)}")
        if key in SHARED:
            raise UserError(f"{text!r}: {key} is the same for all configs of a comparison; give it as an option")
        fields[key] = _parsed(text, key, value)
    return name, fields


def _parsed(text: str, key: str, value: str) -> Any:
    known = FIELDS[key]
    try:
        parsed = value.lower() in ("true", "yes", "on", "1") if known.kind == "bool" else known.parse(value)
    except (ValueError, OverflowError):
        raise UserError(f"{text!r}: {key} must be {known.expected}, not {value!r}") from None
    problem = known.problem(parsed)
    if problem:
        raise UserError(f"{text!r}: {key} {problem}")
    return parsed


def with_nothing_open(config: RunConfig, *, named: bool, world_size: int, device: str, precision: str) -> RunConfig:
    """The run config that all share: on a GPU each config has the micro-batch that ``train`` would choose for it.

    Args:
        config: as given.
        named: whether DeepSpeed configs are; else a search begins with what ``train`` would choose.
        world_size: number of ranks.
        device: ``cpu`` or ``cuda``.
        precision: of the config that is chosen.
    """
    if device == "cuda" and not named and config.is_left_to_plan:
        check_named(config)
        return with_choices(config, world_size=world_size, device=device, precision=precision)
    left_open = device == "cuda" and "micro_batch_size" in config.open_fields and smallest_gpu() is not None
    return dataclasses.replace(config, micro_batch_size="auto").on_cpu() if left_open else config.on_cpu()


def candidates_of(request: Request, folder: Path, *, device: str) -> list[Candidate]:
    """Every config of a request at every number of ranks and micro-batch, checked and planned.

    Their JSONs are written into the folder. Why one cannot run is its ``skipped``.

    Raises:
        UserError: one was mistyped, is not there, or is no JSON: that is fixed before any is trained.
    """
    parsed = [(text, *parse_config(text)) for text in request.configs]
    names: dict[str, set[str]] = {}
    for _, name, _ in parsed:
        names.setdefault(Path(name).stem, set()).add(name)
    found: dict[str, Candidate] = {}
    for text, name, fields in parsed:
        base = Path(name).stem if len(names[Path(name).stem]) == 1 else name
        path, label = folder / "ds_configs" / f"{slug_of(base)}.json", base + text.removeprefix(name)
        found |= {each.name: each for each in _candidates_of(request, name, path, label, fields, device)}
    return list(found.values())


def _candidates_of(
    request: Request, name: str, path: Path, label: str, fields: Mapping[str, Any], device: str
) -> Iterator[Candidate]:
    """One config, which is kept at ``path``, at every number of ranks and micro-batch."""
    precisions = device_precisions(device)
    file = open_ds_config(name, precisions)
    try:
        imported = import_ds_config(with_settled_precision(file.config, precisions), request.config)
    except UserError as error:
        for size in request.world_sizes:
            yield Candidate(
                label=label, world_size=size, ds_config=Path(name), config=request.config, skipped=str(error)
            )
        return
    _keep(path, imported.config)
    shared = request.config.micro_batch_size
    for world_size, asked in itertools.product(request.world_sizes, request.micro_batch_sizes or (None,)):
        own = (asked, fields.get("micro_batch_size"), imported.micro_batch_size, shared)
        changed = {**fields, "micro_batch_size": next(size for size in own if size is not None)}
        candidate = Candidate(
            label=label if asked in (None, shared) else f"{label},micro_batch_size={asked}",
            world_size=world_size,
            ds_config=path,
            config=request.config,
            notes=tuple(imported.notes),
            repeats=request.repeats,
        )
        try:
            config = dataclasses.replace(request.config, **changed, deepspeed=str(path.absolute()))
            if config.auto_micro_batch:
                config = _with_largest_micro_batch(config, world_size, device)
                # Said in the name: where another is chosen one day, its trials are not taken for this one's.
                candidate = dataclasses.replace(candidate, label=f"{label},micro_batch_size={config.micro_batch_size}")
        except UserError as error:
            yield dataclasses.replace(candidate, skipped=str(error))
        else:
            candidate = dataclasses.replace(candidate, config=config)
            yield plan_candidate(candidate, imported.config, device=device)


def _with_largest_micro_batch(config: RunConfig, world_size: int, device: str) -> RunConfig:
    """What ``train`` makes of ``--micro-batch-size auto`` with this DeepSpeed config."""
    sizes, budget = micro_batch_sizes(config, world_size, device), memory_budget(device, world_size)
    return config_fitting(config, sizes, world_size=world_size, device=device, budget=budget)


def _keep(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a candidate's JSON; a comparison that continues must find what it began with."""
    if path.is_file():
        if read_object(path) != config:
            raise UserError(f"{path} differs from the config of that name as it is now: choose another --out")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_json(path, config)


def plan_candidate(candidate: Candidate, ds_config: Mapping[str, Any], *, device: str) -> Candidate:
    """A candidate with its resolved config and predicted memory, or with the reason why it is not run."""
    config, world_size = candidate.config, candidate.world_size
    _, shape = encoder_and_shape(config)
    try:
        config.gradient_accumulation_steps(world_size)
        findings = lint(
            ds_config,
            candidate.ds_config,
            config=config,
            device=device,
            world_size=world_size,
            parameters=num_parameters(shape),
            model_hidden_size=shape.n_embd,
            libaio=libaio_installed() or are_built(["async_io"]),
            precisions=device_precisions(device),
        )
        errors = [f"{finding.key}: {finding.message}" for finding in findings if finding.severity == "error"]
        if errors:
            raise UserError("; ".join(errors))
        resolved = resolve_ds_config(
            ds_config,
            config,
            world_size=world_size,
            model_hidden_size=shape.n_embd,
            nvme_path=candidate.ds_config.parent.parent / "nvme",
            source=candidate.ds_config,
            precisions=device_precisions(device),
        )
        predicted = predict(config, shape, resolved, world_size)
    except UserError as error:
        return dataclasses.replace(candidate, skipped=str(error))
    notes = [*candidate.notes, *(f"{finding.key}: {finding.message}" for finding in findings)]
    skipped = _why_not_here(predicted, world_size, device)
    return dataclasses.replace(candidate, resolved=resolved, predicted=predicted, notes=notes, skipped=skipped)


def local_world_size(device: str) -> int:
    """How many ranks are compared on this machine by default: two on a CPU that has the cores.

    One, as ``train`` has there, would have all of the model whatever the ZeRO stage.
    """
    return local_ranks(device) if device == "cuda" else min(2, usable_cores())


def _why_not_here(predicted: Memory, world_size: int, device: str) -> str | None:
    """Why this machine cannot run it: too few devices, or too little memory by the plan."""
    import psutil

    if device == "cuda":
        devices, gpu = local_ranks(device), smallest_gpu()
        if world_size > devices:
            return f"needs {world_size} GPUs and this machine has {devices}"
        needed = load_overhead().total(predicted.peak_bytes, world_size)
        if gpu is not None and needed > gpu[1]:
            return f"needs {gigabytes(needed)} per rank by the plan and {gpu[0]} has {gigabytes(gpu[1])}"
        host = world_size * predicted.host_bytes
    else:
        host = world_size * (predicted.peak_bytes + predicted.host_bytes)
    total = psutil.virtual_memory().total
    if host > total:
        return f"its tensors take {gigabytes(host)} of host memory by the plan and this machine has {gigabytes(total)}"
    return None


# --------------------------------------------------------------------------------------------------------------------
# On disk


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One start of one candidate; ``repeat`` counts from 0. A sensitivity run has the precision of its errors."""

    candidate: Candidate
    repeat: int
    perturbed: str | None = None

    @property
    def name(self) -> str:
        return (
            f"{SENSITIVITY}-{self.perturbed}-{self.candidate.slug}"
            if self.perturbed
            else f"{self.candidate.slug}-{self.repeat}"
        )


def open_folder(folder: Path, request: Request) -> None:
    """Makes a comparison's folder, or continues in it.

    Raises:
        UserError: the folder is another comparison, or something else.
    """
    path = folder / COMPARISON
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is no comparison and not empty: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, {"version": 1, **request.same()})
        return
    saved, now = read_object(path), request.same()
    with parts_of(path):
        then = {"steps": saved.get("steps"), "warmup_steps": saved.get("warmup_steps")}
        # Earlier versions lack the newest fields, and did what their defaults are.
        then |= {key: getattr(RunConfig().on_cpu(), key) for key in now["config"]} | saved.get("config", {})
    here = {"steps": now["steps"], "warmup_steps": now["warmup_steps"], **now["config"]}
    for key in PATH_FIELDS:  # earlier versions kept paths as they were typed
        if isinstance(typed := then.get(key), str):
            then[key] = FIELDS[key].absolute(typed)
    differing = [f"{key} was {then.get(key)!r} and is {here[key]!r}" for key in here if then.get(key) != here[key]]
    if differing:
        raise UserError(f"{folder} holds another comparison ({'; '.join(differing)}): choose another --out")


class Results:
    """What became of the trials of a comparison, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, trial: Trial) -> TrialResult | None:
        """The result of a trial; None while it has not been run to its end."""
        return TrialResult.read(self.folder / "trials" / trial.name / RESULT)

    def all(self) -> list[TrialResult]:
        """Of every trial that has ended, also of configs that are no longer compared."""
        found = (TrialResult.read(path) for path in self.folder.glob(f"trials/*/{RESULT}"))
        return [result for result in found if result is not None]

    def status(self, trial: Trial) -> str | None:
        """How a trial ended; None while it has not."""
        result = self.of(trial)
        return None if result is None else result.status

    def has_failed(self, candidate: Candidate) -> bool:
        """Whether a trial of a candidate did not finish; its other trials would hardly say more."""
        return any(self.status(trial) not in (None, FINISHED) for trial in trials_of(candidate))

    def forget_failures(self) -> None:
        """Removes the results of the trials that did not finish, so that they are run again."""
        for path in self.folder.glob(f"trials/*/{RESULT}"):
            result = TrialResult.read(path)
            if result is not None and result.status != FINISHED:
                path.unlink()


# --------------------------------------------------------------------------------------------------------------------
# What is run, in which order


def left_to_run(candidates: Sequence[Candidate], results: Results) -> list[Trial]:
    """The trials without a result, in the order of running; none of candidates of which one failed."""
    going = [each for each in candidates if each.skipped is None and not results.has_failed(each)]
    trials = all_trials(going, reference_of(candidates, results)) if going else []
    return [trial for trial in trials if results.status(trial) is None]


def trials_of(candidate: Candidate) -> list[Trial]:
    """All trials of one candidate."""
    return [Trial(candidate=candidate, repeat=repeat) for repeat in range(candidate.repeats)]


def all_trials(ready: Sequence[Candidate], reference: Candidate) -> list[Trial]:
    """Every trial in the order of running: forwards and backwards by turns, sensitivity runs after the first."""
    in_order = sorted(ready, key=lambda candidate: candidate != reference)  # the others keep their order
    trials = []
    for repeat in range(max(candidate.repeats for candidate in ready)):
        turn = in_order if repeat % 2 == 0 else in_order[::-1]
        trials += [Trial(candidate=candidate, repeat=repeat) for candidate in turn if repeat < candidate.repeats]
    return [trials[0], *sensitivity_trials(ready, reference), *trials[1:]]


def sensitivity_trials(ready: Sequence[Candidate], reference: Candidate) -> list[Trial]:
    """The reference once more for each precision that another config is judged in."""
    own = precision(reference.resolved)
    others = [candidate for candidate in ready if candidate != reference]
    needed = {coarser(precision(candidate.resolved), own) for candidate in others}
    return [Trial(candidate=reference, repeat=0, perturbed=name) for name in sorted(needed)]


def reference_of(candidates: Sequence[Candidate], results: Results) -> Candidate:
    """The config that losses are compared with: fp32 at stage 0 on the fewest ranks where given, else the first.

    One whose first trial did not finish leaves that to the next; where none did, it is the first after all.
    """
    ready = [candidate for candidate in candidates if candidate.skipped is None]
    ready.sort(key=lambda each: (not _is_plain(each), each.world_size if _is_plain(each) else 0))
    for candidate in ready:
        if results.status(Trial(candidate=candidate, repeat=0)) in (None, FINISHED):
            return candidate
    return ready[0]


def _is_plain(candidate: Candidate) -> bool:
    return precision(candidate.resolved) == "fp32" and zero_stage(candidate.resolved) == 0


# --------------------------------------------------------------------------------------------------------------------
# Checks


def check_data(config: RunConfig, folder: Path, *, device: str, world_size: int) -> None:
    """The launcher's checks of data, tokenizer, model and disk, once for all candidates.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_run(
        dataclasses.replace(config, run_name="check", output_dir=str(folder / "runs"), hub="off"),
        device=device,
        world_size=world_size,
    )


def model_shape(config: RunConfig) -> GPT2Shape:
    """The shape of a run's model, with its tokenizer's vocabulary."""
    return encoder_and_shape(config)[1]
