"""autosteer-check."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..console import debug_option, dumps, json_option, run_command, table, version_option
from ..errors import CheckError
from .options import PackagePath, device_option, load, threads_option


@click.command("autosteer-check", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("package", required=False, type=PackagePath())
@click.option("--host", is_flag=True, help="Print what this machine is, and how to install the runtime; then exit.")
@device_option
@threads_option
@json_option
@debug_option
@version_option
def check(package: Path | None, host: bool, device: Any, threads: int | None, as_json: bool) -> None:
    """Verify the files of PACKAGE and replay the prompts recorded at its export on this machine.

    Compares every file with its hash, every graph with the manifest, and every answer with the recorded one.
    """
    from ..check import check_package
    from ..host import describe_host

    if host:
        facts = describe_host()
        click.echo(dumps(facts) if as_json else "\n".join(f"{key:12} {value}" for key, value in facts.items()))
        return
    if package is None:
        raise click.UsageError("give a PACKAGE, or --host")
    engine = load(package, device, threads)  # checks hashes, graphs and the gate's proof
    replay = check_package(engine, package)
    if as_json:
        click.echo(dumps({"package": str(package), "checks": [dataclasses.asdict(r) for r in replay.checks]}))
    else:
        rows = [
            (r.name, f"{r.value:g}", "" if r.limit is None else f"{r.limit:g}", "ok" if r.passed else "FAILED")
            for r in replay.checks
        ]
        click.echo(table(("check", "value", "limit", ""), rows))
        if replay.unproven:
            click.echo(replay.unproven, err=True)
    if failed := [r.name for r in replay.checks if not r.passed]:
        raise CheckError(
            f"{package}: {', '.join(failed)}: not as on the exporting machine; do not deploy this package here"
            f"{replay.about_pictures}"
        )


def check_main() -> None:
    """Entry point of autosteer-check."""
    run_command(check)
