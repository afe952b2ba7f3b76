"""A connection to a Ray cluster. Ray is imported when it is asked for: the extra `ray`.

Whoever reaches a cluster's ports runs any code on it, unless the cluster asks for a token. So one that does not is not
used (Ray's docs: ray-security/token-auth), and one that is started here listens on this machine only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from .errors import InputError, first_line

LOCAL = {  # a cluster that this process starts
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback interface only, on Linux as well
    "RAY_worker_niceness": "0",  # its default is 15, and on a busy machine nothing would move
}


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray's module, connected. Meanwhile what is printed goes to stderr.

    `address`: "local" starts a cluster on this machine; "auto" is that of RAY_ADDRESS, or the one that runs here; or
    HOST:PORT of a head. Raises InputError for a cluster without tokens, or none.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise InputError(f"--ray {address}: give the head's HOST:PORT, and run this on a node of the cluster")
    if address == "local":
        os.environ.update(LOCAL, RAY_AUTH_TOKEN=secrets.token_hex(32))  # before Ray is imported
    elif not takes_tokens():
        raise InputError(
            f"--ray {address}: whoever reaches a cluster without tokens runs code on it; start it with "
            "RAY_AUTH_MODE=token in the environment, and set that here, too"
        )
    if address not in ("auto", "local"):
        require_listener(address)
    try:
        import ray
    except ImportError as err:
        raise InputError(f"--ray needs Ray ({err}): pip install 'autosteer-edge[ray]'") from err
    options = {"include_dashboard": False} if address == "local" else {}
    ended = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what became of workers, the last of it in shutdown()
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as err:
            advice = "`--ray local` starts one" if address == "auto" else "is it there, and is its token the same?"
            raise InputError(f"--ray {address}: no connection to a cluster ({first_line(err)}); {advice}") from err
        try:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, ended)  # Ray's handler ends with another code
            yield ray
        finally:
            ray.shutdown()


def require_listener(address: str) -> None:
    """Raise InputError unless something listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray {address}: give auto, local, or the head's HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as err:
        raise InputError(f"--ray {address}: no connection to a cluster ({err})") from err


def takes_tokens() -> bool:
    """Whether Ray's processes that have this environment take nothing without a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
