"""Open a Hugging Face checkpoint: a local folder, a hub id, or one of our aliases. Tensors are read one at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from autosteer.models import FAMILIES, Family
from autosteer.runtime.errors import InputError, PackageError, UnsupportedModelError, first_line

from .stated import (
    check_config,
    check_generation_numbers,
    check_processor,
    check_stated,
    in_one_line,
)

if TYPE_CHECKING:
    import torch

    from autosteer.export.graphs.quantize import Blocks, Packed

    from .packed import Matrix, Reader

BLOCK_BYTES = 64 << 20  # of float32, converted at a time
CHANGES_ANSWERS: dict[str, Any] = {  # settings of generation_config.json that neither runtime has: neutral values
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "guidance_scale": 1.0,
    "stop_strings": None,
}
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face layout, its parsed config, and the family file that describes it."""

    folder: Path
    name: str  # what the user called it: hub id or folder name
    revision: str | None
    config: Any  # transformers.PretrainedConfig, without a quantization_config
    family: Family
    quantization: dict[str, Any] | None = None  # config.json's quantization_config: packed.py

    @cached_property
    def tensor_files(self) -> dict[str, tuple[Path, str]]:
        """Where each tensor is stored: HF module path -> (safetensors file, name in that file). A packed matrix is one
        tensor here, at the place of its largest part.
        """
        matrices, parts = self._packed
        plain = {path: place for path, place in self._stored.items() if path not in parts}
        return plain | {path: matrix.place for path, matrix in matrices.items()}

    @cached_property
    def packed(self) -> dict[str, Matrix]:
        """The matrices that are stored in 4 or 8 bits, by module path."""
        return self._packed[0]

    @cached_property
    def _packed(self) -> tuple[dict[str, Matrix], set[str]]:
        from .packed import packed_matrices

        return packed_matrices(self.quantization, self._reader, self.folder / "config.json")

    @cached_property
    def _reader(self) -> Reader:
        from .packed import Reader

        return Reader(self._stored, self._open)

    @cached_property
    def weights(self) -> int:
        """How many there are, all tensors together."""
        return sum(math.prod(self.shape(name)) for name in self.tensor_files)

    @cached_property
    def _opened(self) -> dict[Path, tuple[int, ...]]:
        """The files that were opened: (device, inode, size, time of change) of each."""
        return {}

    def _open(self, path: Path) -> Any:
        """A file of weights. Raises PackageError if it is missing or damaged, or has changed since it was first opened:
        weights are read when they are needed, and those of two models must not be mixed.
        """
        try:
            state = path.stat()
            found = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
            if self._opened.setdefault(path, found) != found:
                raise PackageError(f"{path}: replaced or changed while it was in use; start again")
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise PackageError(f"{path}: missing; the checkpoint needs safetensors weights") from None
        except (SafetensorError, OSError) as err:
            raise PackageError(f"{path}: damaged ({err}); download it again") from err

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, str]]:
        index, whole = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file() and not whole.is_file():  # as Hugging Face does: an index beside it may be stale
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                stored = {name: self.folder / file for name, file in weight_map.items()}
            except (ValueError, LookupError, TypeError, AttributeError) as err:
                raise PackageError(f"{index}: not a safetensors index ({err!r}); download it again") from err
            if gone := sorted({path.name for path in stored.values() if not path.is_file()}):
                raise PackageError(
                    f"{self.folder}: {', '.join(gone)} missing, although the index lists them; download again"
                )
        else:
            with self._open(whole) as file:
                stored = dict.fromkeys(file.keys(), whole)
        found = {self._module_path(name): (path, name) for name, path in stored.items()}
        if len(found) < len(stored):
            twice = [names for names in _grouped(stored, self._module_path).values() if len(names) > 1]
            raise PackageError(f"{self.folder}: {' and '.join(twice[0])} have the same module path; keep only one")
        return found

    def _module_path(self, name: str) -> str:
        for pattern, replacement in self.family.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def tensor(self, module_path: str) -> torch.Tensor:
        """One whole tensor in float32; see `rows`."""
        import torch

        whole, first = torch.empty(self.shape(module_path)), 0
        for block in self.rows(module_path, BLOCK_BYTES):
            whole[first : first + len(block)] = block
            first += len(block)
        return whole

    def shape(self, module_path: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        if module_path in self.packed:
            return self.packed[module_path].shape
        with self._located(module_path) as (file, name):
            return tuple(file.get_slice(name).get_shape())

    def expect(self, module_path: str, shape: Sequence[int]) -> None:
        """Raise PackageError if a tensor's shape is not the one that config.json implies."""
        found = self.shape(module_path)
        if found != tuple(shape):
            raise PackageError(
                f"{self.tensor_files[module_path][0]}: {module_path} is {list(found)}, but config.json wants "
                f"{list(shape)}: they belong to different models"
            )

    def rows(self, module_path: str, block_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor in float32, in blocks of rows of about `block_bytes`. The file is mapped only while it is read.

        Raises PackageError if the tensor is missing or its file is damaged.
        """
        if module_path in self.packed:
            yield from (self.packed[module_path].floats(*ends) for ends in self._ends(module_path, block_bytes))
            return
        with self._located(module_path) as (file, name):
            view = file.get_slice(name)
            shape = view.get_shape()
            step = max(1, block_bytes // (4 * math.prod(shape[1:])))
            for first in range(0, shape[0], step):
                yield view[first : min(first + step, shape[0])].float()

    @property
    def wide(self) -> bool:
        """Whether float16 cannot hold all matrices exactly: some are float32, or packed."""
        plain = [path for path in self.tensor_files if path not in self.packed and len(self.shape(path)) > 1]
        return bool(self.packed) or any(self._reader.dtype(path) in ("F32", "F64") for path in plain)

    def keeps(self, module_path: str, blocks: Blocks) -> bool:
        """Whether a matrix is packed in exactly these blocks."""
        return module_path in self.packed and self.packed[module_path].blocks() == blocks

    def packed_rows(self, module_path: str, block_bytes: int) -> Iterator[Packed]:
        """As `rows`, for a matrix that `keeps` the blocks: its stored codes, scales and zero points."""
        yield from (self.packed[module_path].packed(*ends) for ends in self._ends(module_path, block_bytes))

    def _ends(self, module_path: str, block_bytes: int) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of the rows that are read at a time from a packed matrix."""
        matrix = self.packed[module_path]
        (n, k), unit = matrix.shape, matrix.rows_at_once
        step = max(1, block_bytes // (4 * k * unit)) * unit
        yield from ((first, min(first + step, n)) for first in range(0, n, step))

    @property
    def embedding_scale(self) -> float:
        """What rows of text are multiplied by."""
        return float(self.config.get_text_config().hidden_size) ** 0.5 if self.family.scaled_embedding else 1.0

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Tokens as they enter the decoder, (len(ids), D) float32."""
        return self.gather(f"{self.family.decoder}.embed_tokens.weight", ids) * self.embedding_scale

    def gather(self, module_path: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix in float32, in the given order: (len(rows), ...)."""
        import torch

        if module_path in self.packed:
            matrix, unit = self.packed[module_path], self.packed[module_path].rows_at_once
            starts = [row - row % unit for row in rows]
            read = {first: matrix.floats(first, min(first + unit, matrix.shape[0])) for first in sorted(set(starts))}
            return torch.stack([read[first][row - first] for row, first in zip(rows, starts, strict=True)])
        with self._located(module_path) as (file, name):
            view = file.get_slice(name)
            return torch.cat([view[row : row + 1].float() for row in rows])

    @contextmanager
    def _located(self, module_path: str) -> Iterator[tuple[Any, str]]:
        if module_path not in self.tensor_files:
            raise PackageError(f"{self.folder}: no tensor {module_path!r} in the checkpoint (incomplete download?)")
        path, name = self.tensor_files[module_path]
        with self._open(path) as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                raise PackageError(f"{path}: no tensor {name!r} here, although the index says so; download it again")
            yield file, name

    def __contains__(self, module_path: str) -> bool:
        return module_path in self.tensor_files


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def aliases() -> dict[str, str]:
    """Every short name that --model accepts: alias -> hub id or folder."""
    hub = {alias: repo for family in FAMILIES.values() for alias, repo in family.aliases.items()}
    return {"demo": str(DEMO), **hub}


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open `model`: an alias, a local folder, or a hub id (downloaded by huggingface_hub into its cache).

    Raises PackageError if it cannot be found or downloaded, UnsupportedModelError if no family file describes it.
    """
    from transformers import AutoConfig

    reference = aliases().get(model, model)
    folder = Path(reference)
    name = folder.resolve().name if folder.is_dir() else reference
    if folder.is_dir() and revision is not None:
        raise InputError(f"--revision {revision}: of models on the hub; {model} is a folder here")
    if not folder.is_dir():
        folder = _download(model, reference, revision)
        revision = folder.name
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise PackageError(f"{folder}: no config.json here; not a Hugging Face checkpoint folder")
    try:
        stated = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = stated.get("model_type")
    except (ValueError, AttributeError) as err:
        raise PackageError(f"{config_file}: not a JSON object ({err})") from err
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{config_file}: model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}"
        )
    check_stated(stated, config_file)
    quantization = _quantization(stated, config_file)
    with in_one_line(config_file, "transformers cannot read it"):
        config = AutoConfig.from_pretrained(folder)
    check_config(config, config_file)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del (
                part.quantization_config
            )  # Hugging Face would look for packed tensors, and for the libraries that read them
    return Checkpoint(folder, name, revision, config, FAMILIES[model_type], quantization)


def _quantization(stated: dict[str, Any], config_file: Path) -> dict[str, Any] | None:
    """The quantization_config in config.json; it may be inside the decoder's config."""
    from .packed import method_of

    parts = [stated, *(part for part in stated.values() if isinstance(part, dict))]
    found = [part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)]
    if len(found) > 1:
        raise UnsupportedModelError(f"{config_file}: {len(found)} quantization_configs; one for all modules is read")
    for config in found:
        method_of(config, config_file)  # before anything is read
    return found[0] if found else None


def _download(model: str, reference: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "safety/*"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        raise PackageError(f"{model}: no such folder, hub id or alias (aliases: {', '.join(sorted(aliases()))})")
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except Exception as err:  # the hub's client raises a dozen types; and the disk may be full
        raise PackageError(
            f"{reference}: not downloaded ({type(err).__name__}: {first_line(err)}); check the name, the network and "
            "the disk, and run the command again, or give --model a local folder"
        ) from err


def end_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end an answer, from generation_config.json or config.json. Raises PackageError without any."""
    eos = generation_settings(checkpoint).get("eos_token_id")
    eos = checkpoint.config.get_text_config().eos_token_id if eos is None else eos
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise PackageError(
            f"{checkpoint.folder}: neither generation_config.json nor config.json says which token ends an answer "
            f"(eos_token_id: {eos}); add it to generation_config.json"
        )
    return ids


def generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json; empty if there is none."""
    path = checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise PackageError(f"{path}: not a JSON object ({err})") from err
    check_generation_numbers(settings, path)
    return settings


def recommended_options(checkpoint: Checkpoint) -> list[str]:
    """The options with which autosteer-run samples as generation_config.json recommends; the default is greedy."""
    given = generation_settings(checkpoint)
    options: list[tuple[str, float | None]] = [("repetition_penalty", 1.0)]
    if given.get("do_sample"):
        options = [("temperature", None), ("top_p", 1.0), ("top_k", 0), *options]
        given = {"temperature": 1.0} | given
    chosen = [(name, given[name]) for name, neutral in options if given.get(name) not in (None, neutral)]
    return [part for name, value in chosen for part in ("--" + name.replace("_", "-"), f"{value:g}")]


def check_generation(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError if generation_config.json has a setting that changes greedy answers and that neither
    runtime has.
    """
    given = generation_settings(checkpoint)
    if asked := [name for name, neutral in CHANGES_ANSWERS.items() if given.get(name) not in (None, neutral, [], {})]:
        raise UnsupportedModelError(
            f"{checkpoint.folder / 'generation_config.json'}: {', '.join(asked)}: neither runtime supports this, so "
            "answers would differ from the model's; delete it there if you do not need it"
        )


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's processor with the Pillow image backend; for a model without images, a TextProcessor.

    Pillow's resampling is what the checkpoints were trained with and what the runtime uses; torchvision's differs by a
    grey level.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    processor: Any
    try:
        if checkpoint.family.vision is None:
            processor = TextProcessor(AutoTokenizer.from_pretrained(checkpoint.folder))
        else:
            processor = AutoProcessor.from_pretrained(checkpoint.folder)
            processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint.folder, backend="pil")
            processor.chat_template = processor.chat_template or checkpoint.family.chat_template
    except Exception as err:  # a file that is missing, cut off or odd
        raise PackageError(f"{checkpoint.folder}: transformers cannot load its processor ({first_line(err)})") from err
    if not processor.chat_template:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "which says how a dialogue is written; take the instruct version of the model, or add its template"
        )
    check_processor(processor, checkpoint.folder, checkpoint.family)
    return processor


class TextProcessor:
    """A tokenizer with the interface of Hugging Face's multimodal processors."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, tokenize: Literal[False] = False
    ) -> str:
        """Render a dialogue, without what the template writes behind the last turn alone if no answer is to follow.

        Text templates want each turn's content as one string.
        """
        flat = [m | {"content": "".join(part["text"] for part in m["content"])} for m in messages]
        text = self.tokenizer.apply_chat_template(flat, add_generation_prompt=add_generation_prompt, tokenize=tokenize)
        return str(text) if add_generation_prompt else str(text).removesuffix(self._closing)

    @cached_property
    def _closing(self) -> str:
        """The special token that ends every dialogue, and no turn but the last (Phi-3); empty if there is none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        shorter, longer = (str(self.tokenizer.apply_chat_template(turns[:n], tokenize=False)) for n in (1, 2))
        for token in self.tokenizer.all_special_tokens:
            bare = shorter.removesuffix(token)
            if longer.startswith(bare) and longer.endswith(token) and not longer.startswith(shorter):
                return str(token)
        return ""

    def __call__(self, text: list[str], images: None = None, **options: Any) -> Any:
        """Token ids of rendered texts."""
        return self.tokenizer(text, add_special_tokens=False, **options)
