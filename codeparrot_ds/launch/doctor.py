"""Compares what all hosts say of themselves, before a run or by ``doctor``; each finding names the host. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.run_folder import package_versions
from codeparrot_ds.launch import probe
from codeparrot_ds.launch.hostfile import Host
from codeparrot_ds.launch.ssh import Answer, ask_all
from codeparrot_ds.supervision.deepspeed_env import Value

COMPARED = ("python", "torch", "deepspeed", "transformers", "tokenizers", "numpy")
CLOCK_SECONDS = 5.0
SLOW_LINK = 8.0
"""A link this many times slower than the median of the others is named."""
MIN_FREE_BYTES = 1 << 30
MIN_MEMORY_BYTES = 1 << 30
BUILD_SECONDS = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong on a host.

    Attributes:
        host: its name.
        check: what was looked at.
        detail: what is wrong, and the remedy.
        warning: whether a run can start all the same.
    """

    host: str
    check: str
    detail: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.host}: {self.check}: {self.detail}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run needs of its hosts.

    Attributes:
        device: ``cpu`` or ``cuda``.
        output_dir: where runs are written; every host must see the same folder.
        data: local folders and files that every host must see.
        operators: DeepSpeed's that the run loads.
        build: the DeepSpeed config to build missing operators for; None leaves them.
        clear_locks: remove stale build locks.
        needed_bytes: of disk.
        master_addr: address that the ranks meet at; None for the one that the first host is reached by.
        master_port: port that they meet at; None for a free one.
        ssh_port: of the hosts' sshd; None for ssh's own choice.
        links: measure each host's link to the next.
        environments: by host: a file to write there, see `codeparrot_ds.launch.probe.answer`.
        variables: environment that the ranks will have.
    """

    device: str
    output_dir: Path
    data: Sequence[str] = ()
    operators: Sequence[str] = ()
    build: dict[str, Any] | None = None
    clear_locks: bool = False
    needed_bytes: int = MIN_FREE_BYTES
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    links: bool = False
    environments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    variables: dict[str, Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Examination:
    """What an examination found.

    Attributes:
        hosts: that were asked.
        answers: by host.
        findings: errors first.
        master_addr: where the ranks meet; None where the first host does not answer.
        master_port: the port there.
        links: by host: its link to the next one.
        seconds: that it took.
    """

    hosts: list[Host]
    answers: dict[str, Answer]
    findings: list[Finding]
    master_addr: str | None = None
    master_port: int | None = None
    links: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def unreachable(self) -> list[str]:
        """Hosts that did not answer."""
        return [host for host, answer in self.answers.items() if answer.problem is not None]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        hosts = {}
        for host in self.hosts:
            answer = self.answers[host.name]
            reply = {key: value for key, value in answer.reply.items() if key != "ssh_connection"}
            hosts[host.name] = {"slots": list(host.slots), "reachable": answer.problem is None, **reply}
            hosts[host.name]["link"] = self.links.get(host.name)
        return {
            "hosts": hosts,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "master_addr": self.master_addr,
            "master_port": self.master_port,
            "seconds": round(self.seconds, 2),
        }


def examine(hosts: list[Host], wanted: Wanted) -> Examination:
    """Asks all hosts at once and compares their answers with each other and with this machine."""
    began = time.monotonic()
    data = {path: probe.data_fingerprint(Path(path)) for path in wanted.data}
    with _mark(_existing(wanted.output_dir)) as (folder, mark):
        answers = ask_all(
            {host.name: _request(host, hosts, wanted, folder, list(data)) for host in hosts}, ssh_port=wanted.ssh_port
        )
    findings = []
    for host in hosts:
        answer = answers[host.name]
        if answer.problem is not None:
            findings.append(Finding(host=host.name, check="ssh", detail=answer.problem))
            continue
        findings += _judge(host, answer, wanted, folder, mark, data)
    examination = Examination(hosts=hosts, answers=answers, findings=findings)
    _find_meeting_place(examination, wanted)
    if wanted.build is not None:
        _build_missing(examination, wanted)
    _name_missing_operators(examination)
    _name_slow_precisions(examination, wanted.device)
    if wanted.links:
        _look_at_links(examination, wanted)
    examination.findings.sort(key=lambda finding: finding.warning)
    examination.seconds = time.monotonic() - began
    return examination


def _request(host: Host, hosts: list[Host], wanted: Wanted, folder: Path, data: list[str]) -> dict[str, Any]:
    request: dict[str, Any] = {
        "facts": True,
        "folders": [str(folder)],
        "data": data,
        "operators": list(wanted.operators),
        "clear_locks": wanted.clear_locks,
        "variables": wanted.variables,
    }
    if host is hosts[0]:
        request["port"] = wanted.master_port or 0
    request["link_port"] = wanted.links
    if host.name in wanted.environments:
        request["environment"] = wanted.environments[host.name]
    return request


def _judge(
    host: Host, answer: Answer, wanted: Wanted, folder: Path, mark: str | None, data: dict[str, str | None]
) -> Iterator[Finding]:
    """What is wrong with one host that answered."""

    def finding(check: str, detail: str, *, warning: bool = False) -> Finding:
        return Finding(host=host.name, check=check, detail=detail, warning=warning)

    reply = answer.reply
    here = package_versions()
    other = [
        f"{name} {reply['versions'].get(name) or 'missing'} (here {here[name]})"
        for name in COMPARED
        if reply["versions"].get(name) != here[name]
    ]
    if other:
        yield finding("versions", f"{', '.join(other)}: install the same versions on every host")
    if reply["code"] != probe.code_hash():
        yield finding("code", "its codeparrot-ds is not the one here: update it there, or use one shared checkout")
    if reply.get("front_door_problem"):
        yield finding(
            "front door",
            f"cannot connect back to {reply['front_door_problem']}: let its network reach this machine's ports, or use "
            "--no-ssh on each host; a stop signal and the watchdog need the connection",
        )
    yield from _judge_devices(host, reply, wanted.device)
    space = reply["folders"][str(folder)]
    if space["free_bytes"] < wanted.needed_bytes:
        yield finding(
            "disk",
            f"{folder} has {space['free_bytes'] / 1e9:.2f} GB free and {wanted.needed_bytes / 1e9:.2f} GB are needed: "
            "free some space, or choose another --output-dir",
        )
    if not space["writable"]:
        yield finding("run folder", f"{folder} cannot be written there")
    if mark is not None and mark not in space["marks"]:
        yield finding(
            "run folder",
            f"{folder} is not the folder that it is here: ranks save into one folder, so put --output-dir on a file "
            "system that all hosts share",
        )
    for path, print_here in data.items():
        there = reply["data"][path]
        if there is None:
            yield finding("data", f"{path} does not exist there: copy it, or put it on a shared file system")
        elif there != print_here:
            yield finding("data", f"{path} holds other files than here: copy it again")
    if reply["memory_bytes"] < MIN_MEMORY_BYTES:
        yield finding("memory", f"only {reply['memory_bytes'] / 1e9:.2f} GB are available", warning=True)
    if abs(_skew(answer)) > CLOCK_SECONDS:
        yield finding(
            "clock", f"it is {abs(_skew(answer)):.0f} s off: synchronise it (timedatectl set-ntp true)", warning=True
        )
    for lock in reply.get("stale_locks", ()):
        if not wanted.clear_locks:
            yield finding(
                "build lock",
                f"{lock} was left by a killed build: DeepSpeed would wait for it for ever; remove it, or run "
                "codeparrot-ds doctor --clear-locks",
                warning=True,  # our own builds know it for stale
            )


def _skew(answer: Answer) -> float:
    """Seconds that a host's clock is ahead of the time in which it answered; negative behind it."""
    clock = answer.reply["clock"]
    return max(clock - answer.answered, 0.0) + min(clock - answer.asked, 0.0)


def _judge_devices(host: Host, reply: dict[str, Any], device: str) -> Iterator[Finding]:
    needed = 1 + max((slot for slot in host.slots if isinstance(slot, int)), default=0)
    if device == "cuda":
        if len(reply["gpus"]) < needed:
            detail = f"slot {needed - 1} is wanted and it has {len(reply['gpus'])} GPU(s): correct slots= or --include"
            yield Finding(host=host.name, check="slots", detail=detail)
    elif len(host.slots) > reply["cores"]:
        detail = f"{len(host.slots)} ranks on {reply['cores']} core(s) take turns: give it slots={reply['cores']}"
        yield Finding(host=host.name, check="slots", detail=detail, warning=True)


def _find_meeting_place(examination: Examination, wanted: Wanted) -> None:
    """The address and port where the ranks meet, on the first host."""
    first = examination.hosts[0].name
    answer = examination.answers[first]
    if answer.problem is not None:
        return
    connection = answer.reply["ssh_connection"]
    examination.master_addr = wanted.master_addr
    if examination.master_addr is None:
        # The address by which ssh reached it.
        examination.master_addr = connection[2] if len(connection) == 4 else "127.0.0.1"
    examination.master_port = answer.reply.get("port")
    if examination.master_port is None:
        detail = f"port {wanted.master_port} is taken there: choose another --master-port, or leave it out"
        examination.findings.append(Finding(host=first, check="port", detail=detail))


def _build_missing(examination: Examination, wanted: Wanted) -> None:
    """Builds missing operators on all hosts at once."""
    missing = {
        host: answer.reply["operators_missing"]
        for host, answer in examination.answers.items()
        if answer.problem is None and answer.reply["operators_missing"]
    }
    request = {"operators": list(wanted.operators), "build": [wanted.build, wanted.device]}
    requests = {host: request | {"variables": wanted.variables} for host in missing}
    answers = ask_all(requests, seconds=BUILD_SECONDS, ssh_port=wanted.ssh_port)
    for host, answer in answers.items():
        problem = answer.problem or answer.reply.get("build_problem")
        if problem is not None:
            examination.findings.append(Finding(host=host, check="operators", detail=problem))
        else:
            examination.answers[host].reply["operators_missing"] = []


def _name_missing_operators(examination: Examination) -> None:
    for host, answer in examination.answers.items():
        names = answer.reply.get("operators_missing")
        if names and not any(f.host == host and f.check == "operators" for f in examination.findings):
            detail = (
                f"{', '.join(names)} not built there yet: codeparrot-ds doctor --build does it on all hosts at once"
            )
            examination.findings.append(Finding(host=host, check="operators", detail=detail, warning=True))


def _name_slow_precisions(examination: Examination, device: str) -> None:
    """Names the hosts that have no fast bf16 where others have: the precision of a run is the same on all of them."""
    replies = {host: answer.reply for host, answer in examination.answers.items() if answer.problem is None}
    fastest = {host: reply["precision"][device] for host, reply in replies.items() if reply["gpus"] or device == "cpu"}
    if len(set(fastest.values())) < 2:
        return
    lacks = "its CPU has no bf16 instructions" if device == "cpu" else "its GPUs are older than Ampere and have no bf16"
    for host, precision in fastest.items():
        if precision != "bf16":
            detail = (
                f"{lacks}, as others have: all ranks go at its pace; leave it out, or name one precision for all, as "
                f"--deepspeed zero2_{precision}"
            )
            examination.findings.append(Finding(host=host, check="precision", detail=detail, warning=True))


def _look_at_links(examination: Examination, wanted: Wanted) -> None:
    """Sends around the ring of hosts, over the addresses that their ranks will use."""
    addresses, ports = {}, {}
    for host in examination.hosts:
        answer = examination.answers[host.name]
        if answer.problem is not None:
            continue
        reply = answer.reply
        chosen, address = reply["interface_chosen"], reply["address_chosen"]
        reached_by = reply["ssh_connection"][2] if len(reply["ssh_connection"]) == 4 else "127.0.0.1"
        if chosen is None:
            address = reached_by
        elif address is None or address.startswith("127."):
            has = f"has the address {address}" if address else "does not exist there"
            detail = f"{chosen!r}, of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, {has}: other hosts cannot reach it; "
            detail += f"leave the variable out, or name the interface of {reached_by}"
            examination.findings.append(Finding(host=host.name, check="interface", detail=detail))
            continue
        addresses[host.name], ports[host.name] = address, reply["link_port"]
    ring = list(addresses)
    if len(ring) < 2:
        return
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    requests = {
        name: {
            "variables": wanted.variables,
            "toward": examination.master_addr or addresses[ring[0]],
            "link": {"port": ports[name], "to": [addresses[following[name]], ports[following[name]]]},
        }
        for name in ring
    }
    for name, answer in ask_all(requests, ssh_port=wanted.ssh_port).items():
        link = answer.reply.get("link") or {"problem": answer.problem}
        examination.links[name] = link | {"to": following[name]}
        examination.answers[name].reply.update({key: answer.reply.get(key) for key in ("interface", "address")})
        if link.get("problem"):
            detail = f"to {following[name]}: {link['problem']}: look at firewalls and routes between the two"
            examination.findings.append(Finding(host=name, check="link", detail=detail))
    _name_slow_links(examination)


def _name_slow_links(examination: Examination) -> None:
    speeds = {name: link["bits_per_second"] for name, link in examination.links.items() if "bits_per_second" in link}
    for name, speed in speeds.items():
        others = statistics.median([other for key, other in speeds.items() if key != name] or [speed])
        if speed * SLOW_LINK < others:
            detail = (
                f"{speed / 1e6:,.0f} Mbit/s to {examination.links[name]['to']}, and {others / 1e6:,.0f} between the "
                "others: look at its cable, port and driver; every all-reduce goes at this pace"
            )
            examination.findings.append(Finding(host=name, check="slow link", detail=detail, warning=True))


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def _mark(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """A file in a folder by which other hosts tell that they see the same one; None where it cannot be written."""
    path = folder / f".shared-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError:
        yield folder, None
        return
    try:
        yield folder, path.name
    finally:
        path.unlink(missing_ok=True)


def table(examination: Examination) -> str:
    """What hosts said, a line each."""
    rows = [("host", "slots", "devices", "memory", "disk", "clock", "interface", "link to the next")]
    for host in examination.hosts:
        answer = examination.answers[host.name]
        if answer.problem is not None:
            rows.append((host.name, str(len(host.slots)), "no answer", "", "", "", "", ""))
            continue
        reply, link = answer.reply, examination.links.get(host.name, {})
        devices = f"{len(reply['gpus'])} x {reply['gpus'][0]}" if reply["gpus"] else f"{reply['cores']} cores"
        devices += f", {reply['precision']['cuda' if reply['gpus'] else 'cpu']}"
        speed = (
            f"{link['bits_per_second'] / 1e9:.2f} Gbit/s, {link['round_trip_seconds'] * 1e6:.0f} us"
            if ("bits_per_second" in link)
            else ""
        )
        interface = reply.get("interface_chosen") or reply.get("interface") or ""
        rows.append(
            (
                host.name,
                str(len(host.slots)),
                devices,
                f"{reply['memory_bytes'] / 1e9:.1f} GB",
                f"{min(facts['free_bytes'] for facts in reply['folders'].values()) / 1e9:.1f} GB",
                f"{_skew(answer):+.1f} s",
                f"{interface} {reply.get('address_chosen') or reply.get('address') or ''}".strip(),
                speed,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    speeds = {n: link["bits_per_second"] for n, link in examination.links.items() if "bits_per_second" in link}
    if speeds:
        slowest = min(speeds, key=lambda name: speeds[name])
        lines.append(f"slowest link: {slowest} to {examination.links[slowest]['to']}")
    return "\n".join(lines)


def describe(examination: Examination) -> str:
    """The table, what is wrong on which host, and a last line that sums it up."""
    lines = [table(examination), ""]
    lines += [f"{'warning' if finding.warning else 'error'}: {finding}" for finding in examination.findings]
    count, hosts = len(examination.findings), len(examination.hosts)
    found = f"{count} finding(s)" if count else "nothing is wrong"
    known = hosts > 1 and examination.master_addr is not None
    where = f"; ranks meet at {examination.master_addr}:{examination.master_port}" if known else ""
    return "\n".join([*lines, f"{hosts} host(s) in {examination.seconds:.1f} s: {found}{where}"])


def local_paths(*sources: str) -> list[str]:
    """The absolute paths among data sources (``DIR``, ``A=0.7,B=0.3``, ``org/name``) that exist on this machine."""
    parts = [part.rpartition("=")[0] or part for source in sources for part in source.split(",")]
    return [os.path.abspath(part) for part in parts if part and Path(part).exists()]
