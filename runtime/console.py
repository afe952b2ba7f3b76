"""Shared by all command-line tools: errors as one line and an exit code, progress, tables, JSON without NaN."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import click

from .errors import NO_THREAD, AutoSteerError, OptionError, first_line, is_out_of_memory
from .strict_json import is_text

DISTRIBUTION = "autosteer-edge"
INTERRUPTED, TERMINATED = 130, 143
LINE_EVERY = 60.0  # seconds, where there is no terminal for a bar


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    try:
        import onnxruntime

        runs_on = f"onnxruntime {onnxruntime.__version__}"
    except ImportError:
        runs_on = "no onnxruntime"
    click.echo(f"{ctx.command.name} {version(DISTRIBUTION)} ({runs_on})")
    ctx.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions of AutoSteer and of onnxruntime, and exit.",
)
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line on stdout.")


def run_command(command: click.Command, extra: str = "cpu") -> NoReturn:
    """Run a click command and exit: 0, 1 for an error of the operating system or too little memory, 2 for usage, 130
    if interrupted, or the code of an AutoSteerError.

    `extra` is the optional part of the distribution that the command needs.
    """
    name = command.name
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by `>&-`
            setattr(sys, stream, open(os.devnull, "r" if stream == "stdin" else "w"))  # noqa: SIM115
    warnings.filterwarnings(
        "ignore", "Image size .* exceeds limit"
    )  # Pillow warns about large pictures, and opens them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # unwinds, so that partial output is removed
    interrupts = _count_interrupts()
    try:
        code = command.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as err:
        err.show()
        code = err.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"\n{name}: interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone
        code = 1
    except (MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        what = "not enough memory, or a limit of threads" if str(err) == NO_THREAD else "not enough memory"
        click.echo(f"{name}: error: {what}{f' ({first_line(err)})' if str(err) else ''}", err=True)
        code = 1
    except (AutoSteerError, OSError, ImportError) as err:
        if isinstance(err, ImportError) and interrupts:  # numpy's C code makes an ImportError of Ctrl-C
            click.echo(f"\n{name}: interrupted", err=True)
            sys.exit(INTERRUPTED)
        if "--debug" in sys.argv:
            traceback.print_exc()
        missing = isinstance(err, ModuleNotFoundError) and err.name and not err.name.startswith("autosteer")
        advice = f"; install what {name} needs: pip install 'autosteer-edge[{extra}]'" if missing else ""
        click.echo(f"{name}: error: {_in_options_of(command, err)}{advice}", err=True)
        code = err.exit_code if isinstance(err, AutoSteerError) else 1
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or no reader: what is left must not fail again when Python ends, with another code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code or 0)


def _in_options_of(command: click.Command, err: Exception) -> str:
    """What an error says, of an option as it is typed: --max-tokens for max_tokens."""
    if isinstance(err, OptionError):
        for option in command.params:
            if option.name == err.field:
                return max(option.opts, key=len) + err.problem
    return str(err)


def _count_interrupts() -> list[int]:
    """A list that grows with every Ctrl-C, which raises KeyboardInterrupt as before."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # `nohup` and `&` ignore it
        signal.signal(signal.SIGINT, interrupt)
    return interrupts


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show on stderr how many of `total` are done: a bar on a terminal, elsewhere a line a minute. Yields a function to
    call after each.
    """
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True) as bar:
            yield lambda: bar.update(1)
        return
    done, start = 0, time.monotonic()
    shown = start

    def advance() -> None:
        nonlocal done, shown
        done += 1
        if (now := time.monotonic()) - shown >= LINE_EVERY:
            shown = now
            click.echo(f"{label}: {done} of {total}, after {(now - start) / 60:.0f} min", err=True)

    yield advance


def dumps(value: Any) -> str:
    """JSON on one line; NaN and infinities become null, and bytes of file names that are no text are escaped."""
    text = json.dumps(_finite(value), ensure_ascii=False)
    return text if text.isascii() or is_text(text) else json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def one_line(text: str) -> str:
    """A name from a file as a terminal can show it: blanks for line ends, tabs and control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns: the first is left-aligned, the others right-aligned."""
    header, *rows = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
