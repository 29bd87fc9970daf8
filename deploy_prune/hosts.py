"""Processes on several machines: the network that leads from one to the others, and how one that is gone is noticed."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from contextlib import suppress

import psutil

SILENCE = 120.0  # seconds without an answer after which the system takes another machine for gone
INTERFACE = "GLOO_SOCKET_IFNAME"
INTERFACES = {"gloo": INTERFACE, "nccl": "NCCL_SOCKET_IFNAME"}  # which nccl chooses by itself, where it is not named


def started_on_several() -> bool:
    """Say whether torchrun, or whatever sets its environment variables, started processes on several machines."""
    everywhere = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", everywhere) != everywhere


def choose_interface() -> None:
    """Let gloo use the network that leads to the first machine, unless the user has named one.

    By itself gloo takes the address that this machine's name stands for: on Debian and its kin that is the loopback.
    """
    if INTERFACE not in os.environ and started_on_several():
        name = interface_towards(os.environ.get("MASTER_ADDR", ""))
        if name is not None:
            os.environ[INTERFACE] = name


def interface_towards(host: str) -> str | None:
    """Return the network interface on the way to a host; None for the loopback, or where there is no way."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]  # any port
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(target)  # of datagrams: nothing is sent
            own = way.getsockname()[0]
    except (OSError, UnicodeError):  # no such name, or no network
        return None
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return None
    addresses = psutil.net_if_addrs().items()
    return next((name for name, known in addresses if own in (address.address for address in known)), None)


def watch_connections() -> None:
    """Let the system ask on every connection to another machine whether that one is still there.

    One that was switched off, or is cut off, says nothing, and who waits for it would do so for hours. A connection
    with nobody behind it ends with an error after SILENCE seconds. Does nothing but on Linux.
    """
    if sys.platform != "linux":
        return
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status != psutil.CONN_ESTABLISHED or connection.laddr.ip == connection.raddr.ip:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as own:  # closed by now, perhaps
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(SILENCE / 2)))
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(SILENCE / 8)))
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * SILENCE))
