"""Checks a DeepSpeed JSON before anything runs: DeepSpeed itself ignores a mistyped key and trains on.

No torch and no DeepSpeed is imported: ``known_keys`` has every key that DeepSpeed reads with its type, ``reading``
compares a file with it, ``conflicts`` and ``inert`` have the rules between keys, and this module what has a form of its
own. Rules judge what ``resolve`` makes of the file: an ``"auto"`` is what it becomes, and is named with its line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.conflicts import CONFLICTS
from codeparrot_ds.ds_config.facts import leaves, value_at
from codeparrot_ds.ds_config.file import CPU_PRECISIONS, GPU_PRECISIONS, DsFile, line_of
from codeparrot_ds.ds_config.inert import INERT
from codeparrot_ds.ds_config.known_keys import DEEPSPEED_VERSION, RENAMED, KeyPath, Said
from codeparrot_ds.ds_config.reading import Reading, read_keys
from codeparrot_ds.ds_config.resolve import RUN_OWNED_KEYS, Resolved, fill, left_out, modern, nvme_folder, run_values
from codeparrot_ds.ds_config.rules import Rule, Subject, path_of
from codeparrot_ds.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (``error``) or does not do what it seems to (``warning``)."""

    file: str
    key: str
    severity: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.severity}: {self.key}: {self.message}"

    def as_json(self) -> dict[str, Any]:
        """The finding for tools."""
        return asdict(self)


def lint(
    ds_config: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    config: RunConfig | None = None,
    device: str = "cuda",
    world_size: int | None = None,
    parameters: int | None = None,
    model_hidden_size: int | None = None,
    libaio: bool | None = None,
    precisions: Sequence[str] | None = None,
    followed: Sequence[str] | None = None,
    lines: Mapping[KeyPath, int] | None = None,
    converted: Sequence[Said] = (),
) -> list[Finding]:
    """Everything wrong with `ds_config`, all at once, errors and warnings in the order of the file.

    Args:
        ds_config: what a JSON says.
        path: the file, for the findings.
        config: the run config; with it, keys of the run are compared with its values, and what only other programs
            need is judged.
        device: what the ranks will have, ``cpu`` or ``cuda``.
        world_size: number of ranks, where it is known.
        parameters: of the model, where it is known.
        model_hidden_size: the model's width, where it is known: ``"auto"`` bucket sizes follow it.
        libaio: whether this machine can build NVMe offloading (`libaio_installed`); None is not judged.
        precisions: that the device trains in, the fastest first; None: of any.
        followed: what ``"enabled": "auto"`` follows, first to last; None: the device's.
        lines: the line of each key.
        converted: what there is to say of values that were converted when the file was read (`DsFile`).
    """
    precisions = precisions or (CPU_PRECISIONS if device == "cpu" else GPU_PRECISIONS)
    reading = read_keys(ds_config)
    now, renamed = modern(reading.config)
    resolved, problems = fill(
        DsFile(Path(path), reading.config, {}, followed or precisions),
        config,
        world_size=world_size,
        model_hidden_size=model_hidden_size,
        nvme_path=nvme_folder(config) if config else None,
    )
    places = _Places(reading, renamed, resolved, dict(lines or {}))
    subject = Subject(
        config=resolved.config,
        written=now,
        autos={key: places.became(key) for key in resolved.autos},
        run=config,
        device=device,
        world_size=world_size,
        parameters=parameters,
        model_hidden_size=model_hidden_size,
        libaio=libaio,
        precisions=precisions,
    )
    said: list[Said] = [(key, "error", problem) for key, problem in problems]
    said += [*_two_names(reading.config, now), *_run_owned_keys(subject), *_missing_nvme_paths(subject)]
    if _stage_is_known(reading):
        for rule in (*CONFLICTS, *INERT):
            said += _apply(rule, subject)
    written = [(places.written(key), severity, message) for key, severity, message in said]
    findings = [
        Finding(os.fspath(path), ".".join(key), severity, message, places.line(key))
        for key, severity, message in [*converted, *_once([*reading.said, *written])]
    ]
    return sorted(findings, key=lambda finding: finding.line or 0)


def lint_file(file: DsFile, **known: Any) -> list[Finding]:
    """`lint` of a file as read, with the lines of its keys."""
    followed = None if file.precisions is None else file.followed
    read: dict[str, Any] = {
        "precisions": file.precisions,
        "followed": followed,
        "lines": file.lines,
        "converted": file.converted,
    }
    return lint(file.config, file.path, **read, **known)


def check_ds_config(file: DsFile, **known: Any) -> list[Finding]:
    """`lint_file` for a program that is about to use the file: returns the warnings.

    Raises:
        UserError: with all errors.
    """
    findings = lint_file(file, **known)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise UserError("; ".join(map(str, errors)))
    return findings


def version_notice() -> str | None:
    """What to say when another DeepSpeed is installed than the one whose keys are known here; None when it is that."""
    try:
        installed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None
    if installed.split("+")[0] == DEEPSPEED_VERSION:
        return None
    return f"checked against DeepSpeed {DEEPSPEED_VERSION}, but {installed} is installed: its keys may differ"


SYSTEM_HEADERS = (Path("/usr/include"), Path("/usr/local/include"))


def libaio_installed(system: Sequence[Path] = SYSTEM_HEADERS) -> bool:
    """Whether libaio's header, which DeepSpeed builds its NVMe reader with, is where a compiler looks."""
    paths = [os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")]
    folders = [*system, *(Path(part) for path in paths for part in path.split(":") if part)]
    if "CONDA_PREFIX" in os.environ:
        folders.append(Path(os.environ["CONDA_PREFIX"], "include"))
    return any((folder / "libaio.h").is_file() for folder in folders)


# --------------------------------------------------------------------------------------------------------------------
# Checks with a form of their own


def _two_names(ds_config: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Said]:
    """Old and new name of one key, which DeepSpeed takes one at a time."""
    zero = value_at(ds_config, ("zero_optimization",)) or {}
    pairs = [(old[-1], new[-1]) for old, new in RENAMED.items() if len(old) == 2]
    pairs += [(key, f"stage3_{key}") for key in zero]
    for old, new in pairs:
        if old in zero and new in zero:
            yield ("zero_optimization", old), "error", f"is given a second time as {new}; keep that one"
    if "bfloat16" in ds_config and "bf16" in ds_config:
        yield ("bfloat16",), "warning", "does nothing beside bf16, which DeepSpeed takes"


def _run_owned_keys(subject: Subject) -> Iterator[Said]:
    """Keys of a run that is not known, or whose value of them is not; `fill` compares the others."""
    known = run_values(subject.run, subject.world_size) if subject.run else {}
    for path, field in RUN_OWNED_KEYS.items():
        if path not in known and value_at(subject.written, path) not in (None, "auto"):
            yield path, "warning", f"belongs to the run config ({field}); a run with another value refuses this file"
    scheduler = value_at(subject.written, ("scheduler", "params")) or {}
    if subject.run is None and any(value != "auto" for _, value in leaves(scheduler)):
        message = "belongs to the run config (lr_scheduler_type, num_warmup_steps), and a run refuses it; remove it"
        yield ("scheduler",), "warning", message
    for block, why in left_out(subject.written).items():
        yield (block,), "warning", why


def _missing_nvme_paths(subject: Subject) -> Iterator[Said]:
    for what, block in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        path = ("zero_optimization", block, "nvme_path")
        if subject.on_nvme(what) and not value_at(subject.config, path):
            yield path, "error", 'is missing; write a folder, or "auto" for one in the run\'s folder'


# --------------------------------------------------------------------------------------------------------------------
# Rules


def _stage_is_known(reading: Reading) -> bool:
    """Whether the stage can be told: without it most rules would judge a config that nobody wrote."""
    stage = ("zero_optimization", "stage")
    wrong = {path for path, severity, _ in reading.said if severity == "error"}
    return value_at(reading.config, stage) is not None or not wrong & {stage, stage[:1]}


def _apply(rule: Rule, subject: Subject) -> Iterator[Said]:
    """What a rule says of a key that the file has, or that an ``"auto"`` in it brought."""
    path = path_of(rule.key)
    if value_at(subject.written, path) is None and path not in subject.autos:
        return
    subject.looked_at.clear()
    value = subject.get(rule.key)
    if value is None or not rule.applies(subject, value):
        return
    looked_at = set(subject.looked_at)
    if any(value_at(subject.config, key) == "auto" for key in looked_at):
        return  # Only a run knows.
    severity = rule.severity if rule.severity != "run" else "error" if subject.run else "warning"
    message = rule.message
    if "{" in message:
        named = {"value": value, "stage": subject.stage, "precision": subject.precision}
        named |= {f"in_{each}": subject.counterpart(each) for each in ("bf16", "fp16", "fp32")}
        message = message.format(**named, parameters=subject.parameters, model_hidden_size=subject.model_hidden_size)
    because = "; ".join(became for key, became in subject.autos.items() if key in looked_at)
    yield path, severity, message + (f" ({because})" if because else "")


# The key of a block that the sense of the others hangs on.
_SWITCHES = ("enabled", "device")


def _once(said: list[Said]) -> list[Said]:
    """All errors, and of the warnings the first of each key that no error of it, in it or of its switch explains."""
    wrong = {path for path, severity, _ in said if severity == "error"}
    judged = {path[:length] for path in wrong for length in range(1, len(path) + 1)}
    kept = []
    for path, severity, message in said:
        if severity == "warning":
            if path in judged or any((*path[:-1], switch) in wrong for switch in _SWITCHES):
                continue
            judged.add(path)
        kept.append((path, severity, message))
    return kept


@dataclass(frozen=True)
class _Places:
    """Where in the file the keys of its resolved config come from."""

    reading: Reading
    renamed: Mapping[KeyPath, KeyPath]
    resolved: Resolved
    lines: dict[KeyPath, int]

    def written(self, key: KeyPath) -> KeyPath:
        """The name in the file of a key that a rule knows by its present name."""
        for new, old in self.renamed.items():
            if key[: len(new)] == new:
                # The old key was a mere switch: what the new block holds is not in the file.
                return self.reading.as_written(old if old[-1].startswith("cpu_offload") else (*old, *key[len(new) :]))
        return self.reading.as_written(key)

    def line(self, written: KeyPath) -> int | None:
        """The line of a key as written; of the ``"auto"`` that brought it where the file does not have it."""
        autos = (auto.key for key, auto in self.resolved.autos.items() if key == written)
        return line_of(self.lines, written) or next((line_of(self.lines, self.written(key)) for key in autos), None)

    def became(self, key: KeyPath) -> str:
        """What an ``"auto"`` made of a key, for the reader of a finding that comes of it."""
        auto = self.resolved.autos[key]
        of = f" of {'.'.join(self.written(auto.key))}" if auto.key != key else ""
        line = line_of(self.lines, self.written(auto.key))
        place = of + (f" on line {line}" if line else "")
        value = json.dumps(value_at(self.resolved.config, key))
        return f'{".".join(self.written(key))} is {value} here, by the "auto"{place}: {auto.why}'
