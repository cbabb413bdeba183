"""Where the time of profiled steps went, read from the trace that PyTorch's profiler writes (Chrome's trace format).

Each moment of the thread that trains belongs to the innermost event that says something: one of the ranges that
``profiler.py`` marks (step, forward, backward, optimizer, communication), or an operator of a known
kind. A kernel belongs to what ran on the host when it was launched, and is of its own kind where its name says one.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STEP = "step"
PHASES = ("forward", "backward", "optimizer")
COMMUNICATION = "communication"
REST = "rest"
# The first that matches decides. Fused kernels of a compiled model carry the names of what they fuse.
KINDS: dict[str, re.Pattern[str]] = {
    COMMUNICATION: re.compile(r"^communication$|^nccl|^c10d::"),
    "attention": re.compile(
        r"scaled_dot_product|flash_attention|flash_(fwd|bwd)|fmha|efficient_attention|_sdpa_|BlockedAttention", re.I
    ),
    "loss": re.compile(r"cross_?entropy|log_?softmax|nll_?loss", re.I),
    "matrix products": re.compile(r"^aten::(add|b|baddb)?mm$"),
}
# What shows which implementation of attention was chosen, and the kernels that it ran.
ATTENTION_OPERATOR = re.compile(r"^(?:aten::_)?(scaled_dot_product_\w+|BlockedAttention)$")
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCH_CATEGORIES = {"cuda_runtime", "cuda_driver"}
TOP = 10
US = 1e-6  # a trace's unit

Key = tuple[str, str]  # phase and kind


@dataclass(frozen=True)
class Part:
    """What one kind of work took in one phase of a step: seconds per step, of the host's thread and of the device."""

    phase: str
    kind: str
    host_seconds: float
    device_seconds: float


@dataclass(frozen=True)
class StepProfile:
    """The mean profiled step."""

    steps: int
    """That were profiled."""
    step_seconds: float
    """On the host's clock."""
    data_seconds: float
    """Of those, waiting for the loader."""
    parts: list[Part]
    """In the order of a step; host seconds add up to the step but for ``other_seconds``."""
    other_seconds: float
    """Of the host's thread between the phases, without the wait for data."""
    device_idle_seconds: float | None
    """When nothing ran on the device; None where the host is the device."""
    attention: list[str]
    """The implementations that PyTorch chose, with the kernels that they ran."""
    top: list[tuple[str, float, float]]
    """The operators (or kernels) that took most: name, seconds and calls per step."""

    def as_json(self) -> dict[str, Any]:
        """As it lies in ``profile.json``."""
        return asdict(self)


@dataclass(frozen=True)
class _Segments:
    """What a thread did when: non-overlapping, in order."""

    starts: list[float]
    ends: list[float]
    keys: list[Key]

    def at(self, time: float) -> Key | None:
        index = bisect.bisect_right(self.starts, time) - 1
        return self.keys[index] if index >= 0 and time < self.ends[index] else None


def read_profile(events: Sequence[dict[str, Any]], *, data_seconds: float = 0.0) -> StepProfile:
    """Reads ``traceEvents``.

    Args:
        events: of the trace.
        data_seconds: that the steps waited for data together.

    Raises:
        ValueError: no step is marked in the trace.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in complete if event.get("cat") == "user_annotation"]
    steps = [event for event in marks if event["name"] == STEP]
    if not steps:
        raise ValueError("the trace marks no step")
    main = steps[0]["tid"]
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in complete:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads.setdefault(event["tid"], []).append(event)
    segments = {tid: _segments(found, is_main=tid == main) for tid, found in threads.items()}

    host: defaultdict[Key, float] = defaultdict(float)
    timeline = segments[main]
    for start, end, key in zip(timeline.starts, timeline.ends, timeline.keys, strict=True):
        host[key] += end - start
    device_events = _launched(complete, segments, main)
    device: defaultdict[Key, float] = defaultdict(float)
    for event, key in device_events:
        device[key] += event["dur"]

    count, scale = len(steps), US / len(steps)
    total = sum(event["dur"] for event in steps)
    waited = data_seconds / count
    between = sum(time for (phase, _), time in host.items() if phase == STEP) * scale
    idle = total - _covered([event for event, _ in device_events], steps)
    return StepProfile(
        steps=count,
        step_seconds=total * scale,
        data_seconds=waited,
        parts=[
            Part(phase, kind, host.get((phase, kind), 0.0) * scale, device.get((phase, kind), 0.0) * scale)
            for phase in PHASES
            for kind in (*KINDS, REST)
            if (phase, kind) in host or (phase, kind) in device
        ],
        other_seconds=max(0.0, between - waited),
        device_idle_seconds=idle * scale if device_events else None,
        attention=_attention(complete, device_events),
        top=_top(threads[main], device_events, steps, scale),
    )


def _segments(events: list[dict[str, Any]], *, is_main: bool) -> _Segments:
    """The timeline of one thread; on the main one only what is inside of a step counts."""
    starts: list[float] = []
    ends: list[float] = []
    keys: list[Key] = []
    stack: list[tuple[float, Key | None]] = []
    now = float("-inf")

    def advance(until: float) -> None:
        nonlocal now
        while stack:
            end, key = stack[-1]
            stop = min(end, until)
            if key is not None and stop > now:
                starts.append(now)
                ends.append(stop)
                keys.append(key)
            now = max(now, stop)
            if end > until:
                return
            stack.pop()
        now = max(now, until)

    root: Key | None = None if is_main else ("", REST)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        advance(event["ts"])
        parent = stack[-1][1] if stack else root
        stack.append((event["ts"] + event["dur"], _inside(parent, event)))
    advance(float("inf"))
    return _Segments(starts, ends, keys)


def _inside(parent: Key | None, event: dict[str, Any]) -> Key | None:
    """What an event is, given the one around it."""
    name = event["name"]
    if event["cat"] == "user_annotation":
        if name == STEP:
            return STEP, REST
        if parent is not None and name in PHASES:
            return name, REST
    if parent is None:
        return None
    phase, kind = parent
    return phase, (kind_of(name) if kind == REST else kind)


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel: a key of `KINDS`, or ``rest``."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), REST)


def _launched(events: list[dict[str, Any]], segments: dict[Any, _Segments], main: Any) -> list[tuple[dict, Key]]:
    """What ran on the device for the steps, and what of a step it belongs to."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCH_CATEGORIES and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if event.get("cat") not in DEVICE_CATEGORIES or launch is None:
            continue
        around = segments[main].at(launch["ts"])
        if around is None:
            continue
        # Autograd launches from a thread of its own while the main one waits in the backward pass.
        own = segments[launch["tid"]].at(launch["ts"]) if launch["tid"] in segments else None
        phase, kind = around[0], (own or around)[1]
        by_name = kind_of(event["name"])
        found.append((event, (phase, kind if by_name == REST else by_name)))
    return found


def _covered(busy: Iterable[dict[str, Any]], steps: list[dict[str, Any]]) -> float:
    """Microseconds of the steps in which something of `busy` ran."""
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in busy)
    merged: list[list[float]] = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    bounds = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    return sum(max(0.0, min(end, last) - max(start, first)) for start, end in merged for first, last in bounds)


def _attention(events: list[dict[str, Any]], device_events: list[tuple[dict, Key]]) -> list[str]:
    operators = {
        match[1]
        for event in events
        if event.get("cat") == "cpu_op" and (match := ATTENTION_OPERATOR.match(event["name"]))
    }
    forward = {operator for operator in operators if not operator.endswith("_backward")}
    kernels = {
        event["name"].split("<")[0].split("(")[0].removeprefix("void ")
        for event, (phase, kind) in device_events
        if phase == "forward" and kind == "attention" and event["cat"] == "kernel"
    }
    return [*sorted(forward), *sorted(kernels)]


def _top(
    host_events: list[dict[str, Any]],
    device_events: list[tuple[dict, Key]],
    steps: list[dict[str, Any]],
    scale: float,
) -> list[tuple[str, float, float]]:
    """The names that took most of the device, or, where that is the host, of it (each without what it called)."""
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    if device_events:
        for event, _ in device_events:
            seconds[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    else:
        for name, own in _own_times(host_events, steps):
            seconds[name] += own
            calls[name] += 1
    most = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    return [(name, seconds[name] * scale, calls[name] / len(steps)) for name in most]


def _own_times(events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    bounds = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    stack: list[list[Any]] = []  # end, name, own
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["cat"] != "cpu_op" or not any(first <= event["ts"] < last for first, last in bounds):
            continue
        while stack and stack[-1][0] <= event["ts"]:
            _, name, own = stack.pop()
            yield name, own
        if stack:
            stack[-1][2] -= event["dur"]
        stack.append([event["ts"] + event["dur"], event["name"], event["dur"]])
    for _, name, own in stack:
        yield name, own


def table(profile: StepProfile) -> str:
    """The profile as lines for a terminal, milliseconds per step."""
    on_device = profile.device_idle_seconds is not None
    rows = [("data: waiting", profile.data_seconds, 0.0)]
    rows += [(f"{part.phase}: {part.kind}", part.host_seconds, part.device_seconds) for part in profile.parts]
    rows.append(("host between the phases", profile.other_seconds, 0.0))
    if profile.device_idle_seconds is not None:
        rows.append(("device idle", 0.0, profile.device_idle_seconds))
    heads = ("device ms", "share", "host ms") if on_device else ("ms", "share")
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{head:>11}" for head in heads)]
    for name, host, device in rows:
        main = device if on_device else host
        cells = [f"{1e3 * main:.2f}", f"{main / profile.step_seconds:.1%}", *([f"{1e3 * host:.2f}"] * on_device)]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    lines.append(f"{'step':{width}}{1e3 * profile.step_seconds:>11.2f}   (mean of {profile.steps})")
    lines.append(f"attention: {', '.join(profile.attention) or 'no fused kernel: plain products and a softmax'}")
    lines.append("most time in: " + ", ".join(f"{name[:60]} {1e3 * time:.2f} ms" for name, time, _ in profile.top[:5]))
    return "\n".join(lines)
