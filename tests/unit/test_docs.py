"""README, CONTRIBUTING and docs/: links, options, lengths, and numbers that stand in two places."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import demo_report
import make_cli_docs
import plots
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/demo/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
WRITTEN = [page for page in PAGES if page != make_cli_docs.PAGE]  # by people
MOST_WORDS, LONGEST_LINE = 900, 120
AMERICAN = re.compile(r"\b[A-Z]?[a-z]*(?:quantiz|tokenized|optimiz|normaliz|initializ|behavior|color|license\b)[a-z]*")
COMMAND = re.compile(r"\s*(?:\$ )?(?:do )?(?:[A-Z_]+=\S+ )*(?:\S*time -v )?(?:\S*python )?(\S+)(.*)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_written_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> tuple[str, str]:
    """(everything outside fenced code blocks, everything inside)."""
    outside: list[str] = []
    inside: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        else:
            (inside if fenced else outside).append(line)
    return "\n".join(outside), "\n".join(inside)


def prose(text: str) -> str:
    """The text without code, front matter and targets of links."""
    outside = re.sub(r"\A---\n.*?\n---\n", "", blocks(text)[0], flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "`", outside))


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", blocks(text)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative targets of links and pictures that name no file, or no heading of it."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", blocks(page.read_text(encoding="utf-8"))[0]):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (fragment and fragment not in anchors(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


def options() -> dict[str, set[str]]:
    """Every command that the pages use, and the options that it has."""

    def of(command: click.Command) -> set[str]:
        return {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}

    found = {command.name or "": of(command) for command in make_cli_docs.COMMANDS}
    found["autosteer-cli"] = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", make_cli_docs.cpp_help()))
    tools = {tool.name: tool for tool in (ROOT / "tools").rglob("*.py")}
    tools |= {"aarch64": ROOT / "tools/board/cli.py", "matrix": ROOT / "tools/onnxruntime_matrix.py"}
    for name, source in tools.items():  # some use click, some argparse
        found[name] = set(re.findall(r'"(--[a-z][a-z-]*)"', source.read_text(encoding="utf-8"))) | {"--help"}
    return found


OPTIONS = options()


def commands(text: str) -> Iterator[list[str]]:
    """The words of each of our commands in code: blocks, with their continued lines, and in the middle of a text."""
    outside, inside = blocks(text)
    joined = inside.replace("\\\n", " ")
    for line in (*joined.splitlines(), *re.findall(r"`([^`]+)`", outside)):
        for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
            found = COMMAND.match(part)
            if found and Path(found[1]).name in OPTIONS:
                yield [Path(found[1]).name, *shlex.split(found[2])]


def unknown_options(text: str) -> list[str]:
    """Options in commands that the command does not have; and options in backticks that nothing has."""
    wrong = [
        f"{command} {word}"
        for command, *rest in commands(text)
        for word in rest
        if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in OPTIONS[command]
    ]
    named = re.findall(r"`(--[a-z][a-z-]*)", blocks(text)[0])
    return wrong + [word for word in named if not any(word in known for known in OPTIONS.values())]


def test_the_checks_below_find_what_they_are_for(tmp_path: Path) -> None:
    """A page with each mistake once."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading, 0.5\n[a](#one-heading-05) [b](#two) [c](none.md) [d](page.md#one-heading-05) ![e](f.svg)\n"
        "```\nautosteer-run p --no-such 1 \\\n  --also-not\ncat x | .venv/bin/autosteer-eval p --data d && ls --color\n"
        "python tools/bench.py --packages p\n```\n`--policy off`, `--polcy`, `autosteer-cli p --image x --gpu`\n"
    )
    text = page.read_text()
    assert broken_links(page) == ["#two", "none.md", "f.svg"]
    found = ["autosteer-run --no-such", "autosteer-run --also-not", "bench.py --packages", "autosteer-cli --gpu"]
    assert unknown_options(text) == [*found, "--polcy"]
    assert prose("a `.5` b\n```\n.5\n```\n[c](d.5)").split() == ["a", "`", "b", "[c]"]
    assert AMERICAN.search("is quantized") and not AMERICAN.search("a licence of quantised tokenizers")


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


@each_page
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_commands_are_found_in_the_pages() -> None:
    """The check above could not fail if it overlooked them."""
    found = {command for page in WRITTEN for command, *_ in commands(page.read_text(encoding="utf-8"))}
    assert found >= {"autosteer-fit", "autosteer-export", "autosteer-run", "autosteer-eval", "autosteer-check"}
    assert found >= {"autosteer-cli", "bench.py", "quality.py", "real_weights.py", "make_demo_data.py", "plots.py"}


def test_readme_is_read_in_three_minutes() -> None:
    assert len(blocks(README.read_text(encoding="utf-8"))[0].split()) <= MOST_WORDS


def test_the_page_of_commands_is_up_to_date() -> None:
    assert make_cli_docs.page() == make_cli_docs.PAGE.read_text(encoding="utf-8"), "run tools/make_cli_docs.py"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").iterdir()), ids=lambda path: path.name)
def test_examples_stand_in_their_page_word_for_word(example: Path) -> None:
    """tests/cpp/test_cpp_library.py compiles and runs the first two kinds; readers copy them from the page."""
    name, language = {".c": ("embedding", "c"), ".cpp": ("embedding", "cpp"), ".py": ("serving", "python")}[
        example.suffix
    ]
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert f"```{language}\n{example.read_text(encoding='utf-8')}```\n" in page


@each_page
def test_lines_fit_a_screen(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.lstrip().startswith("|")] == []


@each_written_page
def test_decimals_have_a_digit_before_their_point(page: Path) -> None:
    assert re.findall(r"(?<![\w.)/])\.\d+", prose(page.read_text(encoding="utf-8"))) == []


@each_written_page
def test_spelling_is_british(page: Path) -> None:
    assert [found[0] for found in AMERICAN.finditer(prose(page.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize("folder", ["runtime", "models", "export", "tools", "tests", "examples"])
def test_source_names_pages_that_exist(folder: str) -> None:
    sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".hpp", ".cpp", ".h", ".c")]
    named = {name for path in sources for name in re.findall(r"docs/[\w-]+\.md", path.read_text(encoding="utf-8"))}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_plotted_speeds_are_those_of_the_page() -> None:
    """One run, in two files: the plot's numbers and the table that people read."""
    table = PERFORMANCE.read_text(encoding="utf-8").split("## Beside other runtimes")[1].split("\n\n")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    rows = json.loads((plots.DATA / plots.SPEEDS).read_text(encoding="utf-8"))["configurations"]
    names = ("prefill_tok_s", "decode_tok_s", "ttft_ms", "peak_rss_mb")
    assert [(row["configuration"], *(row[name] for name in names)) for row in rows] == [
        (name, *map(float, values[:4])) for name, *values in cells
    ]


def test_the_plotted_scores_give_the_rates_of_the_page() -> None:
    """`stop` refuses what is flagged, and answers that are stopped: its attack success follows from these alone."""
    scores = json.loads((plots.DATA / plots.SCORES).read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "safety-results.md").read_text(encoding="utf-8")

    def passed(group: str) -> int:
        return sum(p <= scores["threshold"] for p in scores["groups"][group]) - scores["stopped"].get(group, 0)

    missed = {
        line: 100 * sum(passed(group) for group in groups) / sum(len(scores["groups"][group]) for group in groups)
        for line, _, belongs in demo_report.LINES[1:6]  # of unsafe text, rules and verdict are one prompt apart
        if (groups := [group for group in scores["groups"] if belongs(group)])
    }
    stopped = dict(re.findall(r"^\| (attack success: [\w ]+) \|.*\| ([\d.]+) \|$", page, re.MULTILINE))
    assert {name: f"{rate:.1f}" for name, rate in missed.items()} == {name: stopped[name] for name in missed}


def test_plots_are_drawn_from_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the outputs of autosteer-eval and tools/bench.py to both SVGs; the committed data stays as it is."""
    monkeypatch.setattr(plots, "DATA", tmp_path)
    kinds = [("unsafe/text", 0.9), ("unsafe/text-heldout", 0.4), ("vqa/count", 0.1), ("look-alike/a-heldout", 0.123456)]
    lines = [{"run": {}}, *({"group": group, "p_unsafe": p} for group, p in kinds for _ in range(3))]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    speeds = dict.fromkeys(("prefill_tok_s", "decode_tok_s", "ttft_ms", "peak_rss_mb"), 7.0)
    rows = [{"configuration": name, "load_ms": 1.0, **speeds} for name in ("autosteer a", "llama.cpp b")]
    report = {"machine": {"cpu": "C", "cores": 2}, "workload": {"date": "D"}, "configurations": rows, "ratios": []}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    arguments = ["--eval", tmp_path / "eval.jsonl", "--bench", tmp_path / "bench.json", "--output", tmp_path]
    plots.main.main([str(a) for a in arguments], standalone_mode=False)
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("speed.svg", "demo-gate.svg"))
    by_kind = plots.by_kind(json.loads((tmp_path / plots.SCORES).read_text())["groups"])
    assert [list(values) for values in by_kind.values()] == [[0.9] * 3, [0.4] * 3, [0.1] * 3, [0.12346] * 3]
    assert [row["peak_rss_mb"] for row in json.loads((tmp_path / plots.SPEEDS).read_text())["configurations"]] == [7, 7]


def test_every_console_script_says_its_version():
    scripts = re.findall(
        r"^(autosteer-[a-z-]+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    commands = {command.name: command for command in make_cli_docs.COMMANDS}
    assert sorted(commands) == sorted(scripts)
    for name, command in commands.items():
        done = CliRunner().invoke(command, ["--version"])
        assert re.fullmatch(rf"{name} [0-9.]+ \(onnxruntime [0-9.]+\)\n", done.output), done.output
