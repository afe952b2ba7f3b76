"""autosteer-run, -check, -bench and -draft. Answers go to stdout; verdicts, timings and progress to stderr."""

import sys
from importlib import import_module

__all__ = ["bench_main", "check_main", "draft_main", "run_main"]


def bench_main() -> None:
    """Entry point of autosteer-bench."""
    _start("bench")


def check_main() -> None:
    """Entry point of autosteer-check."""
    _start("check")


def draft_main() -> None:
    """Entry point of autosteer-draft."""
    _start("draft")


def run_main() -> None:
    """Entry point of autosteer-run."""
    _start("run")


def _start(name: str) -> None:
    """Import a command, and run it: so Ctrl-C is no traceback while click and all else is imported, either."""
    try:
        getattr(import_module(f".{name}", __name__), f"{name}_main")()
    except KeyboardInterrupt:
        print(f"\nautosteer-{name}: interrupted", file=sys.stderr)
        sys.exit(130)  # console.INTERRUPTED
