"""A real cluster on one machine: network namespaces as hosts, each with its own sshd, joined by a bridge.

The hosts have names and clocks of their own where a test wants that, and share the file system, as on a cluster with a
network's file system. A further namespace, ``login``, holds the bridge; commands are given there. Nothing is made in
the machine's own network, so that several of these cannot disturb each other.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
PROGRAMS |= {"unshare": "util-linux", "nsenter": "util-linux"}
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "OMP_NUM_THREADS")
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = sorted({package for program, package in PROGRAMS.items() if not _which(program)})
    if absent:
        return f"the cluster needs {', '.join(absent)}: apt-get install {' '.join(absent)}"
    if os.geteuid() != 0:
        return "the cluster needs root, for network namespaces"
    probe = f"cp-probe-{secrets.token_hex(4)}"
    made = subprocess.run([_which("ip"), "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"the cluster needs network namespaces: {made.stderr.strip()}"
    subprocess.run([_which("ip"), "netns", "del", probe], check=True)
    return None


class Cluster:
    """Hosts ``alpha``, ``beta`` and ``gamma``.

    Args:
        folder: for keys, configs and logs; must exist.
        names: of the hosts.
        ssh_port: that their sshd listens on, and nothing in ssh's config says.
    """

    def __init__(
        self, folder: Path, names: tuple[str, ...] = ("alpha", "beta", "gamma"), *, ssh_port: int = 22
    ) -> None:
        self.folder, self.names, self.ssh_port = folder, names, ssh_port
        self._tag = f"cp{os.getpid()}-{secrets.token_hex(2)}"
        self._sshd: dict[str, subprocess.Popen] = {}
        self._mounts: list[tuple[str, Path]] = []

    def start(self) -> None:
        """Makes the network and starts an sshd on each host."""
        self._make_keys()
        for name in ("login", *self.names):
            _ip("netns", "add", self.namespace(name))
            self.ip(name, "link", "set", "lo", "up")
        self.ip("login", "link", "add", "bridge", "type", "bridge")
        self.ip("login", "addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
        self.ip("login", "link", "set", "bridge", "up")
        for name in self.names:
            peer = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace(name))
            self.ip("login", "link", "add", f"to-{name}", *peer)
            self.ip("login", "link", "set", f"to-{name}", "master", "bridge", "up")
            self.ip(name, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            self.ip(name, "link", "set", "eth0", "up")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
        for name in self.names:
            self._start_sshd(name)
        self._wait_for_sshd()

    def close(self) -> None:
        """Ends every process on the hosts and takes the network away."""
        for name in ("login", *self.names):
            for _ in range(3):
                for pid in self._pids(name):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                if not self._pids(name):
                    break
                time.sleep(0.1)
        for process in self._sshd.values():
            process.wait(timeout=10)
        for name in ("login", *self.names):
            subprocess.run([_which("ip"), "netns", "del", self.namespace(name)], check=False, capture_output=True)

    def namespace(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def address(self, name: str) -> str:
        return f"{NETWORK}.{1 + self.names.index(name)}"

    def ip(self, name: str, *arguments: str) -> None:
        """``ip`` inside a host."""
        _ip("-n", self.namespace(name), *arguments)

    def hostfile(self, text: str) -> str:
        """Writes a hostfile; returns its path."""
        path = self.folder / f"hostfile-{secrets.token_hex(4)}"
        path.write_text(text)
        return str(path)

    def popen(self, command: list[str], *, on: str = "login", env: dict[str, str] | None = None, **options):
        """Starts a command in the network of a host; the process is the command's own."""
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        path = os.pathsep.join([str(self.folder / "bin"), environment.get("PATH", ""), SYSTEM_PATH])
        environment |= {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | (env or {})
        whole = [_which("ip"), "netns", "exec", self.namespace(on), *command]
        options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(whole, env=environment, **options)

    def run(self, command: list[str], *, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        """Runs a command in the network of a host."""
        process = self.popen(command, **options)
        try:
            said, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, errors = process.communicate()
            raise AssertionError(f"{command} did not end within {timeout} s:\n{said}\n{errors}") from None
        return subprocess.CompletedProcess(command, process.returncode, said, errors)

    def codeparrot(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """``codeparrot-ds`` on the login node."""
        return self.run([sys.executable, "-m", "codeparrot_ds", *arguments], **options)

    def cut(self, name: str) -> None:
        """Takes a host off the network."""
        self.ip(name, "link", "set", "eth0", "down")
        self.ip("login", "neigh", "flush", "dev", "bridge")  # else it is believed in for some seconds more

    def mend(self, name: str) -> None:
        """Puts it back."""
        self.ip(name, "link", "set", "eth0", "up")

    def rename_interface(self, name: str, old: str, new: str) -> None:
        self.ip(name, "link", "set", old, "down")
        self.ip(name, "link", "set", old, "name", new)
        self.ip(name, "link", "set", new, "up")

    def slow(self, name: str, rate: str) -> None:
        """Limits what a host can send."""
        where = ("dev", "eth0", "root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        subprocess.run([_which("tc"), "-n", self.namespace(name), "qdisc", "add", *where], check=True)

    def unslow(self, name: str) -> None:
        subprocess.run([_which("tc"), "-n", self.namespace(name), "qdisc", "del", "dev", "eth0", "root"], check=True)

    def mount(self, name: str, source: str, target: Path, *options: str) -> None:
        """Mounts something on one host alone."""
        command = [_which("nsenter"), "-t", str(self._sshd[name].pid), "-m", "mount", *options, source, str(target)]
        subprocess.run(command, check=True)
        self._mounts.append((name, target))

    def unmount_all(self) -> None:
        for name, target in reversed(self._mounts):
            command = [_which("nsenter"), "-t", str(self._sshd[name].pid), "-m", "umount", "-l", str(target)]
            subprocess.run(command, check=True)
        self._mounts.clear()

    def of_the_run(self, name: str) -> list[int]:
        """Processes of runs on a host: launchers, guards, ranks and what they started."""
        found = []
        for pid in self._pids(name):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z" and (b"codeparrot_ds" in words or b"deepspeed" in words):
                found.append(pid)
        return found

    def _make_keys(self) -> None:
        (self.folder / "bin").mkdir()
        for key in ("user_key", *(f"{name}_key" for name in self.names)):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(self.folder / key)]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        known, config = [], []
        for name in self.names:
            kind, key, _ = (self.folder / f"{name}_key.pub").read_text().split()
            place = self.address(name) if self.ssh_port == 22 else f"[{self.address(name)}]:{self.ssh_port}"
            known.append(f"{place} {kind} {key}\n")
            config.append(f"Host {name}\n    HostName {self.address(name)}\n")
            (self.folder / f"{name}-python").mkdir()
            (self.folder / f"{name}.sshd_config").write_text(
                f"Port {self.ssh_port}\nListenAddress {self.address(name)}\nHostKey {self.folder / f'{name}_key'}\n"
                f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nPidFile none\nStrictModes no\nUsePAM no\n"
                "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nUseDNS no\n"
                "PrintMotd no\nMaxStartups 100\n"
                # Operators lie in a folder of the home: that of whoever runs the tests, which root's need not be.
                f"SetEnv PYTHONPATH={self.folder / f'{name}-python'} HOME={Path.home()}\n"
            )
        (self.folder / "known_hosts").write_text("".join(known))
        config.append(
            f"Host *\n    User root\n    IdentityFile {self.folder / 'user_key'}\n    IdentitiesOnly yes\n"
            f"    UserKnownHostsFile {self.folder / 'known_hosts'}\n    StrictHostKeyChecking yes\n    LogLevel ERROR\n"
        )
        (self.folder / "ssh_config").write_text("".join(config))
        wrapper = self.folder / "bin" / "ssh"  # ssh takes its config from the user's home alone
        wrapper.write_text(f'#!/bin/sh\nexec {_which("ssh")} -F {self.folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)

    def _start_sshd(self, name: str) -> None:
        daemon = f"hostname {name} && exec {_which('sshd')} -D -e -f {self.folder / f'{name}.sshd_config'}"
        inside = [_which("unshare"), "--uts", "--mount", "--propagation", "private", "sh", "-c", daemon]
        with (self.folder / f"{name}.sshd.log").open("ab") as log:
            self._sshd[name] = subprocess.Popen(
                [_which("ip"), "netns", "exec", self.namespace(name), *inside],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + 20
        for name in self.names:
            while self.run(["ssh", "-p", str(self.ssh_port), name, "true"]).returncode != 0:
                log = (self.folder / f"{name}.sshd.log").read_text()
                assert time.monotonic() < deadline, f"sshd of {name} does not answer:\n{log}"
                time.sleep(0.1)

    def _pids(self, name: str) -> list[int]:
        command = [_which("ip"), "netns", "pids", self.namespace(name)]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in said.stdout.split()]


def _ip(*arguments: str) -> None:
    subprocess.run([_which("ip"), *arguments], check=True, capture_output=True)


def _which(program: str) -> str:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), SYSTEM_PATH])) or ""
