"""What a GPU session's README.md says: tables of what is there so far."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .plan import Item, Sizes

SPEED = (
    "Ratio: to the run as it is, window by window in turns with it; ~ to all of its windows, of what had no turns with "
    "it. Loss: the largest difference to its losses at the same steps; a lever's is within {:g}, or NOT EQUAL."
)
LOSS_BAND = 5e-3
"""Nats, of runs whose arithmetic is bf16 in another order, as in training_speed.py."""


def text(items: Sequence[Item], facts: Mapping[str, Any], sizes: Sizes, seconds: float, limit: float) -> str:
    """The tables; ``facts`` are the session's, ``seconds`` of ``limit`` have passed."""
    began = [item for item in items if item.began is not None]
    done = sum(item.status == "done" for item in began)
    lines = [
        f"{done} of {len(items)} items have figures; {seconds:.0f} s of {limit:.0f} s.",
        "",
        *(f"- GPU {number}: {described(gpu)}" for number, gpu in enumerate(facts.get("device", []))),
        f"- {sizes.labels[0]}: {described(sizes.small)}",
        f"- {sizes.labels[1]}: {described(sizes.large)}",
    ]
    for part in (speeds, ceilings, checks, drift, longest):
        lines += part(began)
    rest = [item for item in items if item.status != "done"]
    if rest:
        reasons = [f"- {item.name}: {item.status}{f' ({item.error})' if item.error else ''}" for item in rest]
        lines += ["", "## Without figures", "", *reasons]
    return "\n".join(lines)


def described(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def speeds(items: list[Item]) -> list[str]:
    """Runs and peers: tokens/s, and beside the run as it is in the very same minute."""
    rows = [item for item in items if item.all("window")]
    if not rows:
        return []
    lines = ["", "## Speed", "", SPEED.format(LOSS_BAND), ""]
    lines += ["| item | tokens/s | ratio | loss, nats | MFU | GB | first window, s per step | MHz |", "|---" * 8 + "|"]
    turns = [row for item in rows for row in item.all("baseline")]
    by_name = {item.name: item for item in rows}
    for item in rows:
        windows, base, gap = item.all("window"), item.all("baseline"), item.one("loss_gap")
        ratios = [w["tokens_per_second"] / b["tokens_per_second"] for w, b in zip(windows, base, strict=False)]
        ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
        other = by_name.get(item.beside or "")
        beside = turns if item.peer is not None else other.all("window") if other is not None else []
        if beside:
            ratio = f"~{median_of(windows, 'tokens_per_second') / median_of(beside, 'tokens_per_second'):.3f}"
        if other is not None and item.rows_per_step == other.rows_per_step:
            gap = loss_gap(item.one("losses") or {}, other.one("losses") or {})
        first, loss = item.one("warmup") or {}, "" if gap is None else f"{gap:.2e}"
        if item.order is not None and item.order["does"] == "train" and gap is not None and not gap <= LOSS_BAND:
            loss += " NOT EQUAL"
        cells = [
            item.name, f"{median_of(windows, 'tokens_per_second'):,.0f}",
            ratio, loss,
            *(f"{median_of(windows, key) * scale:{form}}" if all(key in w for w in windows) else ""
              for key, scale, form in (("mfu", 1, ".1%"), ("memory_bytes", 1e-9, ".2f"))),
            f"{first['step_seconds']:.2f}" if first else "", f"{item.device['clocks.sm']:.0f}" if item.device else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def loss_gap(mine: Mapping[Any, float], theirs: Mapping[Any, float]) -> float | None:
    """The largest difference of the losses at steps that both logged."""
    return max((abs(mine[step] - theirs[step]) for step in mine.keys() & theirs.keys()), default=None)


def median_of(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def ceilings(items: list[Item]) -> list[str]:
    """Products, passes and attention by themselves."""
    found = [item for item in items if item.all("product") or item.all("measured") or item.all("backend")]
    if not found:
        return []
    lines = ["", "## Ceilings"]
    for item in found:
        lines += ["", f"{item.name}:", ""]
        for product in item.all("product"):
            size = " x ".join(map(str, product["size"]))
            lines.append(f"- {product['name']} ({size}): {product['tflops']:,.3g} TFLOP/s")
        if item.one("micro_batch_seconds"):
            milliseconds = 1e3 * item.one("micro_batch_seconds")
            lines.append(f"- all of a micro-batch: {milliseconds:.2f} ms, {item.one('tflops'):,.3g} TFLOP/s")
        for measured in item.all("measured"):
            rate = f", {measured['tb_per_second']:.3g} TB/s" if "tb_per_second" in measured else ""
            if "bytes_per_logit" in measured:
                rate = f", in which a copy moves {measured['bytes_per_logit']:.1f} bytes per logit"
            lines.append(f"- {measured['name']}: {1e3 * measured['seconds']:.3g} ms{rate}")
        for backend in item.all("backend"):
            said = backend.get("failure") or f"{1e3 * backend['seconds']:.3g} ms, {backend['tflops']:,.3g} TFLOP/s"
            lines.append(f"- {backend['name']}: {said}")
    return lines


def checks(items: list[Item]) -> list[str]:
    """Resumes, the command that a user types, and memory beside its plan."""
    lines = []
    for item in items:
        for run in item.all("run"):
            startup = sum(run["startup_seconds"].values())
            lines.append(f"- {item.name}: {run['tokens_per_second']:,.0f} tokens/s, {startup:.1f} s to the first step")
        if item.one("equal") is not None:
            said = "the very same losses" if item.one("equal") else f"losses differ by {item.one('loss_gap'):.2e}"
            lines.append(f"- {item.name}: {said} after the checkpoint")
        memory = item.one("memory")
        if memory:
            predicted, allocated = memory["predicted_bytes"], memory["allocated_bytes"]
            lines.append(
                f"- {item.name}: {predicted / 1e9:.3f} GB predicted, {allocated / 1e9:.3f} GB measured "
                f"({allocated / predicted - 1:+.2%})"
            )
        row = item.one("row")
        if row and not memory:
            lines.append(f"- {item.name}: trains, loss {row['loss']:.3f}; a CPU counts no memory")
    return ["", "## Resumes and memory", "", *lines] if lines else []


def drift(items: list[Item]) -> list[str]:
    """How the run as it is did over the session: a ratio from two different minutes is worth no more than this."""
    found = [median_of(item.all("baseline"), "tokens_per_second") for item in items if item.all("baseline")]
    if len(found) < 2:
        return []
    middle = statistics.median(found)
    said = f"{middle:,.0f} tokens/s in the median of {len(found)} items, {min(found) / middle - 1:+.1%} to "
    said += f"{max(found) / middle - 1:+.1%}; {found[0]:,.0f} at first, {found[-1]:,.0f} at last"
    return ["", f"Drift of the run as it is: {said}."]


def longest(items: list[Item]) -> list[str]:
    """Where the session's time went."""
    found = sorted((item for item in items if item.seconds), key=lambda item: -(item.seconds or 0))[:5]
    return ["", f"Longest: {', '.join(f'{item.name} {item.seconds:.0f} s' for item in found)}."] if found else []
