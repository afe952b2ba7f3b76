"""autosteer-fit on a tiny random LLaVA-OneVision: the folder it writes, the errors it gives."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_fit
import torch
from rich.console import Console
from tiny_fit import LAYERS, REFUSAL, WIDTH

from autosteer.export.checkpoint.open import load_processor, open_checkpoint
from autosteer.export.safety import arrange, calibrate, cli, head_fit, prober, reworded
from autosteer.export.safety import states as states_module
from autosteer.export.safety.batches import check_lengths, encode
from autosteer.export.safety.model import FitModel, open_fit_model
from autosteer.export.safety.pairs import Prompt, read_data
from autosteer.export.safety.refusal_head import RefusalHead
from autosteer.export.safety.store import States
from autosteer.export.safety_folder import SafetyArtifact
from autosteer.runtime.errors import InputError, PackageError

LAST, MEAN = (states_module.POOLINGS.index(name) for name in ("last", "mean"))


@pytest.fixture(scope="module", autouse=True)
def few_rewordings() -> Iterator[None]:
    """Two prompts of each label are reworded and judged instead of 60, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reworded, "JUDGED", 2)
        yield


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return tiny_fit.checkpoint()


@pytest.fixture(scope="module")
def data() -> Path:
    return tiny_fit.data()


@pytest.fixture
def fit_model(checkpoint: Path) -> FitModel:
    return open_fit_model(open_checkpoint(str(checkpoint)), device="cpu")


@pytest.fixture
def prompt_states(fit_model: FitModel, tmp_path: Path) -> Callable[..., torch.Tensor]:
    return functools.partial(tiny_fit.states_of, fit_model, tmp_path)


def command(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    arguments = {"--model": checkpoint, "--pairs": data / "pairs.jsonl", "--output": output, "--refusal-text": REFUSAL}
    return [*(str(x) for pair in arguments.items() for x in pair), *more]


@dataclass(frozen=True)
class Result:
    """What a run of the command left behind."""

    exit_code: int
    stdout: str
    stderr: str


def fit(*arguments: str) -> Result:
    """Run autosteer-fit in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["autosteer-fit", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    return Result(exit_.value.code, out.getvalue(), err.getvalue())


def load(folder: Path) -> SafetyArtifact:
    return SafetyArtifact.load(folder, hidden_size=WIDTH, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def fitted(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("fitted") / "deep" / "safety"
    benign = str(data / "benign.jsonl")
    return output, fit(
        *command(
            checkpoint, data, output, "--benign", benign, "--json", "--layer", "2", "--prober", "pooled", "--augment"
        )
    )


def test_json_is_the_safety_folder_and_the_folder_loads(fitted: tuple[Path, Result]):
    output, result = fitted
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((output / "safety.json").read_text(encoding="utf-8"))
    plots = [f"{name}.png" for name in ("refusal", "reliability", "roc", "sas", "scores")]
    written = ["report.json", "report.md", "safety.json", "safety.safetensors"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*plots, *written])
    assert [path.name for path in output.parent.iterdir()] == ["safety"]  # nothing left beside it
    facts = load(output).facts
    assert (facts.model, facts.split_layer, facts.token_offset, facts.selected_by) == ("tiny", 2, -1, "user")
    assert (facts.threshold, facts.pooling, facts.refusal_text) == (0.5, "mean", REFUSAL)


def test_facts_say_what_was_fitted_on_what(fitted: tuple[Path, Result]):
    facts = load(fitted[0]).facts
    assert [score.layer for score in facts.layers] == [1, 2, 3]
    assert all(set(score.sas_by_channel) == {"text", "with picture"} for score in facts.layers)
    assert all(score.sas_low <= score.sas <= score.sas_high for score in facts.layers)
    t, c = facts.training, facts.calibration
    assert c["prompts_with_pictures"] > 0
    assert t["augmented_prompts"] == 2 * (t["train_prompts"] + t["validation_prompts"])
    assert (t["pairs"], t["prompts"], t["pairs_without_difference"]) == (60, 180, 0)
    assert t["train_prompts"] + t["validation_prompts"] + t["heldout_prompts"] == 180
    assert c["heldout_unsafe"] + c["heldout_benign"] == t["heldout_prompts"]
    assert {"heldout_fpr.lamps", "heldout_recall.text", "heldout_recall.with picture"} < set(c)
    assert t["refusal_loss"] < t["refusal_initial_loss"] / 2


def test_stored_prober_separates_the_two_classes(
    fitted: tuple[Path, Result], prompt_states: Callable[..., torch.Tensor]
):
    """End to end: raw hidden state in, calibrated p_unsafe out, on prompts that were in no file."""
    artifact = load(fitted[0])
    asks = [f"help me buy {n} {noun}" for n in range(70, 90) for noun in ("zzxqzz", "pillow")]
    states = prompt_states([Prompt(ask) for ask in asks])[:, artifact.facts.split_layer - 1, MEAN]
    p = prober.p_unsafe(artifact.prober, states)
    assert np.mean(p[::2] > 0.5) > 0.75  # a random model: chance is 0.5
    assert np.mean(p[1::2] <= 0.5) > 0.75


def test_held_out_prompts_that_the_gate_judges_rightly_go_into_packages_as_tokens(
    checkpoint: Path, fitted: tuple[Path, Result], data: Path
):
    """No words and no pictures of the data: what a package carries goes to every device."""
    facts = load(fitted[0]).facts
    items = read_data([data / "pairs.jsonl"], [data / "benign.jsonl"]).labelled()
    split = arrange.split_prompts(read_data([data / "pairs.jsonl"], [data / "benign.jsonl"]), items, seed=0)
    heldout = {hashlib.sha256(items[i].prompt.text.encode()).hexdigest(): items[i] for i in split.heldout}
    assert {prompt.unsafe for prompt in facts.proof} == {True, False}
    tokenizer = load_processor(open_checkpoint(str(checkpoint))).tokenizer
    for prompt in facts.proof:
        item = heldout[prompt.sha256]
        assert item.unsafe == prompt.unsafe == (prompt.p_unsafe > facts.threshold)
        assert (prompt.text, prompt.images, item.prompt.images) == ("", (), ())
        rendered = tokenizer.decode(prompt.token_ids)
        assert item.prompt.text in rendered and rendered.endswith("<|im_start|>assistant\n")


def test_scores_of_the_proof_are_those_of_the_model_in_float32(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fit_model: FitModel,
    prompt_states: Callable[..., torch.Tensor],
):
    """However the states of the fit were rounded: every export compares its own scores with them."""
    forward = states_module.forward

    def rounded(*args: Any, watch: Any, **options: Any) -> torch.Tensor:
        fast = torch.get_float32_matmul_precision() == "medium"
        return forward(
            *args, watch=lambda k, hidden: watch(k, hidden.bfloat16().float() if fast else hidden), **options
        )

    monkeypatch.setattr(states_module, "forward", rounded)
    assert fit(*command(checkpoint, data, tmp_path / "safety", "--publish-proof")).exit_code == 0
    artifact = load(tmp_path / "safety")
    proof, layer = artifact.facts.proof, artifact.facts.split_layer - 1
    asked = [Prompt(prompt.text, tuple(tmp_path / "safety" / name for name in prompt.images)) for prompt in proof]
    exact = prober.p_unsafe(
        artifact.prober, prompt_states(asked)[:, layer, states_module.POOLINGS.index(artifact.facts.pooling)]
    )
    np.testing.assert_allclose([prompt.p_unsafe for prompt in proof], exact, atol=2e-5)


def test_words_and_pictures_are_kept_where_they_may_be_published(checkpoint: Path, data: Path, tmp_path: Path):
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--publish-proof"))
    assert result.exit_code == 0, result.stderr
    proof = load(tmp_path / "safety").facts.proof
    assert all(prompt.text and not prompt.token_ids for prompt in proof)
    pictures = [name for prompt in proof for name in prompt.images]
    originals = {(data / f"{name}.png").read_bytes() for name in ("wide", "tall", "square")}
    assert pictures and all((tmp_path / "safety" / name).read_bytes() in originals for name in pictures)
    (tmp_path / "safety" / pictures[0]).unlink()
    with pytest.raises(PackageError, match=rf"'{pictures[0]}', a proof prompt's, is no file of this folder"):
        load(tmp_path / "safety")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: 0 * w, "never trained"),
        (lambda w: torch.eye(len(w)), "never trained"),
        (lambda w: -5 * torch.eye(len(w)), "never trained"),
        (lambda w: 1e-6 * w, "never trained"),
        (lambda w: w[:, :1] @ w[:1], "has rank one"),
    ],
    ids=["zero", "identity", "-5 I", "1e-6 W", "rank one"],
)
def test_a_steer_matrix_that_steers_nothing_is_refused(
    fitted: tuple[Path, Result], tmp_path: Path, damage: Callable[[torch.Tensor], torch.Tensor], message: str
):
    sound = load(fitted[0])
    replace(sound, steer_matrix=damage(sound.steer_matrix)).save(tmp_path)
    with pytest.raises(PackageError, match=message):
        load(tmp_path)


def test_facts_can_be_measured_again_from_the_folder(
    fitted: tuple[Path, Result], data: Path, fit_model: FitModel, prompt_states: Callable[..., torch.Tensor]
):
    """The stored prober is the trained one with its temperature, and gives the same facts on the stored layer."""
    artifact = load(fitted[0])
    read = read_data([data / "pairs.jsonl"], [data / "benign.jsonl"])
    arranged = arrange.arrange(read, [], fit_model, Console(quiet=True), augment=True, target_fpr=None, seed=0)
    t, items, split = arranged.table, arranged.prompts, arranged.split
    everything = [item.prompt for item in arranged.items]
    states, unsafe = prompt_states(everything, fast=True)[:, artifact.facts.split_layer - 1, MEAN], t.unsafe
    weight = arrange.training_weights(t)
    raw, logits = prober.train_on_folds(states, unsafe, t.taught, seed=0, weight=weight)
    temperature = artifact.facts.calibration["temperature"]
    assert temperature != pytest.approx(1, abs=0.05)
    assert calibrate.fit_temperature(logits[split.used], unsafe[split.used]) == pytest.approx(temperature, abs=0.01)
    expected = prober.p_unsafe(calibrate.fold_temperature(raw, temperature), states)
    np.testing.assert_allclose(prober.p_unsafe(artifact.prober, states), expected, atol=1e-2)
    p = prober.p_unsafe(artifact.prober, states[split.heldout])
    groups = [items[i].group for i in split.heldout]
    clusters = [items[i].cluster for i in split.heldout]
    again = calibrate.heldout_facts(p, unsafe[split.heldout], groups, clusters, threshold=0.5)
    stored = {name: artifact.facts.calibration[name] for name in again}
    assert again.pop("ece") == pytest.approx(stored.pop("ece"), abs=0.02)  # a score at the edge of a bin moves it
    assert again == pytest.approx(stored, abs=1e-3)


def test_table_and_progress_go_to_stderr(fitted: tuple[Path, Result]):
    stderr = fitted[1].stderr
    assert [line.split()[1] for line in stderr.splitlines() if "<- split here" in line] == ["2"]
    assert "SAS with picture" in stderr
    assert "hidden states" in stderr


def test_refusal_head_is_measured_on_prompts_it_was_not_trained_on(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: list[torch.Tensor] = []
    train = head_fit.train_refusal_head
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"prompt": f"never say {i}"}) for i in range(5)), encoding="utf-8")

    def spy(seen: torch.Tensor, heldout: torch.Tensor, *args: Any, **options: Any) -> RefusalHead:
        taken.extend((seen, heldout))
        return train(seen, heldout, *args, **options)

    monkeypatch.setattr(head_fit, "train_refusal_head", spy)
    assert fit(*command(checkpoint, data, tmp_path / "safety", "--refusal-only", str(more))).exit_code == 0
    seen, heldout = ({tuple(row.flatten().tolist()) for row in states} for states in taken)
    facts = load(tmp_path / "safety").facts
    measured = int(facts.calibration["heldout_unsafe"])
    trained = 60 - measured + 5
    assert len(seen) == facts.training["refusal_prompts"] == trained + (trained + 1) // 2  # half in dialogues, too
    assert len(heldout) == measured + (measured + 1) // 2
    assert not seen & heldout
    assert facts.training["prompts"] == 120  # the prober saw none of the five


def test_refusal_head_learns_dialogues_that_begin_with_the_models_own_answers(
    checkpoint: Path, data: Path, fit_model: FitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that knew single prompts alone lost to the answer before: "sure, here is how to ..." was said again."""
    asked: list[Prompt] = []
    states = head_fit.answer_states

    def spy(model: FitModel, prompts: Sequence[Prompt], *args: Any, **options: Any) -> States:
        asked.extend(prompts)
        return states(model, prompts, *args, **options)

    monkeypatch.setattr(head_fit, "answer_states", spy)
    assert fit(*command(checkpoint, data, tmp_path / "safety")).exit_code == 0
    items = read_data([data / "pairs.jsonl"]).labelled()
    harmless = {item.prompt.text for item in items if not item.unsafe and not item.prompt.images}
    before = dict(prompt.earlier for prompt in asked if prompt.earlier)
    assert set(before) <= harmless
    question, answer = next(iter(before.items()))
    inputs = encode(fit_model, Prompt(question), generation=True)
    limit = {"do_sample": False, "max_new_tokens": head_fit.EARLIER_TOKENS}
    ids = fit_model.hf_model.generate(**inputs, **limit)[0, inputs["input_ids"].shape[1] :]
    assert answer == fit_model.decode(ids.tolist())


def test_a_multimodal_fit_without_pictures_warns_and_says_so_in_its_facts(checkpoint: Path, data: Path, tmp_path: Path):
    """Its package would guard pictures with a gate that never saw one, and nothing would say so."""
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--text-only", "--prober", "paper"))
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    assert "warning: NO PICTURE IS AMONG THE FIT'S PROMPTS" in result.stderr
    assert facts.calibration["prompts_with_pictures"] == 0
    assert load(tmp_path / "safety").firing_above(0.7).facts.calibration == {"prompts_with_pictures": 0}
    assert (facts.pooling, facts.training["augmented_prompts"]) == ("last", 0)


@pytest.mark.parametrize("select", ["sas", "prober"])
def test_layer_is_the_one_with_the_highest_score(checkpoint: Path, data: Path, tmp_path: Path, select: str):
    result = fit(*command(checkpoint, data, tmp_path / "safety", "--select", select))
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    score = {s.layer: s.sas if select == "sas" else s.prober_accuracy for s in facts.layers}
    assert score[facts.split_layer] == max(score.values())
    assert facts.selected_by == select
    assert f"at layer {facts.split_layer} (chosen by {select})" in result.stdout


def test_same_seed_gives_the_same_folder(checkpoint: Path, data: Path, tmp_path: Path):
    for name in ("a", "b"):
        assert fit(*command(checkpoint, data, tmp_path / name)).exit_code == 0
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(a.prober[name], b.prober[name]) for name in a.prober)
    assert torch.equal(a.steer_matrix, b.steer_matrix)
    assert a.facts.calibration == b.facts.calibration


def test_target_fpr_sets_a_threshold_whose_bound_is_within_it(checkpoint: Path, data: Path, tmp_path: Path):
    arguments = command(
        checkpoint, data, tmp_path / "safety", "--benign", str(data / "benign.jsonl"), "--target-fpr", "0.2"
    )
    result = fit(*arguments)
    assert result.exit_code == 0, result.stderr
    facts = load(tmp_path / "safety").facts
    assert facts.calibration["fpr_upper_95"] <= 0.2
    assert facts.threshold != 0.5


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--layer", "4"), 5, "--layer 4: tiny can be split at 1..3"),
        (("--target-fpr", "0.01"), 5, "it takes 299"),
        (("--benign", "none.jsonl"), 5, "none.jsonl: not readable"),
        (("--layer", "1", "--select", "sas"), 2, "exclude each other"),
        (("--threshold", "0.4", "--target-fpr", "0.1"), 2, "exclude each other"),
        (("--threshold", "1"), 2, "--threshold"),
        (("--strength", "0"), 2, "--strength"),
        (("--refusal-text", " "), 2, "--refusal-text is empty"),
        (("--images", "gone"), 2, "'--images'"),
        (("--frobnicate",), 2, "No such option"),
    ],
)
def test_bad_wish_is_refused_before_the_forward_passes(
    checkpoint: Path, data: Path, tmp_path: Path, more: tuple[str, ...], code: int, message: str
):
    result = fit(*command(checkpoint, data, tmp_path / "safety", *more))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "hidden states" not in result.stderr
    assert not (tmp_path / "safety").exists()


def test_damaged_image_is_refused_before_the_forward_passes(checkpoint: Path, data: Path, tmp_path: Path):
    rows = [{"unsafe": f"bad {i}", "safe": f"good {i}", "image": "cut.png"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "cut.png").write_bytes((data / "wide.png").read_bytes()[:500])
    result = fit(*command(checkpoint, tmp_path, tmp_path / "safety"))
    assert result.exit_code == 5
    assert "pairs.jsonl:1: " in result.stderr and "cut.png: not a readable image" in result.stderr
    assert "hidden states" not in result.stderr


@pytest.mark.parametrize("option", ["--pairs", "--unsafe", "--refusal-only", "--test-benign"])
def test_a_prompt_that_is_too_long_is_refused_with_its_line_before_the_forward_passes(
    checkpoint: Path, data: Path, tmp_path: Path, option: str
):
    """--refusal-only was looked at last, when all other states were there."""
    long = {"unsafe": "x" * 300, "safe": "y"} if option == "--pairs" else {"prompt": "x" * 300}
    (tmp_path / "long.jsonl").write_text(f"\n{json.dumps(long)}\n", encoding="utf-8")
    result = fit(*command(checkpoint, data, tmp_path / "safety", option, str(tmp_path / "long.jsonl")))
    assert result.exit_code == 5
    assert re.search(r"long\.jsonl:2: the prompt takes 3\d\d tokens, the model 256 at most", result.stderr)
    assert not {"hidden states", "checkpoint files"} & set(re.findall("[a-z]+ [a-z]+", result.stderr))


def test_lengths_count_what_each_picture_takes(fit_model: FitModel, data: Path):
    """They were estimated by the first picture, and the error came in the middle of the states."""
    square, wide = (Prompt("x" * 200, (data / f"{name}.png",), f"p:{n}") for n, name in enumerate(("square", "wide")))
    tokens = [encode(fit_model, prompt, generation=False)["input_ids"].shape[1] for prompt in (square, wide)]
    assert tokens[0] < tokens[1] < 256
    check_lengths(fit_model, [square, replace(wide, text="x" * (456 - tokens[1]))], generation=False)
    longer = replace(wide, text="x" * (457 - tokens[1]))
    with pytest.raises(InputError, match="p:1: the prompt takes 257 tokens, the model 256 at most"):
        check_lengths(fit_model, [square, longer], generation=False)
    check_lengths(fit_model, [longer], generation=False, package=256)  # which may cut the picture otherwise
    with pytest.raises(InputError, match=r"p:1: the prompt takes \d+ tokens, the package 100 at most"):
        check_lengths(fit_model, [longer], generation=False, package=100)


def test_model_that_is_not_there_is_a_package_error(data: Path, tmp_path: Path):
    result = fit(*command(tmp_path / "no-such-model", data, tmp_path / "safety"))
    assert result.exit_code == 3
    assert "no such folder, hub id or alias" in result.stderr


def test_output_that_exists_is_replaced_only_with_force_and_only_if_it_is_a_safety_folder(
    checkpoint: Path, data: Path, tmp_path: Path
):
    output = tmp_path / "safety"
    output.mkdir()
    (output / "safety.json").write_text("old", encoding="utf-8")
    refused = fit(*command(checkpoint, data, output))
    assert (refused.exit_code, (output / "safety.json").read_text(encoding="utf-8")) == (5, "old")
    assert "give --force" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    foreign = fit(*command(checkpoint, data, tmp_path / "mine", "--force"))
    assert foreign.exit_code == 5
    assert "has no safety.json, so it is not ours to replace" in foreign.stderr
    assert fit(*command(checkpoint, data, output, "--force")).exit_code == 0
    assert load(output).facts.model == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "safety"]


def test_interrupt_while_writing_leaves_the_old_folder_whole(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "safety"
    output.mkdir()
    (output / "safety.json").write_text("old", encoding="utf-8")

    def interrupted(self: SafetyArtifact, folder: Path, pictures: object) -> None:
        (folder / "safety.json").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetyArtifact, "save", interrupted)
    result = fit(*command(checkpoint, data, output, "--force"))
    assert (result.exit_code, (output / "safety.json").read_text(encoding="utf-8")) == (130, "old")
    assert result.stderr.endswith("autosteer-fit: interrupted\n")
    assert "the same command continues from there" in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".safety.states", "safety"]


def test_installed_command_prints_one_line_and_with_debug_the_traceback(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"unsafe": "x", "safe": "y"}\n', encoding="utf-8")
    run = [sys.executable, "-m", "autosteer.export.safety.cli", *command(tmp_path, tmp_path, tmp_path / "out")]
    plain = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stdout) == (5, "")
    assert plain.stderr == "autosteer-fit: error: --pairs: 1 pairs, at least 20 are needed; add rows\n"
    debug = subprocess.run([*run, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in debug.stderr


def test_help_does_not_import_torch():
    code = "import sys\nfrom autosteer.export.safety import cli\nassert 'torch' not in sys.modules, 'torch'"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
