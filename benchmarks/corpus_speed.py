"""Builds a corpus of real code at full size: its speed, its memory, and how well it finds duplicates that were planted.

    python benchmarks/corpus_speed.py [--megabytes 300] [--repeats 3] [--record]

Speed: the real command on a tree of the standard library and the installed packages, copied with other identifiers
until it is large enough, so that the copies are no duplicates. Quality: a corpus of files that are no duplicates, into
which exact duplicates, near duplicates by four edits, and unlike files are planted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import keyword
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
from record import REPOSITORY, hardware, write_record

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")
TOKEN = re.compile(r"[A-Za-z_0-9]+")
ORIGINALS = 4000
PLANTED = 1000
THRESHOLDS = (0.85, 0.8, 0.7, 0.6)


def code_files() -> Iterator[str]:
    """The texts of the interpreter's library and of all installed packages."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"])):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                yield path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def other_identifiers(text: str, copy: int) -> str:
    """The same program with two thirds of its identifiers renamed, each to one of its own length."""

    def rename(found: re.Match[str]) -> str:
        name = found[0]
        code = zlib.crc32(f"{copy} {name}".encode())
        if keyword.iskeyword(name) or code % 3 == 0:
            return name
        return "".join(chr(ord("a") + (code * (place + 7) + ord(letter)) % 26) for place, letter in enumerate(name))

    return IDENTIFIER.sub(rename, text) if copy else text


def write_tree(folder: Path, num_bytes: int) -> int:
    """A tree of at least so many bytes, in folders of 50 repositories; returns its bytes."""
    written = copy = 0
    while written < num_bytes:
        for number, text in enumerate(code_files()):
            repository = folder / f"repository-{copy}-{number % 50}"
            (repository / ".git").mkdir(parents=True, exist_ok=True)
            data = other_identifiers(text, copy).encode()
            (repository / f"file_{number}.py").write_bytes(data)
            written += len(data)
            if written >= num_bytes:
                break
        copy += 1
    return written


def run(*arguments: str) -> dict[str, float]:
    """Seconds of one command, and the peak memory in MB of its first process and of the largest of its workers."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "codeparrot_ds", "corpus", *arguments],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    own = worker = 0.0
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        own = max(own, peak_megabytes(str(process.pid)))
        with contextlib.suppress(OSError):
            worker = max([worker, *map(peak_megabytes, children.read_text().split())])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"corpus {' '.join(arguments)} failed")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "main_process_mb": own, "largest_worker_mb": worker}


def peak_megabytes(pid: str) -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1e3 if found else 0.0
    return 0.0


def measure_speed(work: Path, megabytes: int, repeats: int, workers: int) -> dict[str, Any]:
    num_bytes = write_tree(work / "tree", megabytes * 1_000_000)
    settings = {
        "exact duplicates and filters": ["--no-near-duplicates"],
        "and near duplicates": [],
        "near duplicates, zst": ["--compress", "zst"],
        "near duplicates, one process": ["--num-workers", "1"],
    }
    result: dict[str, Any] = {"bytes": num_bytes, "workers": workers, "runs": {name: [] for name in settings}}
    for repeat in range(repeats):
        for name, options in settings.items():
            out = work / "out"
            facts = run(str(work / "tree"), "--out", str(out), "--overwrite", "--num-workers", str(workers), *options)
            card = json.loads((out / "corpus.json").read_text())
            speed = num_bytes / 1e6 / facts["seconds"]
            facts |= {"read": card["sources"][0]["documents"], "documents": card["documents"]}
            result["runs"][name].append({"megabytes_per_second": speed, "load": os.getloadavg()[0], **facts})
            print(f"{repeat + 1}: {name}: {speed:.1f} MB/s", flush=True)
    return result


# --------------------------------------------------------------------------------------------------------------------
# planted duplicates


def replace_positions(text: str, draw: Callable[[], str], rng: random.Random) -> str:
    places = list(TOKEN.finditer(text))
    parts, end = [], 0
    for place in sorted(rng.sample(places, round(len(places) / 10)), key=lambda found: found.start()):
        parts += [text[end : place.start()], draw()]
        end = place.end()
    return "".join([*parts, text[end:]])


def edits(texts: list[str], rng: random.Random) -> dict[str, Callable[[str], str]]:
    """Four ways to change a tenth of the tokens."""
    pool = [token for text in texts for token in TOKEN.findall(text)]

    def rename(text: str) -> str:
        names = sorted(set(TOKEN.findall(text)))
        new = {name: f"new_{rng.randrange(10**9)}" for name in rng.sample(names, round(len(names) / 10))}
        return TOKEN.sub(lambda found: new.get(found[0], found[0]), text)

    def replace_by_own(text: str) -> str:
        own = TOKEN.findall(text)
        return replace_positions(text, lambda: rng.choice(own), rng)

    return {
        "positions, by tokens of the same file": replace_by_own,
        "positions, deleted": lambda text: replace_positions(text, lambda: "", rng),
        "distinct tokens, renamed to new ones": rename,
        "positions, by tokens of the whole corpus": lambda text: replace_positions(text, lambda: rng.choice(pool), rng),
    }


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def originals(work: Path) -> list[str]:
    """Files of 10 tokens or more without near duplicates among them at the lowest threshold that is tried."""
    texts = random.Random(1).sample(list(code_files()), 3 * ORIGINALS)
    rows = [{"content": text} for text in texts if 200 < len(text) < 20_000]
    write_rows(work / "candidates.jsonl", rows)
    run(str(work / "candidates.jsonl"), "--out", str(work / "unlike"), "--near-duplicate-threshold", "0.5",
        "--filters")  # fmt: skip
    return [row["content"] for row in read_rows(work / "unlike")][: ORIGINALS + PLANTED]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def read_rows(corpus: Path) -> list[dict]:
    return [orjson.loads(line) for path in sorted(corpus.rglob("part-*")) for line in path.read_bytes().splitlines()]


def measure_quality(work: Path) -> dict[str, Any]:
    rng = random.Random(2)
    texts = originals(work)
    base, unlike = texts[:-PLANTED], texts[-PLANTED:]
    exact = [text.replace("    ", "\t").replace("\n", "\n\n") for text in base[:PLANTED]]
    result: dict[str, Any] = {"originals": len(base), "planted": PLANTED, "edits": {}}
    for name, change in edits(base, rng).items():
        near = [change(text) for text in base[:PLANTED]]
        kinds = {"original": base, "unlike": unlike, "exact": exact, "near": near}
        rows = [
            {"repo_name": kind, "path": str(number), "content": text}
            for kind, members in kinds.items()
            for number, text in enumerate(members)
        ]
        write_rows(work / "planted.jsonl", rows)
        similarities = [jaccard(set(TOKEN.findall(a)), set(TOKEN.findall(b))) for a, b in zip(base, near, strict=False)]
        result["edits"][name] = {
            "jaccard_median": statistics.median(similarities),
            "jaccard_5th_percentile": statistics.quantiles(similarities, n=20)[0],
            "share_at_0.85": sum(each >= 0.85 for each in similarities) / len(similarities),
            "thresholds": {str(t): judge(work, kinds, similarities, t) for t in THRESHOLDS},
        }
        print(name, json.dumps(result["edits"][name]), flush=True)
    return result


def judge(work: Path, kinds: dict[str, list[str]], similarities: list[float], threshold: float) -> dict[str, Any]:
    """A pair is found when one of it is gone; a removal is false when nothing that stays is similar enough."""
    run(str(work / "planted.jsonl"), "--out", str(work / "judged"), "--overwrite", "--filters",
        "--near-duplicate-threshold", str(threshold))  # fmt: skip
    kept = {(row["repo_name"], int(row["path"])) for row in read_rows(work / "judged")}
    # An exact duplicate has the same hash as its original: of both one is kept, under the first of their places.
    stays = [("exact", number) in kept or ("original", number) in kept for number in range(len(kinds["original"]))]
    found = [not (("near", number) in kept and stays[number]) for number in range(PLANTED)]
    similar = [number for number in range(PLANTED) if similarities[number] >= threshold]
    sets = {place: set(TOKEN.findall(kinds[place[0]][place[1]])) for place in kept}
    removed = [("near", n) for n in range(PLANTED) if ("near", n) not in kept]
    removed += [("original", n) for n, stay in enumerate(stays) if not stay]
    removed += [("unlike", n) for n in range(PLANTED) if ("unlike", n) not in kept]
    false = 0
    for kind, number in removed:
        own = set(TOKEN.findall(kinds[kind][number]))
        partners = [place for place in (("near", number), ("exact", number), ("original", number)) if place in kept]
        if not any(jaccard(own, sets[place]) >= threshold for place in partners):
            false += not any(jaccard(own, other) >= threshold for other in sets.values())
    return {
        "found": sum(found) / PLANTED,
        "found_of_those_at_threshold": sum(found[n] for n in similar) / len(similar) if similar else None,
        "exact_duplicates_left": sum(("exact", n) in kept and ("original", n) in kept for n in range(PLANTED)),
        "unlike_removed": sum(kind == "unlike" for kind, _ in removed),
        "removed": len(removed),
        "removed_falsely": false,
    }


# --------------------------------------------------------------------------------------------------------------------


def tables(speed: dict[str, Any], quality: dict[str, Any]) -> str:
    lines = [f"{speed['bytes'] / 1e6:,.0f} MB of Python files, {speed['workers']} processes, medians:", ""]
    lines += ["| | MB/s | main process, MB | largest worker, MB | load of the machine |", "| --- " * 5 + "|"]
    for name, runs in speed["runs"].items():
        values = [f"{statistics.median(run[key] for run in runs):.1f}" for key in RUN_KEYS]
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += [
        "",
        f"{quality['planted']:,} planted into {quality['originals']:,} files; a tenth of the tokens changed:",
        "",
    ]
    lines += ["| changed | Jaccard: 5th percentile, median | threshold | found | of those at the threshold | "
              "false removals | exact left |"]  # fmt: skip
    lines += ["| --- " * 7 + "|"]
    for name, edit in quality["edits"].items():
        for threshold, each in edit["thresholds"].items():
            of_similar = each["found_of_those_at_threshold"]
            lines.append(
                f"| {name} | {edit['jaccard_5th_percentile']:.3f}, {edit['jaccard_median']:.3f} | {threshold} "
                f"| {each['found']:.1%} | {'none is' if of_similar is None else f'{of_similar:.1%}'} "
                f"| {each['removed_falsely']} of {each['removed']} | {each['exact_duplicates_left']} |"
            )
    return "\n".join(lines)


RUN_KEYS = ("megabytes_per_second", "main_process_mb", "largest_worker_mb", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", action="store_true", help="write records/<date>-corpus-…")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quality = measure_quality(Path(folder))
        speed = measure_speed(Path(folder), arguments.megabytes, arguments.repeats, arguments.workers)
    text = tables(speed, quality)
    print(hardware(), text, sep="\n\n")
    if arguments.record:
        raw = {"speed": speed, "quality": quality}
        name = f"corpus-{arguments.workers}-cores"
        print(write_record(name, title="Corpus: speed and planted duplicates", text=text, raw=raw, out=None))


if __name__ == "__main__":
    main()
