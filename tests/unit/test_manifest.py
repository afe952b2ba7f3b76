"""autosteer.json: what is written is what is read, and what is not understood is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import toy
from conftest import load
from documents import changed, kinds, manifest_text, places_of, value_at, without
from hypothesis import given, settings
from hypothesis import strategies as st

from autosteer.runtime import Manifest, PackageError
from autosteer.runtime.manifest import Check, Golden, schema_text
from autosteer.runtime.strict_json import json_schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A package whose manifest has something in every field."""
    folder = tmp_path_factory.mktemp("full") / "package"
    manifest = toy.build(folder, videos=True, prefill=True)
    (folder / "golden").mkdir()
    (folder / "golden" / "a.ppm").write_bytes(b"P6 1 1 255 abc")
    goldens = (
        Golden("red", ("golden/a.ppm",), None, 0.1, "pass", (6, 7)),
        Golden("", (), -1.0, None, "steer", (6,), prompt_ids=(5, 6)),
    )
    replace(
        manifest,
        files=(*manifest.files, toy.data_file(folder, "golden/a.ppm")),
        golden=goldens,
        validation={"CPUExecutionProvider": (Check("logits", 1e-6, 1e-3, True), Check("note", 0.5, None, True))},
        source=replace(manifest.source, revision="abc", licence="apache-2.0"),
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def document(full) -> dict[str, Any]:
    return json.loads((full / "autosteer.json").read_text())


@pytest.fixture
def folder(full, tmp_path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "package"))


def written(folder: Path, data: Any) -> Path:
    (folder / "autosteer.json").write_text(manifest_text(data))
    return folder


def same(loaded: Any, data: Any) -> bool:
    """Whether a loaded manifest says what its JSON says, types included; keys with defaults may be absent."""
    if dataclasses.is_dataclass(loaded):
        fields = {f.name: f for f in dataclasses.fields(loaded)}
        return isinstance(data, dict) and all(
            same(getattr(loaded, n), data[n]) if n in data else getattr(loaded, n) == f.default
            for n, f in fields.items()
        )
    if isinstance(loaded, dict):
        return isinstance(data, dict) and loaded.keys() == data.keys() and all(same(loaded[k], data[k]) for k in data)
    if isinstance(loaded, tuple):
        return isinstance(data, list) and len(loaded) == len(data) and all(map(same, loaded, data))
    if isinstance(loaded, float):
        return loaded == data and not isinstance(data, bool)
    return type(loaded) is type(data) and loaded == data


# --- round trip and schema -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guarded": False}, {"images": False}, {"attentive": True}, {"prefill": True}])
def test_what_is_saved_is_what_is_loaded(tmp_path, options):
    saved = toy.build(tmp_path, **options)
    assert Manifest.load(tmp_path) == saved


def test_full_manifest_is_read_back_whole(full, document):
    assert same(Manifest.load(full), document)


def test_schema_that_ships_is_the_one_of_the_dataclasses():
    """To write it again: python -m autosteer.runtime.manifest > runtime/autosteer.schema.json"""
    assert (ROOT / "runtime" / "autosteer.schema.json").read_text(encoding="utf-8") == schema_text()


def test_schema_accepts_what_is_saved(document):
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)


@pytest.mark.parametrize(
    ("keys", "value"), [(("guarded",), 1), (("precision",), "fp8"), (("extra",), 1), (("dims", "vocab_size"), "32")]
)
def test_schema_refuses_what_the_loader_refuses(document, keys, value):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(document, keys, value), json_schema(Manifest))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_schema_accepts_whatever_the_loader_accepts(document, tmp_path_factory, data):
    keys = data.draw(st.sampled_from(list(places_of(document))))
    mutated = changed(document, keys, data.draw(JSON))
    try:
        Manifest.load(written(tmp_path_factory.getbasetemp(), mutated))
    except PackageError:
        return
    jsonschema.validate(mutated, json_schema(Manifest))


def test_nan_is_never_written(full, tmp_path):
    """JSON has none, and a C++ parser stops at it."""
    manifest = Manifest.load(full)
    spoilt = replace(manifest, prober=replace(manifest.prober, calibration={"auroc": float("nan")}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        spoilt.save(tmp_path)


# --- documents that are not understood -------------------------------------------------------------------------------


def test_folder_without_a_manifest_is_said_to_be_none(tmp_path):
    with pytest.raises(PackageError, match=r"no autosteer\.json here"):
        Manifest.load(tmp_path)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(PackageError, match=r"no autosteer\.json here"):
        Manifest.load(tmp_path / "gone")


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackageError):
        Manifest.load(tmp_path / "file")


def test_manifest_cut_anywhere_is_refused(folder):
    text = (folder / "autosteer.json").read_text()
    for length in range(0, len(text.rstrip()), 97):
        (folder / "autosteer.json").write_text(text[:length])
        with pytest.raises(PackageError):
            Manifest.load(folder)


def test_every_key_is_needed(tmp_path, document):
    """Each key of each object, one at a time, but those with a default and the members of dicts, which are data."""
    optional, data = (
        {
            *("tokenizer", "text", "id", "formula", "tile_separators", "lead", "split", "each", "native"),
            *("video", "videos", "seconds", "prompt_ids", "monitor", "frame_group", "long", "windowed"),
            *("closest_grid", "drafts", "judge_answers", "judge_threshold", "manifest_sha256"),
        },
        {"versions", "validation", "calibration"},
    )
    named = [keys for keys in kinds(document) if isinstance(keys[-1], str) and keys[-1] not in optional]
    needed = [keys for keys in named if data.isdisjoint(keys[:-1])]
    assert len(needed) > 80
    for keys in needed:
        with pytest.raises(PackageError, match=str(keys[-1])):
            Manifest.load(written(tmp_path, without(document, keys)))


def test_no_object_takes_a_key_it_does_not_know(tmp_path, document):
    data = {"versions", "validation", "calibration", "graphs"}  # dicts: their keys are names
    for keys in [(), *kinds(document)]:
        if isinstance(value_at(document, keys), dict) and not (keys and keys[-1] in data):
            with pytest.raises(PackageError, match="unknown key 'hello'"):
                Manifest.load(written(tmp_path, changed(document, (*keys, "hello"), 1)))


@pytest.mark.parametrize("wrong", [None, "x", -1.5, True, [], {}, [1, "x"], 10**400])
def test_no_value_of_another_type_is_taken(tmp_path, document, wrong):
    """Whatever loads says what the document says: no value is converted, ignored or filled in."""
    for keys in kinds(document):
        data = changed(document, keys, wrong)
        try:
            manifest = Manifest.load(written(tmp_path, data))
        except PackageError:
            continue
        assert same(manifest, {**data, "manifest_sha256": manifest.manifest_sha256}), keys


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused_everywhere(tmp_path, document, number):
    """Python's json reads NaN and Infinity, and 1e999 becomes inf. `"threshold": Infinity` would pass everything."""
    floats = [keys for keys in kinds(document) if isinstance(value_at(document, keys), float)]
    assert ("prober", "threshold") in floats and ("refusal", "strength") in floats
    for keys in floats:
        text = manifest_text(changed(document, keys, "HERE")).replace('"HERE"', number)
        (tmp_path / "autosteer.json").write_text(text)
        with pytest.raises(PackageError, match=str(next(key for key in reversed(keys) if isinstance(key, str)))):
            Manifest.load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_random_change_is_refused_or_read_as_it_is(document, tmp_path_factory, data):
    """And nothing but PackageError comes out, neither of loading nor of comparing the files."""
    folder = tmp_path_factory.getbasetemp()
    mutated = document
    for _ in range(data.draw(st.integers(1, 3))):
        keys = data.draw(st.sampled_from(list(places_of(mutated))))
        how = data.draw(st.sampled_from(["set", "delete", "copy"]))
        if how == "delete":
            mutated = without(mutated, keys)
        else:
            other = value_at(mutated, data.draw(st.sampled_from(list(places_of(mutated)))))
            mutated = changed(mutated, keys, copy.deepcopy(other) if how == "copy" else data.draw(JSON))
    try:
        manifest = Manifest.load(written(folder, mutated))
        manifest.verify(folder)
    except PackageError:
        pass
    else:
        assert same(manifest, mutated)


# --- the gate --------------------------------------------------------------------------------------------------------


def test_gate_cannot_be_taken_off_by_the_manifest_alone(folder, document):
    """guarded = false with all of the gate removed loads, and then runs under --policy off only."""
    data = {**document, "guarded": False, "prober": None, "refusal": None, "proof": None, "golden": []}
    engine = load(written(folder, data))
    with pytest.raises(PackageError, match="--policy off"):
        engine.generate("bad")


# --- paths and files -------------------------------------------------------------------------------------------------


def test_whole_package_verifies(full):
    Manifest.load(full).verify(full)


FILES = (
    "proof.f32",
    *("embed_tokens.onnx", "decoder_lower.onnx", "decoder_upper.onnx", "lm_head.onnx", "prober.onnx"),
    *("prefill_lower.onnx", "prefill_upper.onnx", "refusal_head.onnx", "vision_encoder.onnx", "tokenizer.json"),
    "golden/a.ppm",
)


def test_every_file_of_a_package_is_verified(full):
    assert set(Manifest.load(full).paths()) == set(FILES)
    on_disk = {str(p.relative_to(full)) for p in full.rglob("*") if p.is_file()}
    assert on_disk == {*FILES, "autosteer.json"}


@pytest.mark.parametrize("file", FILES)
def test_damaged_file_is_named(folder, file):
    """A flipped bit at the beginning, in the middle and at the end; a byte cut off or added; no file; a folder."""
    path = folder / file
    content = path.read_bytes()

    def flipped(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    spoilt = [flipped(0), flipped(len(content) // 2), flipped(len(content) - 1), content[:-1], content + b"\0", b""]
    for bad in spoilt:
        path.write_bytes(bad)
        with pytest.raises(PackageError, match=f"{file}: (sha256|its size) differs"):
            Manifest.load(folder).verify(folder)
    path.unlink()
    with pytest.raises(PackageError, match=f"{file}: missing"):
        Manifest.load(folder).verify(folder)
    path.mkdir()
    with pytest.raises(PackageError, match=f"{file}: missing"):
        Manifest.load(folder).verify(folder)


def test_file_that_cannot_be_read_is_a_package_error(folder, monkeypatch):
    """PermissionError came out as it was: exit code 1 in place of 3."""

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("autosteer.runtime.manifest.sha256", refuse)
    with pytest.raises(PackageError, match=r"not readable \(.*Permission denied"):
        Manifest.load(folder).verify(folder)
