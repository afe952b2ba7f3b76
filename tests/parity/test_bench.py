"""tools/bench.py, run as a user would: what it prints of the demo, and that it believes files, not options."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from benchmark import peers, report, session, weights
from benchmark.peers import Configuration
from exported import PREFILL, demo_package
from onnx import TensorProto, helper

from autosteer.runtime.manifest import Manifest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "bench.py"), "--threads", "1", "--cold-starts", "0", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def measured() -> dict:
    """The demo at int4, two rounds, as --json prints it."""
    done = bench("--package", demo_package("int4"), "--prompt-tokens", 41, "--tokens", 8, "--rounds", 2, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bench_reports_every_figure_of_a_guarded_package(measured):
    (row,) = measured["configurations"]
    assert (row["prompt_tokens"], row["tokens"]) == (41, 8)
    for name in ("prefill_tok_s", "decode_tok_s", "ttft_ms", "lower_ms", "gate_ms", "upper_ms", "peak_rss_mb",
                 "private_rss_mb", "load_ms", "read_gb_s", "steered_decode_tok_s", "stop_ttft_ms"):  # fmt: skip
        assert row[name] > 0, name
    assert row["ttft_ms"] > row["lower_ms"] + row["upper_ms"]
    assert 0 < row["gate_share_of_ttft"] < 1


def test_bench_says_on_what_machine_and_how(measured):
    assert measured["machine"]["cpu"] and measured["machine"]["read_gb_s"] > 0.1
    assert measured["workload"]["threads"] == 1 and measured["workload"]["rounds"] == 1
    assert "--prompt-tokens 41" in measured["workload"]["command"]


def test_prompts_of_a_file_are_a_round_each_and_answers_end_where_the_package_ends_them(tmp_path):
    """Behind its end token a model repeats itself, which would flatter drafts."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("how do i open a jar?", "what is a cup?")))
    done = bench("--package", demo_package("int4"), "--prompts", file, "--each", 3, "--tokens", 500,
                 "--speculation", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["workload"]["rounds"] == 2
    plain, drafting = measured["configurations"]
    assert 2 <= plain["tokens"] == drafting["tokens"] < 100


def test_of_a_prompt_that_was_asked_thrice_the_middle_round_counts():
    """One slow moment of the machine is not a prompt's worst ratio."""
    rounds = tuple(
        {"prompt": prompt, "decode_ms": ms} for ms, prompt in zip((9, 1, 5, 30, 7, 20), "ababab", strict=True)
    )
    middle = session.middle_rounds(session.Measured(None, {}, rounds, {}, ()), each=3)
    assert [(r["prompt"], r["decode_ms"]) for r in middle.rounds] == [("a", 7), ("b", 20)]


def test_what_is_to_be_left_out_is_named_as_in_the_report():
    name = f"autosteer {demo_package('int4').name}"
    done = bench("--package", demo_package("int4"), "--without", "genai")
    assert done.returncode == 2 and f"there are {name}" in done.stderr
    done = bench("--package", demo_package("int4"), "--without", name)
    assert done.returncode == 2 and "nothing to measure" in done.stderr


def test_each_is_for_prompts_of_a_file_alone():
    """Other prompts are asked once: taking every third of their rounds together would mix different prompts."""
    done = bench("--package", demo_package("int4"), "--each", 3)
    assert done.returncode == 2 and "--each needs --prompts" in done.stderr


def test_a_file_without_prompts_is_refused_by_its_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "what is a cup?"}\n{"question": "?"}\n')
    done = bench("--package", demo_package("int4"), "--prompts", file)
    assert done.returncode == 5 and f"{file}:2: no 'prompt'" in done.stderr


def test_one_graph_says_what_the_split_package_says(tmp_path):
    """It is what the split is measured against: the same work, or the ratio means nothing."""
    done = bench("--package", demo_package("int4"), "--prompt-tokens", 41, "--tokens", 8, "--rounds", 2, "--one-graph",
                 "--cold-starts", 0, "--work", tmp_path, "--json")  # fmt: skip
    report = json.loads(done.stdout)
    split, whole = report["configurations"]
    assert whole["configuration"] == f"{split['configuration']}, one graph"
    assert report["ratios"][0]["same_tokens"] == 8
    graph = onnx.load(
        tmp_path / f"{demo_package('int4').name}-one-graph/one_graph.onnx", load_external_data=False
    ).graph
    names = {value.name for value in (*graph.input, *graph.output)}
    assert {"input_ids", "logits"} < names and not {"inputs_embeds", "hidden_states", "last_hidden_state"} & names


def test_bits_and_block_size_are_those_of_the_graphs(measured):
    """Whatever --precision and the manifest say: the graphs' own attributes, counted."""
    folder = demo_package("int4")
    files = [folder / Manifest.load(folder).graphs[name].file for name in ("decoder_lower", "decoder_upper")]
    nodes = [n for file in files for n in onnx.load(file, load_external_data=False).graph.node]
    attributes = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
    (row,) = measured["configurations"]
    assert {(a["bits"], a["block_size"]) for a in attributes} == {(row["bits"], row["block_size"])}


def test_what_reads_prompts_is_told_beside_what_a_step_reads():
    folder = demo_package("int4", PREFILL)
    graphs = {name: graph.file for name, graph in Manifest.load(folder).graphs.items()}
    both, alone = (
        weights.package_weights(folder, g) for g in (graphs, {n: graphs[n] for n in graphs if "prefill" not in n})
    )
    assert both.bytes_per_token == alone.bytes_per_token and both.body == alone.body
    assert both.describe() == f"{alone.describe()}; prompts: 40 x 8 bits"
    int8 = demo_package("int8")
    names = "prefill_lower", "prefill_upper"
    assert (
        weights.onnx_weights(*(folder / graphs[n] for n in names)).bytes_per_token
        == weights.onnx_weights(int8 / "decoder_lower.onnx", int8 / "decoder_upper.onnx").bytes_per_token
        > both.bytes_per_token
    )


def test_block_size_comes_from_the_graph_and_not_from_the_options_it_was_made_with(tmp_path):
    """onnxruntime-genai's builder ignored `int4_block_size` without a word, and a comparison was published with it."""
    path = tmp_path / "int4_block_size_128.onnx"
    path.write_bytes(_nbits(k=64, n=8, block_size=32).SerializeToString())
    found = weights.onnx_weights(path)
    assert found.body == weights.Matrix(4, 32, symmetric=True, bytes=0)
    assert found.bytes_per_token == 64 * 8 // 2 + 4 * (64 // 32) * 8


def _nbits(*, k: int, n: int, block_size: int) -> onnx.ModelProto:
    count = k // block_size
    parts = [
        helper.make_tensor("codes", TensorProto.UINT8, [n, count, block_size // 2], bytes(n * k // 2), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [n, count], bytes(4 * n * count), raw=True),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=block_size
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", k), ("y", n)))
    return helper.make_model(helper.make_graph([node], "g", [x], [y], parts))


def test_a_peer_that_is_not_installed_is_one_line_and_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(peers.NEEDS, "genai", (("onnxruntime_genai_that_is_not_here",), "onnxruntime-genai"))
    body = weights.Matrix(4, 32, symmetric=True, bytes=0)
    with pytest.raises(peers.PeerError, match=r"genai: .*_that_is_not_here.*; .* -m pip install onnxruntime-genai$"):
        peers.configurations("genai", Path("models/demo"), body, sys.executable, 1, tmp_path)


def test_a_peer_that_cannot_be_measured_is_said_and_the_package_is_measured_all_the_same():
    picture = TOOLS.parent / "models/demo/examples/benign.png"
    done = bench("--package", demo_package("int4"), "--prompt-tokens", 40, "--tokens", 2, "--rounds", 2,
                 "--image", picture, "--vs", "torch", "--checkpoint", TOOLS.parent / "models/demo")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "autosteer demo-int4" in done.stdout
    assert done.stderr.strip() == "not measured: torch: here it reads texts only, and --image was given"


def test_a_peer_without_the_weights_is_a_usage_error():
    done = bench("--package", demo_package("int4"), "--vs", "genai")
    assert done.returncode == 2
    assert "--checkpoint" in done.stderr


def test_ratios_are_taken_within_rounds_and_the_first_round_is_not_among_them(monkeypatch):
    """A machine that halves its speed between rounds must not change a ratio; nor must a slow first round."""
    speeds = {"a": iter([1.0, 200.0, 100.0]), "b": iter([900.0, 100.0, 50.0])}

    class Fake:
        def __init__(self, configuration, threads, max_tokens):
            self.name, self.facts = configuration.name, {}

        def ask(self, *, do, **job):
            if do == "memory":
                return {}
            ms = 1000 / next(speeds[self.name])
            return {"prompt_tokens": 1, "ttft_ms": ms, "decode_ms": ms, "token_ids": [1, 2]}

        def close(self):
            pass

    monkeypatch.setattr(session, "Worker", Fake)
    rows = [Configuration(name, "torch", Path(), "", None) for name in ("a", "b")]
    (a, b), failed = session.measure(rows, [{}] * 3, threads=1, max_tokens=1, cold_starts=0, report=lambda step: None)
    assert not failed and len(a.rounds) == 2
    found = report.ratios(a, b)
    assert (found["decode"], found["decode_worst"], found["prefill"]) == pytest.approx((2, 2, 2))


def test_one_that_dies_in_the_middle_costs_nobody_elses_rounds(monkeypatch):
    """All that had been measured was lost."""

    class Fake:
        def __init__(self, configuration, threads, max_tokens):
            self.name, self.facts, self.asked = configuration.name, {}, 0

        def ask(self, *, do, **job):
            self.asked += 1
            if self.name == "mortal" and self.asked == 2:
                raise session.WorkerError("mortal: exit code -9")
            return {} if do == "memory" else {"decode_ms": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(session, "Worker", Fake)
    rows = [Configuration(name, "torch", Path(), "", None) for name in ("one", "mortal", "other")]
    found, failed = session.measure(rows, [{}] * 3, threads=1, max_tokens=1, cold_starts=0, report=lambda step: None)
    assert [(row.configuration.name, len(row.rounds)) for row in found] == [("one", 2), ("other", 2)]
    assert failed == ["mortal: exit code -9"]


def test_what_was_left_half_made_for_a_peer_is_made_again(tmp_path):
    def half(to: Path) -> None:
        to.write_text("half")
        raise peers.PeerError("killed")

    with pytest.raises(peers.PeerError):
        peers._once(tmp_path / "work" / "q8.gguf", half)
    made = peers._once(tmp_path / "work" / "q8.gguf", lambda to: to.write_text("whole"))
    assert made.read_text() == "whole" and [*made.parent.iterdir()] == [made]
    peers._once(made, half)  # it is there


def test_a_configuration_that_dies_is_reported_with_its_last_words(monkeypatch):
    """Here a worker whose package is not there; the others are still measured."""
    good = Configuration("good", "autosteer", demo_package("int4"), sys.executable, None, {"speculate": False})
    bad = replace(good, name="bad", path=Path("/nowhere"))
    job = {"prompt": "hello", "token_ids": [], "image": None, "new_tokens": 2}
    rows, failed = session.measure(
        [bad, good], [job] * 2, threads=1, max_tokens=2, cold_starts=0, report=lambda step: None
    )
    assert [row.configuration.name for row in rows] == ["good"]
    assert len(failed) == 1 and failed[0].startswith("bad: ") and "/nowhere" in failed[0]
