"""autosteer.json: everything that the export knows about a package. A loader in any language must parse it.

The runtime never guesses what is not here. Unknown keys, missing keys and wrong types are errors: a runtime that
ignored a key might run the gate wrongly.

    manifest_format.py   the dataclasses
    manifest_checks.py   what must agree with what
    here                 reads and writes the file, and compares the package's files with their hashes
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import PackageError
from .manifest_checks import LARGEST_WINDOW, MAX_P_UNSAFE_TOLERANCE, check_consistency
from .manifest_format import (
    ATTENTION_BIAS,
    GATE_GRAPHS,
    IMAGE_GRAPHS,
    PREFILL_GRAPHS,
    ROTARY_TABLES,
    UNSIGNED,
    AnyresSpec,
    CacheType,
    Check,
    ClosestGridSpec,
    Contents,
    DataFile,
    Dims,
    DraftSpec,
    FrameGroup,
    GateProof,
    Golden,
    GraphSpec,
    ImageSpec,
    KVCacheSpec,
    LongRotary,
    MonitorSpec,
    NativeSpec,
    NativeVideoSpec,
    Precision,
    ProberSpec,
    PromptSpec,
    RefusalSpec,
    Resample,
    RotarySpec,
    Source,
    SplitSpec,
    SteeredState,
    TemplatePiece,
    TensorSpec,
    TileSeparators,
    Tolerance,
    TurnSpec,
    VideoSpec,
)
from .strict_json import decode, json_schema, parse, shown

__all__ = [
    "ATTENTION_BIAS",
    "FORMAT_VERSION",
    "GATE_GRAPHS",
    "IMAGE_GRAPHS",
    "LARGEST_WINDOW",
    "MANIFEST_FILE",
    "MAX_P_UNSAFE_TOLERANCE",
    "PREFILL_GRAPHS",
    "ROTARY_TABLES",
    "UNSIGNED",
    "WEIGHTS_FILE",
    "AnyresSpec",
    "CacheType",
    "Check",
    "ClosestGridSpec",
    "DataFile",
    "Dims",
    "DraftSpec",
    "FrameGroup",
    "GateProof",
    "Golden",
    "GraphSpec",
    "ImageSpec",
    "KVCacheSpec",
    "LongRotary",
    "Manifest",
    "MonitorSpec",
    "NativeSpec",
    "NativeVideoSpec",
    "Precision",
    "ProberSpec",
    "PromptSpec",
    "RefusalSpec",
    "Resample",
    "RotarySpec",
    "Source",
    "SplitSpec",
    "SteeredState",
    "TemplatePiece",
    "TensorSpec",
    "TileSeparators",
    "Tolerance",
    "TurnSpec",
    "VideoSpec",
    "schema_text",
    "sha256",
    "signed",
]

FORMAT_VERSION = 5
MANIFEST_FILE = "autosteer.json"
LARGE_FILE = 16 << 20  # bytes: larger files are hashed while the graphs load
WEIGHTS_FILE = "weights.bin"  # the large tensors of all graphs


class Manifest(Contents):
    """The whole package."""

    def save(self, folder: Path) -> None:
        """Write autosteer.json into `folder`. Raises ValueError for NaN and infinities, which JSON does not have."""
        contents = dataclasses.asdict(self) | {"manifest_sha256": UNSIGNED}
        text = json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False)
        written = folder / f"{MANIFEST_FILE}.new"
        written.write_text(signed(text + "\n"), encoding="utf-8", newline="\n")
        written.replace(folder / MANIFEST_FILE)  # at once: a package that is changed is whole at every moment

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read and check autosteer.json. `verify` checks the files.

        Raises PackageError if it is missing, not JSON, of another format version, damaged (its own hash differs), or
        inconsistent.
        """
        path = folder / MANIFEST_FILE
        try:
            if path.exists() and not path.is_file():
                raise ValueError("not a file")  # never wait for a pipe
            text = path.read_bytes().decode("utf-8")
            data = parse(text)
        except (FileNotFoundError, NotADirectoryError):
            raise PackageError(
                f"{folder}: no {MANIFEST_FILE} here; is this a folder made by autosteer-export?"
            ) from None
        except (OSError, ValueError) as err:
            raise PackageError(f"{path}: not readable as JSON ({err})") from err
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise PackageError(
                f"{path}: format_version {shown(version)}, this runtime reads {FORMAT_VERSION}; export the model again"
            )
        manifest = decode(Manifest, data, str(path))
        digest = manifest.manifest_sha256
        if len(digest) != len(UNSIGNED) or digest == UNSIGNED or text != signed(text, digest):
            raise PackageError(
                f"{path}: its own sha256 differs (damaged or edited); export the package again or copy it again"
            )
        check_consistency(manifest, str(path))
        return manifest

    @contextlib.contextmanager
    def verifying(self, folder: Path) -> Iterator[None]:
        """Compare every file with its hash: small ones before the block, large ones in a thread while it runs.

        The block may load the large files, which are plain numbers, but must not answer from them: they are verified
        only when it ends. Raises PackageError naming a file that is missing or differs.
        """
        large = {file.file for file in self.files if file.bytes >= LARGE_FILE}
        self.verify(folder, self.paths().keys() - large)
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(self.verify, folder, large)
            try:
                yield
            finally:
                checked.result()  # raise for a wrong hash rather than for what it broke in the block

    def verify(self, folder: Path, files: Collection[str] | None = None) -> None:
        """Compare `files` (default: all) with their hashes. Raises PackageError naming the first file that is missing
        or differs.
        """
        if WEIGHTS_FILE not in self.paths() and (folder / WEIGHTS_FILE).exists():  # graphs read it all the same
            raise PackageError(f"{folder / WEIGHTS_FILE}: has no hash in {MANIFEST_FILE}; export the package again")
        sizes = {data.file: data.bytes for data in self.files}  # graphs have none
        for file, expected in self.paths().items():
            if files is not None and file not in files:
                continue
            path, digest = folder / file, None
            try:
                if path.is_file():
                    fits = sizes.get(file) in (None, path.stat().st_size)  # hashing 4 GB takes 3 s
                    digest = sha256(path) if fits else ""
            except OSError as err:
                raise PackageError(f"{path}: not readable ({err})") from err
            if digest is None:
                raise PackageError(f"{path}: missing; export the package again or copy it again")
            if digest != expected:
                raise PackageError(
                    f"{path}: {'sha256' if digest else 'its size'} differs from {MANIFEST_FILE} (package damaged or "
                    "edited); export it again or copy it again"
                )


def signed(text: str, digest: str = UNSIGNED) -> str:
    """A manifest's text with its SHA-256 in the place of `digest`: that of the text with UNSIGNED there."""
    return text.replace(digest, hashlib.sha256(text.replace(digest, UNSIGNED).encode()).hexdigest())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def schema_text() -> str:
    """The content of autosteer.schema.json, from the dataclasses above. To regenerate it:

    python -m autosteer.runtime.manifest > runtime/autosteer.schema.json
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"{MANIFEST_FILE} {FORMAT_VERSION}"}
    return json.dumps(head | json_schema(Manifest), indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
