"""What one host says of itself: run by ssh on each host of a run as ``python -m codeparrot_ds.launch.probe``. No torch.

The request comes as JSON on standard input, the answer is the last line of standard output behind `MARK`. Nothing here
judges: :mod:`codeparrot_ds.launch.doctor` compares the hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from codeparrot_ds.checkpoint.run_folder import package_versions
from codeparrot_ds.child_process import PACKAGE_PARENT
from codeparrot_ds.cpu import usable_cores
from codeparrot_ds.ds_config.precision import device_precisions
from codeparrot_ds.engine.operators import are_built, build_apart, operators_folder, use_operators_folder
from codeparrot_ds.launch.interface import VARIABLES, address_of, interface_toward
from codeparrot_ds.supervision.deepspeed_env import on_this_host
from codeparrot_ds.supervision.forwarded_env import write_private

MARK = "codeparrot-ds-probe:"
PIECE = bytes(1 << 18)
LINK_SECONDS = 0.7
"""That a host sends to its neighbour for, to measure the link."""
LINK_BYTES = 1 << 26
PATIENCE_SECONDS = 8.0


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request.

    Args:
        request: any of ``environment`` (``path`` and ``content`` of a file to write for this user alone),
            ``variables`` that the ranks will have, ``facts`` (true for all below), ``folders``, ``data`` (paths),
            ``operators`` (names), ``clear_locks``, ``build`` (a DeepSpeed config and a device), ``toward`` (an address
            that the ranks connect to), ``port`` (to look at; 0 for a free one), ``link_port`` (true for a free one),
            ``forget`` (a file to remove), ``link`` (see `measure_link`).
    """
    reply: dict[str, Any] = {"hostname": socket.gethostname(), "clock": time.time()}
    reply["ssh_connection"] = os.environ.get("SSH_CONNECTION", "").split()
    if "forget" in request:
        Path(request["forget"]).unlink(missing_ok=True)
    if "environment" in request:
        content = request["environment"]["content"]
        content["variables"] = on_this_host(content["variables"], os.environ)
        if reply["ssh_connection"] and "control_port" in request["environment"]:
            # By the address that this host knows the launching host by.
            peer, port = reply["ssh_connection"][0], request["environment"]["control_port"]
            content["variables"]["CODEPARROT_DS_CONTROL"] = f"{peer}:{port}"
            reply["front_door_problem"] = _cannot_connect(peer, port)
        write_private(Path(request["environment"]["path"]), content)
    os.environ.update(on_this_host(request.get("variables", {}), os.environ))
    use_operators_folder(os.environ)
    if request.get("facts"):
        reply |= _facts()
        chosen = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
        reply["interface_chosen"], reply["address_chosen"] = chosen, address_of(chosen) if chosen else None
    reply["folders"] = {path: folder_facts(Path(path)) for path in request.get("folders", ())}
    reply["data"] = {path: data_fingerprint(Path(path)) for path in request.get("data", ())}
    if "operators" in request:
        names = request["operators"]
        reply["stale_locks"] = stale_locks(names, clear=request.get("clear_locks", False))
        if "build" in request and not are_built(names):
            ds_config, device = request["build"]
            reply["build_problem"] = build_apart(ds_config, device, dict(os.environ))
        reply["operators_missing"] = [name for name in names if not are_built([name])]
    if "toward" in request:
        reply["interface"], reply["address"] = interface_toward(request["toward"])
    if "port" in request:
        reply["port"] = free_port(request["port"])
    if request.get("link_port"):
        reply["link_port"] = free_port()
    if "link" in request:
        reply["link"] = measure_link(**request["link"])
    return reply


def _cannot_connect(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return None


def _facts() -> dict[str, Any]:
    import psutil

    drivers = None
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
        rows = [line.rsplit(", ", 1) for line in said.stdout.splitlines()] if said.returncode == 0 else []
        gpus, drivers = [row[0] for row in rows], rows[0][1] if rows else None
    return {
        "versions": package_versions(),
        "code": code_hash(),
        "cores": usable_cores(),
        "precision": {device: device_precisions(device)[0] for device in ("cpu", "cuda")},
        "gpus": gpus,
        "driver": drivers,
        "memory_bytes": psutil.virtual_memory().available,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
    }


def code_hash() -> str:
    """SHA-256 over this package's sources and its table of DeepSpeed's keys."""
    package = PACKAGE_PARENT / "codeparrot_ds"
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), package / "ds_config" / "known_keys.json"]):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder_facts(folder: Path) -> dict[str, Any]:
    """Space in a folder, or in the nearest above it that exists, whether it can be written, and what marks it."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    marks = sorted(path.name for path in folder.glob(".shared-*")) if folder.is_dir() else []
    return {
        "exists": folder.is_dir(),
        "writable": os.access(existing, os.W_OK | os.X_OK) and existing.is_dir(),
        "free_bytes": shutil.disk_usage(existing).free,
        "marks": marks,
    }


def data_fingerprint(path: Path) -> str | None:
    """SHA-256 over names and sizes of a folder's files, or a file's; None where there is none."""
    if not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
    return digest.hexdigest()[:16]


def stale_locks(names: list[str], *, clear: bool) -> list[str]:
    """Locks of killed builds, for which every rank would wait; removed if asked."""
    folder = operators_folder()
    locks = [folder / name / "lock" for name in names if (folder / name / "lock").exists()]
    if not locks:
        return []
    with (folder / ".build-lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return []  # somebody builds
        if clear:
            for lock in locks:
                lock.unlink(missing_ok=True)
    return [str(lock) for lock in locks]


def free_port(wanted: int = 0) -> int | None:
    """A port that nobody listens on; None where the wanted one is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
            probe.listen(1)
        except OSError:
            return None
        return probe.getsockname()[1]


def measure_link(*, port: int, to: tuple[str, int], seconds: float = LINK_SECONDS) -> dict[str, Any]:
    """Sends to the next host while the one before sends here, as in a ring's all-reduce.

    Args:
        port: to listen on.
        to: address and port of the next host.
        seconds: to send for.

    Returns:
        ``bits_per_second`` and ``round_trip_seconds`` to the next host, or ``problem``.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
    except OSError as error:
        return {"problem": f"cannot listen on port {port}: {error.strerror}"}
    listener.listen(1)
    listener.settimeout(PATIENCE_SECONDS)
    receiver = threading.Thread(target=_receive, args=(listener,), daemon=True)
    receiver.start()
    result = _send(to, seconds)
    receiver.join(PATIENCE_SECONDS)
    listener.close()
    return result


def _receive(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                part = connection.recv(1 << 18)
                if not part:
                    return
                if part[-1:] == b"?":
                    connection.sendall(b"!")


def _send(to: tuple[str, int], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:  # the other may not listen yet
        try:
            connection = socket.create_connection((to[0], to[1]), timeout=2)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                return {"problem": f"cannot reach {to[0]}:{to[1]}: {error.strerror or error}"}
            time.sleep(0.1)
    with connection:
        connection.settimeout(PATIENCE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            trips = []
            for _ in range(3):
                began = time.monotonic()
                connection.sendall(b"?")
                connection.recv(1)
                trips.append(time.monotonic() - began)
            began, sent = time.monotonic(), 0
            while time.monotonic() - began < seconds and sent < LINK_BYTES:
                connection.sendall(PIECE)
                sent += len(PIECE)
            connection.sendall(b"?")
            connection.recv(1)  # it has all arrived
        except OSError as error:
            return {"problem": f"the connection to {to[0]}:{to[1]} broke: {error.strerror or error}"}
        return {
            "bits_per_second": 8 * sent / (time.monotonic() - began),
            "round_trip_seconds": min(trips),
        }


def main() -> int:
    """Reads the request, prints the answer."""
    reply = answer(json.loads(sys.stdin.read()))
    print(f"\n{MARK}{json.dumps(reply)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
