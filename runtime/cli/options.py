"""What the commands that load a package have in common: its name, where it runs, what it records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:  # onnxruntime and numpy load when a command runs, so that --help is quick
    from ..engine import Engine

device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
pieces_option = click.option(
    "--pieces/--no-pieces",
    default=True,
    help="Also read the pieces of a turn, each picture and frame, and several turns as one, so that harmless ones "
    "cannot hide a request; and judge steered answers before they are shown. --no-pieces: prompts of several sentences "
    "start two to three times as fast.  [on]",
)
judge_answers_option = click.option(
    "--judge-answers/--no-judge-answers",
    default=None,
    help="Judge every answer, by itself and as the dialogue's next turn, before any of it is shown. Catches some of "
    "what the prompt's gate misses; nothing streams.  [default: as the package says; off with --no-pieces]",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: one per usable CPU.")


EMPTY = "the name is empty (is a variable of the shell unset?)"  # Path("") would be the current folder


class PackagePath(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no argument
    """A package's folder, or `hf:owner/name[@revision]`, which is downloaded."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See hub.package_folder."""
        from ..hub import package_folder

        if value == "":
            self.fail(EMPTY, param, ctx)
        return package_folder(str(value))


class NamedPath(click.Path):
    """A path with a name; whether there is anything is not looked for."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click.Path does."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


package_argument = click.argument("package", type=PackagePath())
audit_option = click.option(
    "--audit",
    type=NamedPath(),
    help="Append a line of JSON to this file for each request: verdict, digests, counts. "
    "If it cannot be written, the request fails.",
)
audit_texts_option = click.option(
    "--audit-texts", is_flag=True, help="Also write the texts of prompts and answers to it."
)


def load(
    package: Path,
    device: Any,
    threads: int | None,
    audit: Path | None = None,
    audit_texts: bool = False,
    **options: Any,
) -> Engine:
    """Load a package, with log lines on stderr. `options`: more of Engine.load's."""
    if audit_texts and audit is None:
        raise click.UsageError("--audit-texts needs --audit FILE")
    import logging

    from ..engine import Engine

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("autosteer").setLevel(logging.INFO)
    return Engine.load(package, device=device, threads=threads, audit=audit, audit_texts=audit_texts, **options)
