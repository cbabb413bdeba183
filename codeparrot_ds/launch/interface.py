"""The network interface by which a rank reaches the others. No torch here.

gloo takes the address that the host's own name resolves to, which is 127.0.1.1 on many a Debian, and NCCL the first
interface that it finds. The route toward the first host tells better.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

from codeparrot_ds.launch.starters import first_and_last_node

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Sets ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME`` for a rank of several hosts, where the user did not."""
    if int(environment.get("CROSS_SIZE", environment.get("SLURM_NNODES", "1"))) < 2:
        return
    address = environment.get("MASTER_ADDR")
    if not address:
        return
    interface, own = interface_toward(address)
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes and (own is None or own.startswith("127.")):  # on the first host, whose own name may lead no further
        interface, _ = interface_toward(first_and_last_node(nodes)[1])
    if interface is not None:
        for name in VARIABLES:
            environment.setdefault(name, interface)


def interface_toward(address: str) -> tuple[str | None, str | None]:
    """The interface by which this host reaches an address, and its own address there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None, None
        own = probe.getsockname()[0]
    return interface_of(own), own


def interface_of(address: str) -> str | None:
    """The interface that has an address."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface, or of the first that a list or a prefix of NCCL's means."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(name.startswith(part.lstrip("=^")) for part in interface.split(",") if part):
            for entry in entries:
                if entry.family == socket.AF_INET:
                    return entry.address
    return None
