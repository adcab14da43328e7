"""Blocks the network of this process. Python imports this module at start where its folder is on PYTHONPATH.

Only sockets of this machine stay usable: Unix sockets, which processes talk over, and loopback addresses, on
which tests run servers. An attempt is recorded, so that a test fails even if the code under test catches the
error.
"""

import ipaddress
import socket

attempts: list[str] = []


class NetworkBlocked(RuntimeError):
    """Something would have left this machine."""


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _check(host: object) -> None:
    if not _is_local(host):
        attempts.append(str(host))
        raise NetworkBlocked(f"a test of datasets reached for {host}")


def _guarded(name: str):
    real = getattr(socket.socket, name)

    def call(self, *arguments):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(arguments[-1][0])  # the address is the last argument of all of them
        return real(self, *arguments)

    return call


def _guarded_lookup(name: str):
    real = getattr(socket, name)

    def call(host, *arguments, **settings):
        _check(host)
        return real(host, *arguments, **settings)

    return call


METHODS = {name: _guarded(name) for name in ("connect", "connect_ex", "sendto")}
LOOKUPS = {name: _guarded_lookup(name) for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex")}


def block() -> None:
    """Replaces what opens connections and looks up names."""
    for name, call in METHODS.items():
        setattr(socket.socket, name, call)
    for name, call in LOOKUPS.items():
        setattr(socket, name, call)


if __name__ == "sitecustomize":
    block()
