"""What the service manager is told: ready, reloading, stopping, what is going on, and that it goes on.

    manager = Manager.from_environment()
    manager.say(READY="1", STATUS="idle")
    if manager.watches:
        manager.say(WATCHDOG="1")

The protocol of sd_notify(3): one datagram of `NAME=value` lines to the socket that NOTIFY_SOCKET names; outside systemd
there is none and nothing is said.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

import structlog

__all__ = ["Manager", "monotonic_usec"]

PATIENCE = 5.0
"""Seconds that a manager may take to make room for a message."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Manager:
    """The service manager at `address` (None: there is none); `watchdog`: seconds without a word after which it would
    kill this process (None: it does not watch)."""

    address: str | None = None
    watchdog: float | None = None

    @classmethod
    def from_environment(cls) -> Manager:
        """Whom NOTIFY_SOCKET and WATCHDOG_USEC name. They are taken out of the environment: an edit or a hook that
        this process starts is not to speak for it."""
        address = os.environ.pop("NOTIFY_SOCKET", None)
        usec, process = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        watched = usec.isdecimal() and int(usec) > 0 and process == str(os.getpid())
        return cls(address or None, int(usec) / 1e6 if address and watched else None)

    def say(self, **fields: str) -> None:
        """Tell it. A manager that does not listen is logged and changes nothing."""
        if self.address is None:
            return
        # "@": a name in the abstract namespace of Linux, unix(7)
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        lines = (f"{name}={' '.join(value.split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.settimeout(PATIENCE)
                connection.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("service_manager_not_reached", problem=error.strerror or str(error))


def monotonic_usec() -> str:
    """CLOCK_MONOTONIC in microseconds, which belongs to every RELOADING=1."""
    return str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
