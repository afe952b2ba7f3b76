"""`optimum-cli export autosteer`: our exporter, where optimum's users look for exporters.

optimum loads every module of the namespace package optimum.commands.register and reads REGISTER_COMMANDS.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from autosteer.export.cli import export, main


class AutoSteerExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """autosteer-export's options, under optimum-cli."""

    COMMAND = CommandInfo(name="autosteer", help="Export a guarded multimodal LLM (autosteer-export).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare click's options to argparse, which checks and lists them."""
        for option in export.params:
            assert isinstance(option, click.Option)
            kind = {"action": "store_true"} if option.is_flag else {"required": option.required}
            parser.add_argument(
                *option.opts, *option.secondary_opts, help=(option.help or "").replace("%", "%%"), **kind
            )

    def run(self) -> None:
        """Hand the arguments over as they were typed, and exit."""
        sys.argv = ["autosteer-export", *sys.argv[sys.argv.index("autosteer") + 1 :]]
        main()


REGISTER_COMMANDS = [(AutoSteerExportCommand, ExportCommand)]
