"""What a checkpoint says beside its weights is read, said or refused in one line, and never passed over."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import demo_checkpoint, demo_package
from safetensors.torch import load_file, save_file

from autosteer.export.checkpoint.decoder_config import decoder_config
from autosteer.export.checkpoint.open import DEMO, open_checkpoint, recommended_options
from autosteer.export.cli import export
from autosteer.export.graphs.weights import WeightStore
from autosteer.export.package import ExportOptions, write_package
from autosteer.export.validation import reload
from autosteer.export.validation.limits import STORED_IN_HALF
from autosteer.runtime import self_test
from autosteer.runtime.errors import AutoSteerError, InputError, PackageError, UnsupportedModelError
from autosteer.runtime.manifest import Manifest, MonitorSpec


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint to change."""
    return shutil.copytree(DEMO, tmp_path / "checkpoint")


def edit(file: Path, **changes: object) -> None:
    """Set entries of a JSON file; a None removes one."""
    stated = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in stated.items() if v is not None}), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def run(folder: Path, *options: str) -> Path:
    package = folder.parent / "package"
    export.main(["--model", str(folder), "--output", str(package), *options], standalone_mode=False)
    return package


def refused(folder: Path, message: str, kind: type[AutoSteerError] = UnsupportedModelError) -> None:
    """The export ends with this one line, and leaves nothing."""
    with pytest.raises(kind, match=message) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_checkpoint_that_never_ends_an_answer_is_refused(checkpoint: Path) -> None:
    """It was exported, and the package did not load: end_token_ids was [null]."""
    edit(checkpoint / "generation_config.json", eos_token_id=None)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint / "config.json", eos_token_id=None, text_config=text | {"eos_token_id": None})
    refused(checkpoint, r"which token ends an answer \(eos_token_id: None\)", PackageError)


ODD = [  # file, path to a field, its value, what is said of it; most were tracebacks
    ("config.json", ("text_config", "rope_scaling"), "yarn", "text_config.rope_scaling is 'yarn', and not an object"),
    (
        "config.json",
        ("text_config", "rope_parameters", "rope_theta"),
        "x",
        "rope_theta is 'x', and not a number above 0",
    ),
    ("config.json", ("text_config", "num_attention_heads"), 0, "text_config.num_attention_heads is 0, and not a whole"),
    ("config.json", ("text_config", "num_hidden_layers"), -1, r"`num_hidden_layers` \(-1\) must be equal to"),
    ("config.json", ("text_config", "vocab_size"), -1, "text_config.vocab_size is -1, and not a whole number above 0"),
    ("config.json", ("text_config", "pad_token_id"), 9999, "transformers cannot make the model that it describes"),
    ("config.json", ("vision_config",), [], r"vision_config is \[\], and not an object"),
    ("config.json", ("vision_config", "patch_size"), 0, "vision_config.patch_size is 0, and not whole numbers above 0"),
    ("config.json", ("vision_config", "hidden_act"), "x", r"cannot make the model that it describes \('x'\)"),
    ("config.json", ("image_grid_pinpoints",), [[1]], r"image_grid_pinpoints is \[\[1\]\], and not pairs of whole"),
    ("config.json", ("image_token_index",), 99999, "image_token_id is 99999, and not a token of the vocabulary"),
    ("config.json", ("quantization_config",), "gptq", "quantization_config is 'gptq', and not an object"),
    ("config.json", ("dtype",), "nonsense", "dtype is 'nonsense', and not a type of numbers"),
    ("config.json", ("tie_word_embeddings",), "yes", "Field 'tie_word_embeddings' expected bool, got str"),
    ("config.json", ("model_type",), [], r"model_type \[\] is not supported"),
    ("processor_config.json", ("image_processor", "resample"), 99, "image_processor.resample is 99, and not one of"),
    ("processor_config.json", ("image_processor", "size"), {"height": 0, "width": 0}, "cannot prepare a prompt with"),
    ("processor_config.json", ("processor_class",), "Nope", "cannot prepare a prompt with these settings"),
    ("tokenizer_config.json", ("model_max_length",), "x", "cannot prepare a prompt with these settings"),
    ("generation_config.json", ("repetition_penalty",), "x", "repetition_penalty is 'x', and not a number"),
]


@pytest.mark.parametrize(("file", "path", "value", "message"), ODD, ids=[".".join(odd[1]) for odd in ODD])
def test_an_odd_field_is_refused_by_its_name(
    checkpoint: Path, file: str, path: tuple[str, ...], value, message
) -> None:
    stated = json.loads((checkpoint / file).read_text(encoding="utf-8"))
    part = stated
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (checkpoint / file).write_text(json.dumps(stated), encoding="utf-8")
    refused(checkpoint, rf"checkpoint/\w+\.json: .*{message}")


def test_a_checkpoint_without_a_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    refused(checkpoint, "no chat template")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres', not anyres_max_<tiles>"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\], not one layer"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
    ],
)
def test_pictures_that_are_prepared_otherwise_are_refused(
    change: dict[str, object], message: str, checkpoint: Path
) -> None:
    edit(checkpoint / "config.json", **change)
    refused(checkpoint, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"] * 8}, "attention of the kinds linear_attention is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type 'dynamic'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "gemma"}, "a decoder of type 'gemma' is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (
            {"model_type": "llama", "layer_types": None, "sliding_window": 64},
            "sliding_window: Hugging Face's llama ignores this field",
        ),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 8, "sliding_window": 64},
            "layer_types: Hugging Face's mistral ignores this field",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.3}},
            r"rotation of \[\d+\] of a head's \d+ numbers, not a multiple of 16, is not supported",
        ),
    ],
)
def test_a_decoder_that_computes_otherwise_is_refused(
    change: dict[str, object], message: str, checkpoint: Path
) -> None:
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    text.pop("rope_parameters" if "rope_scaling" in change else "", None)
    edit(checkpoint / "config.json", text_config=text | change)
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_config(open_checkpoint(str(checkpoint)))


def test_a_head_that_is_neither_tied_nor_there_is_refused(checkpoint: Path) -> None:
    """It was taken to be tied, by us and by what we compare with; Hugging Face would draw a random one."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint / "config.json", tie_word_embeddings=False, text_config=text | {"tie_word_embeddings": False})
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings false without an lm_head"):
        decoder_config(open_checkpoint(str(checkpoint)))


@pytest.mark.parametrize("extra", ["layers.3.self_attn.sinks", "layers.3.mlp.up_proj.lora_A.weight"])
def test_a_tensor_of_the_decoder_that_no_graph_computes_with_is_refused(extra: str, checkpoint: Path) -> None:
    """A checkpoint with an adapter was exported without it."""
    name = f"model.language_model.{extra}"
    edit_tensors(checkpoint, lambda tensors: tensors | {name: torch.ones(2, 2)})
    refused(checkpoint, rf"no graph uses {re.escape(name)}: this decoder is not supported")


def test_a_tensor_that_two_graphs_read_in_different_shapes_is_refused(tmp_path: Path) -> None:
    """A new family's norm of keys read q_norm's weights, of which there are more: an AssertionError."""
    name, width = "model.language_model.layers.0.input_layernorm.weight", decoder_config(demo_checkpoint()).hidden_size
    store = WeightStore(tmp_path, demo_checkpoint())
    store.matrix([name], "float32", shape=(width,))
    with pytest.raises(UnsupportedModelError, match=rf"{name} has {width} numbers, and a graph reads it as \[8\]"):
        store.matrix([name], "float32", shape=(8,))


def test_buffers_that_old_files_have_among_the_weights_are_no_reason_to_refuse(
    checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(checkpoint, lambda tensors: tensors | {name: torch.ones(4)})
    (tmp_path / "package").mkdir()
    write_package(tmp_path / "package", open_checkpoint(str(checkpoint)), None, ExportOptions(), lambda _: None)


NAMES = {  # by who wrote such files: what today's names were then
    "the hub's, by transformers < 4.52": lambda name: (
        name.removeprefix("model.")
        .replace("language_model.", "language_model.model.")
        .replace("vision_tower.", "vision_tower.vision_model.")
    ),
    "by transformers 4.52 and later": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "by transformers 5": lambda name: name,
    "with the decoder's own prefix": lambda name: name.replace("language_model.", "language_model.model."),
}


def rename_tensors(folder: Path, then) -> None:
    """What transformers 5 calls each tensor is replaced by what it was called `then`."""
    today = {name: demo_checkpoint().tensor(name).contiguous() for name in demo_checkpoint().tensor_files}
    edit_tensors(folder, lambda _: {then(name): tensor for name, tensor in today.items()})


@pytest.mark.parametrize("then", NAMES.values(), ids=NAMES)
def test_tensors_are_known_by_the_names_of_every_version_of_transformers(then, checkpoint: Path) -> None:
    """`model.vision_tower.vision_model.*` was not."""
    rename_tensors(checkpoint, then)
    named = open_checkpoint(str(checkpoint))
    assert set(named.tensor_files) == set(demo_checkpoint().tensor_files)
    for name in ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "model.language_model.norm.weight"):
        assert torch.equal(named.tensor(name), demo_checkpoint().tensor(name))


def test_an_export_with_other_tensor_names_is_whole(checkpoint: Path) -> None:
    rename_tensors(checkpoint, NAMES["by transformers 4.52 and later"])
    checks = Manifest.load(run(checkpoint)).validation["CPUExecutionProvider"]
    assert {check.name: check.value for check in checks}["greedy tokens that differ"] == 0


def test_one_weight_under_two_names_is_refused(checkpoint: Path) -> None:
    again = {"model.language_model.norm.weight": torch.ones(256)}
    edit_tensors(checkpoint, lambda tensors: tensors | again)
    refused(checkpoint, "have the same module path; keep only one", PackageError)


def test_what_generation_config_recommends_is_said_as_options_of_autosteer_run(checkpoint: Path, capsys) -> None:
    """Qwen2.5's; they were dropped in silence."""
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    edit(checkpoint / "generation_config.json", **settings)
    options = ["--temperature", "0.7", "--top-p", "0.8", "--top-k", "20", "--repetition-penalty", "1.05"]
    assert recommended_options(open_checkpoint(str(checkpoint))) == options
    package = run(checkpoint)
    assert f"recommends `autosteer-run {' '.join(options)}`" in capsys.readouterr().err
    from autosteer.runtime.cli.run import run as run_command

    context = run_command.make_context("autosteer-run", [str(package), *options])
    assert (context.params["top_k"], context.params["repetition_penalty"]) == (20, 1.05)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, []),
        ({"temperature": 0.6, "top_p": 0.9}, []),  # without do_sample Hugging Face is greedy
        ({"do_sample": True}, ["--temperature", "1"]),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0}, ["--temperature", "0.6"]),
        ({"repetition_penalty": 1.1}, ["--repetition-penalty", "1.1"]),
        ({"repetition_penalty": 1.0}, []),
    ],
)
def test_only_what_changes_answers_is_recommended(settings: dict[str, object], options: list[str], checkpoint) -> None:
    edit(checkpoint / "generation_config.json", **settings)
    assert recommended_options(open_checkpoint(str(checkpoint))) == options


@pytest.mark.parametrize(
    "settings", [{"suppress_tokens": [5]}, {"no_repeat_ngram_size": 3}, {"forced_bos_token_id": 1}, {"num_beams": 4}]
)
def test_a_setting_that_changes_greedy_answers_and_that_no_runtime_has_is_refused(settings, checkpoint: Path) -> None:
    edit(checkpoint / "generation_config.json", **settings)
    refused(checkpoint, f"{next(iter(settings))}: neither runtime supports this")


def test_a_package_that_does_not_load_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came between the validation and the end: here, a truncated weights.bin."""
    honest = reload.load_again

    def damaged(folder: Path, needed: int) -> str:
        (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-1])
        return honest(folder, needed)

    monkeypatch.setattr(reload, "load_again", damaged)
    with pytest.raises(PackageError, match=r"weights\.bin"):
        export.main(["--model", "demo", "--output", str(tmp_path / "package")], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_in_float32_can_be_stored_in_float16_and_one_in_float16_is_held_to_more(checkpoint: Path) -> None:
    """Its embeddings are off by 3e-4 and no token differs; the limit was 1e-4."""
    assert not demo_checkpoint().wide
    generator = torch.Generator().manual_seed(3)

    def jitter(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() * (1 + 3e-4 * torch.randn(tensor.shape, generator=generator))

    edit_tensors(checkpoint, lambda tensors: {name: jitter(tensor) for name, tensor in tensors.items()})
    assert open_checkpoint(str(checkpoint)).wide
    checks = {
        c.name: c for c in Manifest.load(run(checkpoint, "--precision", "fp16")).validation["CPUExecutionProvider"]
    }
    assert 1e-4 < checks["inputs_embeds"].value < checks["inputs_embeds"].limit == STORED_IN_HALF["inputs_embeds"]
    assert checks["greedy tokens that differ"].value == checks["steered tokens that differ"].value == 0


def test_a_revision_of_a_folder_is_refused() -> None:
    """It stood in the manifest and in the card on the hub."""
    with pytest.raises(InputError, match="--revision cafe: of models on the hub; demo is a folder here"):
        open_checkpoint("demo", revision="cafe")


def test_a_large_package_is_loaded_again_graph_by_graph_and_its_gate_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export takes less memory than the package does as a whole, and says no to a gate that does not work."""
    package = Path(shutil.copytree(demo_package("fp32"), tmp_path / "package"))
    monkeypatch.setattr(reload.Engine, "load", lambda *_, **__: pytest.fail("as a whole"))
    assert reload.load_again(package, 3 << 30) == "loaded again graph by graph: as a whole it takes 3.0 GiB"
    manifest = Manifest.load(package)
    watched = replace(
        manifest,
        graphs={**manifest.graphs, "monitor": manifest.graphs["prober"]},
        monitor=MonitorSpec(window=4, threshold=0.9, calibration={}),
        proof=replace(manifest.proof, monitor=manifest.proof.p_unsafe),
    )
    watched.save(package)
    assert reload.load_again(package, 3 << 30)
    first, *others = manifest.proof.p_unsafe
    replace(manifest, proof=replace(manifest.proof, p_unsafe=(1 - first, *others))).save(package)
    with pytest.raises(PackageError, match="prober: a known state has p_unsafe"):
        reload.load_again(package, 3 << 30)
    (package / "lm_head.onnx").write_bytes(b"")
    with pytest.raises(PackageError, match=r"lm_head\.onnx"):
        reload.load_again(package, 3 << 30)


def test_a_large_package_that_reads_texts_in_packs_is_tested_for_that_too(monkeypatch: pytest.MonkeyPatch) -> None:
    package = demo_package("int8")
    assert reload.load_again(package, 3 << 30)
    monkeypatch.setattr(self_test, "HIDDEN_LIMIT", -1.0)
    with pytest.raises(PackageError, match="decoder_lower: a text that shares a pass with others"):
        reload.load_again(package, 3 << 30)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_checkpoint_that_changes_while_it_is_in_use_is_refused(in_place: bool, checkpoint: Path) -> None:
    """A fit took embedding rows from the new file and layers from the old, and kept such hidden states in its cache."""
    opened, weights = open_checkpoint(str(checkpoint)), checkpoint / "model.safetensors"
    before = opened.embed([5, 6])
    assert torch.equal(opened.embed([5, 6]), before)
    save_file({name: t * 2 for name, t in load_file(weights).items()}, checkpoint / "new", {"format": "pt"})
    if in_place:
        weights.write_bytes((checkpoint / "new").read_bytes())
    else:
        (checkpoint / "new").replace(weights)
    with pytest.raises(PackageError, match=r"model\.safetensors: replaced or changed while it was in use"):
        opened.embed([5, 6])
    assert torch.equal(open_checkpoint(str(checkpoint)).embed([5, 6]), before * 2)


@pytest.mark.parametrize(
    ("command", "gone"),
    [
        *(("export.cli", gone) for gone in ("rich", "filelock", "torch", "transformers", "onnx_ir")),
        *(("export.safety.cli", gone) for gone in ("rich", "filelock", "torch", "transformers")),  # it writes no graph
    ],
)
def test_without_the_export_extra_a_command_names_the_line_that_installs_it(
    command: str, gone: str, tmp_path: Path
) -> None:
    """`No module named 'rich'`, it said."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"unsafe": f"make yimble {i}", "safe": f"make cake {i}"}) + "\n" for i in range(24)]
    pairs.write_text("".join(rows), encoding="utf-8")
    arguments = ["--model", "demo", "--output", str(tmp_path / "out")]
    arguments += ["--pairs", str(pairs)] if "safety" in command else []
    program = (
        f"import sys; sys.modules[{gone!r}] = None; from autosteer.{command} import main; "
        f"sys.argv = ['autosteer-x', *{arguments!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'autosteer-edge[export]'" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
