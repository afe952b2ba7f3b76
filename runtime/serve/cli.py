"""autosteer-serve: options, and the start."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import click

from ..cli.options import (
    NamedPath,
    audit_option,
    audit_texts_option,
    device_option,
    judge_answers_option,
    load,
    package_argument,
    pieces_option,
    threads_option,
)
from ..console import debug_option, run_command, version_option
from ..errors import InputError
from .limits import Limits

KEY_VARIABLE = "AUTOSTEER_API_KEY"
MOST_DRAIN_SECONDS = 30
MOST_CONNECTIONS = 256  # each may hold a body
DEFAULTS = Limits()
ALONE = {  # by device: why requests take turns
    "cpu": "one request at a time: this model's rotary positions depend on the request (its pictures, or its length)",
    "cuda": "one request at a time: on CUDA several together have not been tried",
}


@click.command("autosteer-serve", context_settings={"help_option_names": ["-h", "--help"]})
@package_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key-file",
    type=NamedPath(),
    help=f"File with the key that clients must give; {KEY_VARIABLE} does the same. Required beyond this machine.",
)
@click.option("--name", help="Name of the model that clients ask for. Default: the package's.")
@click.option(
    "--policy",
    type=click.Choice(["steer", "stop", "report", "off"]),
    default="steer",
    show_default=True,
    help="What to do with an unsafe prompt.",
)
@click.option(
    "--weakest-policy",
    type=click.Choice(["stop", "steer", "report", "off"]),
    help="The least strict policy that a request may ask for; stop is the strictest.  [the --policy]",
)
@click.option("--threshold", type=float, help="Unsafe above this p_unsafe. Default: the package's.")
@click.option("--strength", type=float, help="Strength of steering. Default: the package's.")
@pieces_option
@judge_answers_option
@click.option(
    "--max-tokens", type=click.IntRange(1), default=DEFAULTS.max_tokens, show_default=True, help="Longest answer."
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=DEFAULTS.parallel,
    show_default=True,
    help="Answers computed together, each with keys and values of its own in memory.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=DEFAULTS.max_queue,
    show_default=True,
    help="Most requests that wait for their turn.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.001),
    default=DEFAULTS.timeout,
    show_default=True,
    help="Seconds for a request, from its arrival to the end of its answer.",
)
@click.option(
    "--max-body-mb",
    type=click.FloatRange(0.001),
    default=DEFAULTS.max_body_mb,
    show_default=True,
    help="Largest body of a request.",
)
@click.option(
    "--max-images",
    type=click.IntRange(0),
    default=DEFAULTS.max_images,
    show_default=True,
    help="Most images in a request.",
)
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0.001),
    default=DEFAULTS.max_megapixels,
    show_default=True,
    help="Largest image, and largest frame of a video.",
)
@click.option(
    "--max-frames",
    type=click.IntRange(0),
    default=DEFAULTS.max_frames,
    show_default=True,
    help="Most frames in a request's videos.",
)
@click.option(
    "--conversations",
    type=click.IntRange(0),
    default=DEFAULTS.conversations,
    show_default=True,
    help="Dialogues whose caches are kept for their next turn.",
)
@click.option("--max-tiles", type=click.IntRange(min=1), help="Cut a picture into at most this many tiles.  [no limit]")
@click.option("--low-memory", is_flag=True, help="Load the image graph for each picture, and drop it afterwards.")
@click.option("--access-log", is_flag=True, help="Log a line for each request: address, path and status.")
@audit_option
@audit_texts_option
@device_option
@threads_option
@debug_option
@version_option
def serve(
    package: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    name: str | None,
    policy: str,
    weakest_policy: str | None,
    threshold: float | None,
    strength: float | None,
    pieces: bool,
    judge_answers: bool | None,
    max_tiles: int | None,
    low_memory: bool,
    access_log: bool,
    audit: Path | None,
    audit_texts: bool,
    device: Any,
    threads: int | None,
    **limits: Any,
) -> None:
    """Serve the model in PACKAGE, guarded by its gate, to OpenAI's clients and to a browser.

    PACKAGE is a folder made by autosteer-export, or hf:owner/name[@revision] on the Hugging Face hub.
    """
    import uvicorn

    from ..batch import can_share
    from ..gate import Mode
    from .access import is_loopback
    from .app import BY_STRICTNESS, Settings, make_app
    from .server import Server

    key = read_key(api_key_file)
    if key is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: others could use this server; give a key with --api-key-file or {KEY_VARIABLE}"
        )
    weakest = Mode(weakest_policy or policy)
    if BY_STRICTNESS.index(weakest) < BY_STRICTNESS.index(Mode(policy)):
        raise InputError(f"--weakest-policy {weakest.value} is stricter than --policy {policy}")
    with listening(host, port) as listener:
        engine = load(package, device, threads, audit, audit_texts, low_memory=low_memory, max_tiles=max_tiles)
        if limits["parallel"] > 1 and not can_share(engine.manifest, engine.device):
            click.echo(ALONE[engine.device.kind], err=True)  # app.Service then runs one request at a time
        settings = Settings(
            model=name or engine.manifest.source.repo,
            policy=engine.policy(
                policy, threshold=threshold, strength=strength, pieces=pieces, judge_answers=judge_answers
            ),
            weakest=weakest,
            limits=Limits(**limits),
            key=key,
        )
        config = uvicorn.Config(
            make_app(engine, settings, package),
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=MOST_DRAIN_SECONDS,
        )
        listener.listen()  # before the address is printed: whoever reads it may connect
        address, actual = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        weaker = "" if weakest.value == policy else f", requests may weaken it to {weakest.value}"
        click.echo(f"{settings.model} on http://{shown}:{actual} (policy {policy}{weaker}); Ctrl-C stops", err=True)
        Server(config).run(sockets=[listener])


def read_key(file: Path | None) -> str | None:
    """The API key from a file, else from the environment. Raises InputError for one that is no key."""
    import os

    where = f"--api-key-file {file}" if file else KEY_VARIABLE
    try:
        key = file.read_text(encoding="utf-8") if file else os.environ.get(KEY_VARIABLE)
    except OSError as err:
        raise InputError(f"{where}: not readable ({err.strerror})") from err
    except UnicodeDecodeError as err:
        raise InputError(f"{where}: not UTF-8 text") from err
    if key is None:
        return None
    key = key.strip()
    if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
        several = "; there is one for all clients, and this has several lines" if "\n" in key else ""
        raise InputError(f"{where}: a key has at least 16 printable ASCII characters and no spaces{several}")
    return key


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address; it takes connections once the model is loaded. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as err:
        listener.close()
        raise OSError(err.errno, f"--host {host} --port {port}: {err.strerror}") from err
    return listener


def main() -> None:
    """Entry point of autosteer-serve."""
    run_command(serve, extra="serve")
