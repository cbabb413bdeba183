"""pass@k on programming problems: completions at several temperatures, kept and resumed, then judged in the sandbox.

A result folder holds ``settings.json`` (what was asked of which model), ``generations-t<T>.jsonl`` and
``verdicts-t<T>.jsonl`` (one line per sample, appended as they come), and ``results.json`` (as lm-evaluation-harness
writes it, with this project's own figures beside). Docs: ``docs/judging.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds import durable
from codeparrot_ds.checkpoint.folders import find_model, find_run
from codeparrot_ds.errors import UserError
from codeparrot_ds.evaluation.pass_at_k import PassAtK, estimate
from codeparrot_ds.evaluation.problems import load_problems, public_name
from codeparrot_ds.evaluation.processes import number_of_processes, run_processes, run_task
from codeparrot_ds.json_files import DamagedFileError, parse_json, parts_of, read_object
from codeparrot_ds.problem_sets.problem import Problem
from codeparrot_ds.problem_sets.references import References, check_references, verdict_key
from codeparrot_ds.sandbox.judge import Limits, check_sandbox, judge_all, slowness
from codeparrot_ds.terminal import Progress
from codeparrot_ds.version import __version__

Key = tuple[str, int]
"""Of a sample: the problem's ``task_id`` and the sample's number."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the completions."""

    problems: str = "humaneval"
    """See ``load_problems``."""
    limit: int | None = None
    """Only the first so many problems."""
    num_samples: int = 20
    temperatures: tuple[float, ...] = (0.2, 0.6, 0.8)
    """0 is greedy, and one sample of it is all there is."""
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 1
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise UserError(f"temperatures are numbers of at least 0, not {list(self.temperatures)}")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise UserError(f"temperatures hold one twice: {list(self.temperatures)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be over 0 and at most 1")

    def samples(self, temperature: float) -> int:
        """How many completions of a problem there are at a temperature."""
        return self.num_samples if temperature else 1


def humaneval(
    source: str | Path,
    out: str | Path | None = None,
    *,
    settings: Settings,
    k: Sequence[int] = (1, 10, 100),
    judge: bool = True,
    limits: Limits | None = None,
    batch_size: int = 32,
    device: str | None = None,
    num_workers: int | None = None,
    num_processes: int | None = 1,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    accept_failing_references: bool = False,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Completes problems, judges the programs, and returns what ``results.json`` holds.

    What an earlier call left in the folder is not done again.

    Args:
        source: as for ``load_model``.
        out: result folder; by default beside the model's checkpoint or under ``./humaneval``.
        settings: of the completions; others than the folder's are refused.
        k: those over the number of samples are left out.
        judge: whether the programs are run. They never run outside the sandbox.
        num_workers: programs that are judged at once; see ``judge_all``.
        num_processes: that generate, each with a model of its own; None: one per GPU, or one.
        share: ``(i, n)`` generates every n-th problem from the i-th on, and does nothing else: such a process's part.
        accept_failing_references: whether problems are used whose own solutions do not pass; the results say so.
        say: gets a line before what takes long begins.

    Raises ``UserError`` before anything is generated where no sandbox can be had, the problems' own solutions do not
    pass, or the folder is another model's.
    """
    limits = limits or Limits()
    if judge:
        check_sandbox()
        if (times := slowness()) > 1:
            say(
                f"programs take {times:g} times as long on this machine as on the one that limits are made for, and "
                f"have as many times the {limits.seconds:g} s"
            )
    problems = load_problems(settings.problems, say)
    model = find_model(source)
    folder = Path(out) if out is not None else default_folder(source, settings.problems)
    identity = _identity(model, problems, settings)
    problems = problems[: settings.limit]
    references = None
    if judge:
        references = check_references(
            problems,
            settings.problems,
            limits=limits,
            accept_failing=accept_failing_references,
            num_workers=num_workers,
            options={"timeout": "--seconds", "memory": "--memory-mb", "numpy": "--imports numpy"},
            progress=progress,
            say=say,
        )
    started = time.time()
    if share == (0, 1):
        _open_folder(folder, identity, overwrite=overwrite)
    say(f"importing torch, then reading {source}")
    number = number_of_processes(num_processes, device)
    if number > 1:
        _generate_in_processes(source, folder, settings, number, batch_size=batch_size, device=device)
    _generate(model, folder, problems[share[0] :: share[1]], settings, batch_size, device, share, progress)
    if share != (0, 1) or references is None:
        return {}
    verdicts = {
        temperature: _judge(folder, problems, temperature, settings.samples(temperature), limits, num_workers, progress)
        for temperature in settings.temperatures
    }
    results = _results(str(source), model, problems, references, settings, verdicts, k, time.time() - started)
    durable.replace_file(folder / "results.json", [durable.json_bytes(results)])
    return results | {"folder": str(folder)}


def default_folder(source: str | Path, problems: str) -> Path:
    """Where results go: ``RUN/humaneval/<checkpoint>-<problems>``, or ``./humaneval/<model>-<problems>``."""
    run, model = find_run(source), find_model(source)
    name = _name_of(problems)
    if run is None:
        return Path("humaneval") / f"{Path(model).name}-{name}"
    checkpoint = Path(model).parent.name if Path(model).name == "export" else Path(model).name
    return run / "humaneval" / f"{checkpoint}-{name}"


def _name_of(problems: str) -> str:
    return Path(public_name(problems)).name.partition(".")[0].partition(":")[0]


# --------------------------------------------------------------------------------------------------------------------
# the folder


def _identity(model: str, problems: Sequence[Problem], settings: Settings) -> dict[str, Any]:
    """What two calls must have in common to share their completions."""
    weights = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        # Sizes and ends: reading gigabytes would take longer than some evaluations.
        weights.update(f"{path.name} {path.stat().st_size} ".encode() + _end_of(path))
    texts = json.dumps([[problem.task_id, problem.prompt, list(problem.ends)] for problem in problems])
    return {
        "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
        "weights": weights.hexdigest(),
        "problems_hash": hashlib.sha256(texts.encode()).hexdigest(),
        **dataclasses.asdict(settings),
        "temperatures": list(settings.temperatures),
    }


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return file.read()


def _open_folder(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the folder, or checks that it belongs to the same completions; more samples and temperatures may be."""
    path = folder / "settings.json"
    if path.is_file() and overwrite:
        for pattern in ("generations-*.jsonl", "verdicts-*.jsonl", "results.json"):
            for old in folder.glob(pattern):
                old.unlink()
    elif path.is_file():
        before = read_object(path)
        free = ("num_samples", "temperatures", "limit")
        other = [key for key in identity if key not in free and before.get(key) != identity[key]]
        if other:
            key = other[0]
            raise UserError(
                f"{folder} holds completions of other settings: {key} was {before.get(key)!r} and is {identity[key]!r}"
                "; name another folder with --out, or begin again with --overwrite"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no results of humaneval; name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace_file(path, [durable.json_bytes(identity)])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a line that a kill cut short is removed from it."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = parse_json(line, path)
        except DamagedFileError as error:
            raise UserError(f"{path}, line {number}: no JSON; remove the line to generate it again") from error
        with parts_of(f"{path}, line {number}"):
            yield {**row, "task_id": str(row["task_id"]), "sample": int(row["sample"])}


def _read(folder: Path, kind: str, temperature: float) -> dict[Key, dict[str, Any]]:
    """The rows of all files of a kind: each process writes its own."""
    paths = sorted(folder.glob(f"{kind}-t{temperature:g}.jsonl")) + sorted(
        folder.glob(f"{kind}-t{temperature:g}.*of*.jsonl")
    )
    return {(row["task_id"], row["sample"]): row for path in paths for row in _lines(path)}


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with path.open("a", encoding="utf-8") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield append


# --------------------------------------------------------------------------------------------------------------------
# completions


def _generate(
    model: str,
    folder: Path,
    problems: Sequence[Problem],
    settings: Settings,
    batch_size: int,
    device: str | None,
    share: tuple[int, int],
    progress: Progress,
) -> None:
    """Writes the completions that are not there yet."""
    missing = {}
    for temperature in settings.temperatures:
        there = _read(folder, "generations", temperature)
        wanted = [(problem, sample) for problem in problems for sample in range(settings.samples(temperature))]
        missing[temperature] = [(p, sample) for p, sample in wanted if (p.task_id, sample) not in there]
    total, done = sum(map(len, missing.values())), 0
    if not total:
        return
    from codeparrot_ds.evaluation.generate import Request, Sampling, generate
    from codeparrot_ds.evaluation.models import load_model
    from codeparrot_ds.model.products import multiply_in_fp32_where_needed

    multiply_in_fp32_where_needed()
    loaded = load_model(model, dtype=settings.dtype, device=device)
    for temperature, wanted in missing.items():
        requests = [
            Request(
                prompt=problem.prompt,
                seed=_seed(settings.seed, temperature, problem.task_id, sample),
                ends=problem.ends,
            )
            for problem, sample in wanted
        ]
        sampling = Sampling(temperature=temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens)
        part = f".{share[0] + 1}of{share[1]}" if share[1] > 1 else ""
        with _appending(folder / f"generations-t{temperature:g}{part}.jsonl") as append:
            for number, completion in generate(*loaded, requests, sampling=sampling, batch_size=batch_size):
                problem, sample = wanted[number]
                append(
                    {
                        "task_id": problem.task_id,
                        "sample": sample,
                        "completion": completion.raw,
                        "finish": completion.finish,
                        "tokens": len(completion.tokens),
                        "log_probability": completion.log_probability,
                        "seed": requests[number].seed,
                    }
                )
                done += 1
                progress(f"completions (temperature {temperature:g})", done, total)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _generate_in_processes(
    source: str | Path, folder: Path, settings: Settings, number: int, *, batch_size: int, device: str | None
) -> None:
    """Runs processes that generate a share of the problems each; what is there when one fails is kept."""
    task = {
        "source": str(source),
        "out": str(folder),
        "settings": dataclasses.asdict(settings),
        "batch_size": batch_size,
    }
    run_processes(__spec__.name, [{**task, "share": [rank, number]} for rank in range(number)], device=device)


def _run_share(task: dict[str, Any]) -> None:
    settings = Settings(**task["settings"] | {"temperatures": tuple(task["settings"]["temperatures"])})
    humaneval(
        task["source"],
        task["out"],
        settings=settings,
        judge=False,
        batch_size=task["batch_size"],
        device=task["device"],
        share=tuple(task["share"]),
    )


# --------------------------------------------------------------------------------------------------------------------
# verdicts


def _judge(
    folder: Path,
    problems: Sequence[Problem],
    temperature: float,
    num_samples: int,
    limits: Limits,
    num_workers: int | None,
    progress: Progress,
) -> dict[Key, dict[str, Any]]:
    """Returns the verdict of every sample; equal programs of a problem are run once.

    A verdict of other tests, limits or another judge than today's is none.
    """
    generations = _read(folder, "generations", temperature)
    keys = [(problem.task_id, sample) for problem in problems for sample in range(num_samples)]
    by_id = {problem.task_id: problem for problem in problems}
    judged_with = {problem.task_id: verdict_key(problem, limits) for problem in problems}
    verdicts = {
        key: row
        for key, row in _read(folder, "verdicts", temperature).items()
        if row.get("judged_with") == judged_with.get(key[0])
    }
    programs = {key: by_id[key[0]].program(by_id[key[0]].cut(generations[key]["completion"])) for key in keys}
    known = {(key[0], programs[key]): verdicts[key] for key in keys if key in verdicts}
    missing = [key for key in keys if key not in verdicts]
    different = list(dict.fromkeys((key[0], programs[key]) for key in missing if (key[0], programs[key]) not in known))
    wanted: dict[tuple[str, str], list[Key]] = {}
    for key in missing:
        wanted.setdefault((key[0], programs[key]), []).append(key)
    with _appending(folder / f"verdicts-t{temperature:g}.jsonl") as append:

        def keep(program: tuple[str, str], verdict: dict[str, Any]) -> None:
            for task_id, sample in wanted[program]:
                place = {"task_id": task_id, "sample": sample, "judged_with": judged_with[task_id]}
                verdicts[task_id, sample] = verdict | place
                append(verdicts[task_id, sample])

        for program in wanted:
            if program in known:
                keep(program, known[program])
        items = ((program, by_id[task_id].check) for task_id, program in different)
        for done, verdict in enumerate(
            judge_all(items, limits=limits, num_workers=num_workers) if different else (), start=1
        ):
            found = {"kind": verdict.kind, "detail": verdict.detail, "seconds": round(verdict.seconds, 4)}
            keep(different[done - 1], found)
            progress(f"programs (temperature {temperature:g})", done, len(different))
    return {key: verdicts[key] for key in keys}


# --------------------------------------------------------------------------------------------------------------------
# results


def _results(
    source: str,
    model: str,
    problems: Sequence[Problem],
    references: References,
    settings: Settings,
    verdicts: dict[float, dict[Key, dict[str, Any]]],
    k: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    by_temperature: dict[str, Any] = {}
    for temperature, rows in verdicts.items():
        samples = settings.samples(temperature)
        right = Counter(task_id for (task_id, _), row in rows.items() if row["kind"] == "passed")
        counts = [(samples, right[problem.task_id]) for problem in problems]
        by_temperature[f"{temperature:g}"] = {
            "pass_at_k": {str(n): _figures(estimate(counts, n)) for n in sorted(set(k)) if n <= samples},
            "verdicts": dict(Counter(row["kind"] for row in rows.values())),
            "problems_solved": len(right),
        }
    best: dict[str, Any] = {}
    for label, found in by_temperature.items():
        for n, figures in found["pass_at_k"].items():
            if n not in best or figures["value"] > best[n]["value"]:
                best[n] = {**figures, "temperature": float(label)}
    name = _name_of(settings.problems)
    # The harness's names: its humaneval task reports after a filter that makes programs of completions.
    metrics: dict[str, Any] = {"alias": name}
    for n in sorted(best, key=int):
        metrics[f"pass@{n},create_test"] = best[n]["value"]
        metrics[f"pass@{n}_stderr,create_test"] = best[n]["stderr"]
    asked = dataclasses.asdict(settings)
    return {
        "results": {name: metrics},
        "group_subtasks": {name: []},
        "configs": {
            name: {
                "task": name,
                "dataset_path": settings.problems,
                "output_type": "generate_until",
                "repeats": settings.num_samples,
                "generation_kwargs": {
                    "until": list(problems[0].ends),
                    "max_gen_toks": settings.max_new_tokens,
                    "do_sample": True,
                    "top_p": settings.top_p,
                    "temperature": [best[n]["temperature"] for n in sorted(best, key=int)],
                },
                "metric_list": [{"metric": f"pass@{n}", "higher_is_better": True} for n in sorted(best, key=int)],
            }
        },
        "versions": {name: 1.0},
        "n-shot": {name: 0},
        "higher_is_better": {name: {f"pass@{n}": True for n in sorted(best, key=int)}},
        "n-samples": {name: {"original": len(problems), "effective": len(problems)}},
        "config": {
            "model": "hf",
            "model_args": f"pretrained={model}",
            "random_seed": settings.seed,
            "limit": settings.limit,
        },
        "date": time.time(),
        "total_evaluation_time_seconds": str(seconds),
        "codeparrot_ds": {
            "version": __version__,
            "source": source,
            "settings": asked,
            "references": references.as_json(),
            "best": best,
            "temperatures": by_temperature,
        },
    }


def _figures(result: PassAtK) -> dict[str, float]:
    figures = dataclasses.asdict(result)
    figures.pop("k")
    return figures


def describe(results: dict[str, Any]) -> str:
    """The table of a result: shares in percent with their 95% intervals, the best temperature of each k marked."""
    own = results["codeparrot_ds"]
    best, temperatures = own["best"], own["temperatures"]
    numbers = sorted(best, key=int)
    (problems,) = (counts["original"] for counts in results["n-samples"].values())
    lines = [f"{own['source']} on {problems} problems, {own['settings']['num_samples']} samples of each"]
    lines.append("temperature  " + "".join(f"{'pass@' + n:<24}" for n in numbers) + "solved")
    for temperature, found in temperatures.items():
        cells = []
        for n in numbers:
            if n not in found["pass_at_k"]:
                cells.append(f"{'':<24}")
                continue
            figures = found["pass_at_k"][n]
            mark = "*" if best[n]["temperature"] == float(temperature) else " "
            text = f"{100 * figures['value']:6.2f}% ({100 * figures['low']:.1f} - {100 * figures['high']:.1f}){mark}"
            cells.append(f"{text:<24}")
        lines.append(f"{temperature:<13}{''.join(cells)}{found['problems_solved']}".rstrip())
    lines.append("* the best temperature; in brackets the 95% interval over problems")
    lines.append(f"reference solutions: {own['references']['text']}")
    for temperature, found in temperatures.items():
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found["verdicts"].items(), key=lambda x: -x[1]))
        lines.append(f"programs at {temperature}: {kinds}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_task(_run_share)
