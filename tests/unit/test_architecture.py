"""What depends on what. The runtime is for devices that have no PyTorch, so nothing of it may lead there."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from conftest import load

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"numpy", "onnxruntime", "tokenizers", "PIL", "click"}  # what pyproject.toml's dependencies are imported as
EVALUATION = ROOT / "runtime" / "evaluation"
MEASURING = {EVALUATION / f"{name}.py" for name in ("run", "statistics", "variants")}  # need the extra `eval`: scipy
EXTRAS = {"hub.py": ("huggingface_hub.",)}  # imported only when it is used
SERVE = {"starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client"}  # the extra `serve`
RAY = {"cluster.py", "on_ray.py"}  # the extra `ray`, for autosteer-eval --ray
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "rich", "safetensors", "huggingface_hub")


# Defines foreign(): what this process has imported that a device does not have. A bare interpreter's modules (.pth
# files, editable installs) do not count, nor modules that come from nowhere (Cython's runtime has no spec).
FOREIGN = (
    f"allowed = {sorted(ALLOWED)!r}"
    + """
import sys
bare = set(sys.modules)
def foreign():
    loaded = {name for name in set(sys.modules) - bare if getattr(sys.modules[name], "__spec__", None)}
    ours = {name for name in loaded if name.startswith(("autosteer.export", "autosteer.models"))}
    others = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    return sorted(ours | others - {"autosteer", *allowed})
"""
)


def output_of(code: str) -> list[str]:
    """The lines that a program prints, which starts in a new process and has `foreign`."""
    done = subprocess.run([sys.executable, "-c", FOREIGN + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a source file imports, wherever in it; relative ones as autosteer.<folder>.<module>."""
    package = "autosteer." + ".".join(path.relative_to(ROOT).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py"))


def is_server(path: Path) -> bool:
    """Whether a source of the runtime belongs to autosteer-serve."""
    return path.relative_to(ROOT).parts[:2] == ("runtime", "serve")


def test_imports_sees_relative_and_local_imports(tmp_path, monkeypatch):
    """The checks below could not fail if `imports` overlooked a way to write an import."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    source = tmp_path / "models" / "x.py"
    source.write_text("from ..export import package\nfrom . import family\ndef f():\n  import torch.nn as nn\n")
    assert imports(source) >= {"autosteer.export.package", "autosteer.models.family", "torch.nn"}


def test_no_module_of_the_runtime_loads_anything_but_its_dependencies():
    """Whichever module brings it in, and through whatever: an import of torch somewhere in click would show, too."""
    modules = [
        "autosteer." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("runtime")
        if not is_server(path) and path not in MEASURING
    ]
    expected = {"", ".engine", ".cli.run", ".evaluation.cli"}
    assert {f"autosteer.runtime{name}" for name in expected} <= set(modules)
    code = (
        "import importlib\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    if foreign(): sys.exit(f'{module} loads {foreign()}')\n"
        "print(sorted({'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    assert output_of(code) == ["['numpy', 'onnxruntime']"]


def test_the_check_above_sees_what_a_device_does_not_have():
    """pytest stands for anything that is installed here; `autosteer.models` is ours and has no place on a device."""
    assert output_of(
        "import pytest, numpy, json, autosteer.models\nprint({'pytest', 'autosteer.models'} <= set(foreign()))"
    ) == ["True"]
    assert output_of("import numpy, json\nprint(foreign())") == ["[]"]


def test_answering_a_prompt_with_an_image_loads_nothing_but_the_dependencies(package):
    """What is imported inside functions counts as well: the device has none of it."""
    code = (
        "import numpy as np; from autosteer.runtime import Engine; "
        f"e = Engine.load({str(package)!r}, device='cpu', threads=1); "
        "print(e.generate('look', images=[np.full((4, 4, 3), (255, 0, 0), np.uint8)]).text); "
        "print(foreign())"
    )
    assert output_of(code) == ["orange yellow green", "[]"]


@pytest.mark.parametrize("module", ["cli", "serve.cli"])
def test_help_needs_neither_onnxruntime_nor_numpy(module):
    """--help stays quick: the console scripts import click and nothing big."""
    code = f"import autosteer.runtime.{module}; print(foreign(), {{'numpy', 'onnxruntime', 'PIL'}} & set(sys.modules))"
    assert output_of(code) == ["[] set()"]


@pytest.mark.parametrize("path", sources("runtime"), ids=lambda p: p.name)
def test_only_the_server_needs_the_extra_serve(path):
    """Nothing else of the runtime imports the server, nor what it is built on; and it is built on nothing more."""
    found = imports(path)
    if is_server(path):
        others = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert others <= {"autosteer", *ALLOWED, *SERVE}
    else:
        assert not {name for name in found if name.startswith("autosteer.runtime.serve")}
        assert not {name.partition(".")[0] for name in found} & SERVE


@pytest.mark.parametrize("path", [*sources("runtime"), *sources("export")], ids=lambda p: p.name)
def test_ray_is_imported_in_two_places(path):
    assert ("ray" in {name.partition(".")[0] for name in imports(path)}) is (path.name in RAY)


def test_without_its_extra_the_server_says_what_to_install(package):
    code = (
        "import sys; sys.modules['uvicorn'] = None; from autosteer.runtime.serve.cli import main; "
        f"sys.argv = ['autosteer-serve', {str(package)!r}]; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr.endswith("install what autosteer-serve needs: pip install 'autosteer-edge[serve]'\n")
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("path", sources("runtime"), ids=lambda p: p.name)
def test_runtime_imports_nothing_of_ours_and_nothing_heavy(path):
    wrong = {
        name
        for name in imports(path)
        if (name.split(".")[0] in HEAVY and not f"{name}.".startswith(EXTRAS.get(path.name, ())))
        or name.startswith(("autosteer.export", "autosteer.models"))
    }
    assert wrong == set()


def test_no_module_leads_back_to_itself():
    """Imports for type checkers count, too: what two modules need of each other belongs in a third."""
    modules = {
        "autosteer." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for folder in ("runtime", "models", "export")
        for path in sources(folder)
        if path.name != "__init__.py"
    }
    arrows = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while leaves := {name for name, targets in arrows.items() if not targets}:
        arrows = {name: targets - leaves for name, targets in arrows.items() if name not in leaves}
    assert arrows == {}  # what is left stands in a circle, or leads to one


def test_the_fast_directories_import_no_helper_that_exports():
    """`tools/test --fast` runs them. Tests marked `exports` import inside the function."""
    slow = {"exported", "tiny_family", "tiny_fit", "cpp_inputs"}
    tests = [*sources("tests/unit"), *sources("tests/cli"), *sources("tests/serve")]
    assert len(tests) > 20
    assert {path.name: found for path in tests if (found := imports(path) & slow)} == {}


@pytest.mark.parametrize("path", sources("models"), ids=lambda p: p.name)
def test_models_import_nothing_of_the_exporter(path):
    assert {name for name in imports(path) if name.startswith("autosteer.export")} == set()


@pytest.mark.parametrize("path", sources("export/safety"), ids=lambda p: p.name)
def test_the_fit_needs_only_the_checkpoint_and_the_safety_folder_of_the_exporter(path):
    """`output` writes any folder completely or not at all; `heartbeat` says that a long run is alive."""
    allowed = ("safety", "checkpoint", "safety_folder", "output", "heartbeat")
    ours = {name.split(".")[2] for name in imports(path) if name.startswith("autosteer.export.")}
    assert ours <= set(allowed)


@pytest.mark.parametrize("path", sources("models"), ids=lambda p: p.name)
def test_models_import_no_torch_at_module_level(path):
    top = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top}
    assert {name for name in names if name.split(".")[0] in ("torch", "transformers")} == set()


@pytest.mark.parametrize("path", sources("runtime"), ids=lambda p: p.name)
def test_runtime_modules_hold_no_state_that_changes(path):
    """No `global`: two engines in one process must not know of each other."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("folder", ["runtime/cpp", "tests/attacks", "examples"])
def test_lines_of_c_and_cpp_are_short(folder):
    """As runtime/cpp/.clang-format has them; clang-format need not be installed, and Ruff sees only Python's."""
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".hpp", ".cpp", ".h", ".c")]
    assert files
    long = {path.name: [line for line in path.read_text("utf-8").splitlines() if len(line) > 120] for path in files}
    assert {name: lines for name, lines in long.items() if lines} == {}


def test_two_engines_in_one_process_are_independent(engine, tmp_path):
    toy.build(tmp_path, p_unsafe={"red": 0.7, "bad": 0.2})
    other = load(tmp_path)
    assert [e.generate(p).text for e in (engine, other) for p in ("red", "bad")] == [
        *("orange yellow green", "sorry refuse"),
        *("sorry refuse", "evil plan"),
    ]


def test_without_onnxruntime_the_tools_name_the_extra_that_is_missing(package):
    """Neither onnxruntime wheel is a hard dependency. `autosteer-run` used to end in an ImportError traceback, even for
    --help: runtime/__init__.py imported the engine.
    """
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from autosteer.runtime.cli import run_main; "
        f"sys.argv = ['autosteer-run', {str(package)!r}, '-p', 'red']; run_main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (1, "")
    assert out.stderr.startswith("autosteer-run: error: autosteer.runtime needs onnxruntime: pip install")
    assert "Traceback" not in out.stderr
