"""autosteer-run, -check, -bench and -draft. Answers go to stdout; verdicts, timings and progress to stderr."""

from .bench import bench_main
from .check import check_main
from .draft import draft_main
from .run import run_main

__all__ = ["bench_main", "check_main", "draft_main", "run_main"]
