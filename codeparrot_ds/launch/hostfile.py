"""Hostfiles and filters: which hosts and slots a run takes. No torch here.

DeepSpeed reads the same files; it trains on this machine alone when one is missing or leaves one host, and shows a
traceback for what it cannot read. Here every mistake is one sentence with the file, the line and the nearest choice.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean, did_you_mean_path

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_LINE = re.compile(r"(\S+)\s+slots=(\S+)")
_SLOTS = re.compile(r"\d+(,\s*\d+)*")
THIS_MACHINE = ("localhost", "127.0.0.1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """A host of a run.

    Attributes:
        name: what ssh is given, or ``localhost``.
        slots: its devices by number, one rank each; on a host without GPUs as many ranks. Without a hostfile they may
            be names of devices, as ``CUDA_VISIBLE_DEVICES`` has them.
    """

    name: str
    slots: tuple[int | str, ...]


def read_hostfile(path: str | Path) -> list[Host]:
    """Reads ``host slots=N`` lines; blank lines and what follows a ``#`` are skipped.

    Raises:
        UserError: the file is missing or empty, or a line of it is wrong.
    """
    path = Path(path)
    if not path.is_file():
        what, hint = ("is not a file", "") if path.exists() else ("does not exist", did_you_mean_path(path))
        raise UserError(f"hostfile {path} {what}: DeepSpeed would quietly train on this machine alone{hint}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, Host] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        where = f"hostfile {path}, line {number}"
        match = _LINE.fullmatch(text)
        if match is None:
            example = text.replace(":", " ").split()[0]
            raise UserError(f"{where}: {text!r} is not `host slots=N`, as in `{example} slots=8`")
        name, count = match.groups()
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: {name!r} is not a host's name: letters, digits, '.', '-' and '_'; a user, a port or an IPv6 "
                "address goes into ~/.ssh/config under a name"
            )
        if re.fullmatch("[0-9]{1,6}", count) is None or int(count) == 0:
            raise UserError(f"{where}: slots={count}: must be the number of ranks on {name}, at least 1")
        if name in hosts:
            raise UserError(f"{where}: {name} is on line {line_of[name]} already: give it one line with all its slots")
        hosts[name] = Host(name=name, slots=tuple(range(int(count))))
        line_of[name] = number
    if not hosts:
        raise UserError(f"hostfile {path} names no host: write a line `host slots=N` for each")
    return list(hosts.values())


def select(
    hosts: list[Host], *, include: str | None = None, exclude: str | None = None, num_gpus: int | None = None
) -> list[Host]:
    """The hosts and slots that a run takes, in the order of the hostfile.

    Args:
        hosts: all there are.
        include: ``NAME[:SLOT,…]`` joined by ``@``: only these.
        exclude: the same form: all but these.
        num_gpus: at most so many slots of each host.

    Raises:
        UserError: unknown hosts or slots, options that contradict each other, or nothing left.
    """
    if include is not None and exclude is not None:
        raise UserError("--include and --exclude do not go together: name what to use, or what to leave out")
    if num_gpus is not None and (include is not None or exclude is not None):
        option = "--include" if include is not None else "--exclude"
        raise UserError(f"--num-gpus and {option} do not go together: name slots, as in {hosts[0].name}:0")
    if num_gpus is not None:
        for host in hosts:
            if len(host.slots) < num_gpus:
                raise UserError(f"--num-gpus {num_gpus}: {host.name} has {len(host.slots)} slot(s)")
        return [dataclasses.replace(host, slots=host.slots[:num_gpus]) for host in hosts]
    if include is not None:
        chosen = _parse_filter("--include", include, hosts)
        kept = {host.name: tuple(slot for slot in host.slots if slot in chosen.get(host.name, ())) for host in hosts}
    elif exclude is not None:
        left_out = _parse_filter("--exclude", exclude, hosts)
        kept = {host.name: tuple(s for s in host.slots if s not in left_out.get(host.name, ())) for host in hosts}
        if not any(kept.values()):
            raise UserError(f"--exclude {exclude} leaves no host")
    else:
        return list(hosts)
    return [Host(name=name, slots=slots) for name, slots in kept.items() if slots]


def _parse_filter(option: str, text: str, hosts: list[Host]) -> dict[str, set[int | str]]:
    """Slots by host that a filter names."""
    slots_of = {host.name: host.slots for host in hosts}
    named: dict[str, set[int | str]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if not name:
            example = f": write {_host_with(numbers, slots_of)}:{numbers}" if _SLOTS.fullmatch(numbers) else ""
            raise UserError(f"{option} {text!r}: a host's name is missing; the form is a:0,2@b{example}")
        if name not in slots_of:
            raise UserError(f"{option} {text}: {_why_no_host(name, slots_of)}")
        if name in named:
            raise UserError(f"{option} {text}: {name} is named twice: write {name}:0,1")
        if not colon:
            named[name] = set(slots_of[name])
            continue
        named[name] = set()
        choices = {str(slot): slot for slot in slots_of[name]}
        for number in numbers.split(","):
            if number.strip() not in choices:
                said = f"{name} has no slot {number.strip()!r}; its slots: {', '.join(choices)}"
                raise UserError(f"{option} {text}: {said}{_what_to_write(option, name, numbers, list(choices))}")
            named[name].add(choices[number.strip()])
    return named


def _host_with(numbers: str, slots_of: dict[str, tuple[int | str, ...]]) -> str:
    """A host that has these slots, or the first."""
    wanted = set(re.findall(r"\d+", numbers))
    return next((name for name, slots in slots_of.items() if wanted <= set(map(str, slots))), next(iter(slots_of)))


def _why_no_host(name: str, slots_of: dict[str, tuple[int | str, ...]]) -> str:
    names = re.split(r"[,\s]+", name)
    if set(names) <= slots_of.keys():
        return f"there is no host {name!r}: hosts are joined by '@', as in {'@'.join(names)}"
    if _SLOTS.fullmatch(name):
        return f"{name!r} names slots without their host: write {_host_with(name, slots_of)}:{name}"
    return f"there is no host {name!r}{did_you_mean(name, slots_of)}"


def _what_to_write(option: str, name: str, numbers: str, slots: list[str]) -> str:
    """What was meant, behind the slots that a host has."""
    if not _SLOTS.fullmatch(numbers):
        return "; slots are numbers joined by ',' and hosts are joined by '@', as in a:0,2@b"
    wanted = numbers.split(",")
    if option == "--exclude":
        return f": only those can be left out, as in {name}:{slots[-1]}"
    in_hostfile = "" if name in THIS_MACHINE else f", or slots={1 + max(map(int, wanted))} for it in the hostfile"
    return f": write {name}:{','.join(slots[: len(wanted)])}{in_hostfile}"


def write_hostfile(hosts: list[Host], path: Path) -> None:
    """Writes hosts with all of their slots up to the last one taken, for DeepSpeed's own reading."""
    path.write_text("".join(f"{host.name} slots={1 + max(map(int, host.slots))}\n" for host in hosts), encoding="utf-8")


def include_option(hosts: list[Host]) -> str:
    """DeepSpeed's ``--include`` for these hosts and slots."""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)
