"""Where a server listens: on this machine alone, unless somebody guards the door."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping

from lora_dpo.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine alone.

    Raises:
        ConfigError: nothing is known by that name.
    """
    return all(ipaddress.ip_address(address).is_loopback for address in _addresses(host))


def is_local_name(header: str) -> bool:
    """Whether a Host header names this machine as only this machine would."""
    name = header if header.endswith("]") else header.rpartition(":")[0] or header
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def is_cross_site(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a request that may change something was sent by a page of another site.

    Browsers say so in Sec-Fetch-Site or, where they do not, in Origin; programs send neither. The rule is Datasette's
    (datasette/csrf.py), after https://words.filippo.io/csrf.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return False
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises `ConfigError` with what to do instead."""
    address = _addresses(host)[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=128)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise ConfigError(f"Cannot listen on {host}, port {port}: {_ADVICE[error.errno]}") from error


_ADVICE = {
    errno.EADDRINUSE: "the port is taken. Choose another with --port.",
    errno.EACCES: "ports below 1024 are for the administrator. Choose a higher one with --port.",
    errno.EADDRNOTAVAIL: "this machine has no such address. Choose another with --host.",
    errno.EAFNOSUPPORT: "this machine has no such kind of address. Choose another with --host.",
}


def _addresses(host: str) -> list[str]:
    if not host.strip():
        raise ConfigError("--host is empty. Give 127.0.0.1 for this machine alone, or the address to listen on.")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"The host {host} is not known here ({error}). Give an address such as 127.0.0.1.") from error
    return [str(entry[4][0]).partition("%")[0] for entry in found]
