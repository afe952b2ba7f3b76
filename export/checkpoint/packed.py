"""Read checkpoints that others have quantised (matrices in 4 or 8 bits): each is dequantised, in blocks of rows.

    gptq                 qweight, qzeros, scales, g_idx      words along K; zero points less 1 (checkpoint_format gptq)
    awq                  qweight, qzeros, scales             words along N, its eight numbers in an order of their own
    compressed-tensors   weight_packed, weight_scale, ...    words along K; or weight in 8 bits and weight_scale
    fp8                  weight, weight_scale_inv            Hugging Face's: a scale for each block, or for the tensor

A word is an int32, its lowest bits first. A matrix of 4 bits in groups is what MatMulNBits computes with, so an int4
export in blocks of the same size keeps its very codes, scales and zero points.

Tensors that are neither floats nor parts of a known packed matrix are refused, because they would be taken for weights.
Which modules are packed follows from their tensors; config.json only states how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from autosteer.export.graphs.quantize import Blocks, Packed, pack
from autosteer.runtime.errors import PackageError, UnsupportedModelError

Place = tuple[Path, str]  # a safetensors file, and a tensor's name in it
FLOATS = ("F64", "F32", "F16", "BF16")
WORD = 32  # bits
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight neighbours stands
COUNTERS = ("position_ids", "num_batches_tracked")  # integer tensors that are not weights
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "activation_scale", "k_scale", "v_scale", "output_scale")
INSTEAD = "give --model the checkpoint that it was quantised from, and choose --precision"


class Matrix(Protocol):
    """A packed matrix (N, K)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""

    @property
    def place(self) -> Place:
        """Where its largest part is stored."""

    @property
    def rows_at_once(self) -> int:
        """Rows are read in multiples of it."""

    def floats(self, first: int, last: int) -> torch.Tensor:
        """Rows first..last-1, (n, K) float32."""

    def blocks(self) -> Blocks | None:
        """Its grid as MatMulNBits blocks; None if MatMulNBits has no such grid."""

    def packed(self, first: int, last: int) -> Packed:
        """The rows in that grid, copied and not rounded again."""


class Reader:
    """Tensors of a checkpoint by module path, some of their rows or columns at a time."""

    def __init__(self, stored: Mapping[str, Place], open_file: Callable[[Path], Any]):
        self.stored, self._open = stored, open_file
        self._types: dict[str, tuple[str, tuple[int, ...]]] = {}
        by_file: dict[Path, dict[str, str]] = {}
        for path, (file, name) in stored.items():
            by_file.setdefault(file, {})[name] = path
        for file, names in by_file.items():
            with open_file(file) as tensors:
                for name in tensors.keys() & names.keys():  # one that is missing is told of where it is asked for
                    view = tensors.get_slice(name)
                    self._types[names[name]] = view.get_dtype(), tuple(view.get_shape())

    def dtype(self, path: str) -> str:
        """As safetensors calls it; empty where the file lacks the tensor that the index lists."""
        return self._types[path][0] if path in self._types else ""

    def shape(self, path: str) -> tuple[int, ...]:
        """Without reading it."""
        if path not in self._types:
            raise PackageError(f"{path}: missing, although what it belongs to is there; download it again")
        return self._types[path][1]

    def read(self, path: str, *index: slice) -> torch.Tensor:
        """A part of a tensor, as it is stored."""
        file, name = self.stored[path]
        with self._open(file) as tensors:
            part: torch.Tensor = tensors.get_slice(name)[index or ...]
            return part

    def has(self, path: str) -> bool:
        """Whether there is such a tensor."""
        return path in self.stored


@dataclass(frozen=True)
class Integers:
    """weight = (code - zero point) * scale, in groups of columns. `grid` reads rows of the three: codes (n, K) uint8,
    zero points (n, G) uint8, scales (n, G) float32.
    """

    shape: tuple[int, int]
    place: Place
    bits: int
    group: int  # columns that share a scale, in order unless `groups` says otherwise
    groups: torch.Tensor | None  # (K,) int64: the group of each column
    grid: Callable[[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    rows_at_once: int = 8

    def floats(self, first: int, last: int) -> torch.Tensor:
        """See Matrix."""
        codes, zeros, scales = self.grid(first, last)
        if self.groups is not None:
            return (codes.float() - zeros[:, self.groups].float()).mul_(scales[:, self.groups])
        cut = codes.unflatten(1, (-1, self.group)).float()
        values: torch.Tensor = cut.sub_(zeros[..., None].float()).mul_(scales[..., None]).flatten(1)
        return values

    def blocks(self) -> Blocks | None:
        """See Matrix."""
        return Blocks(4, self.group, symmetric=False) if self.bits == 4 and self.groups is None else None

    def packed(self, first: int, last: int) -> Packed:
        """See Matrix."""
        codes, zeros, scales = self.grid(first, last)
        return Packed(pack(codes.unflatten(1, (-1, self.group))), scales, pack(zeros))


@dataclass(frozen=True)
class Scaled:
    """weight = number * scale, in blocks of rows and columns; the numbers are float8 or, less a zero point, int8."""

    shape: tuple[int, int]
    place: Place
    block: tuple[int, int]  # rows and columns that share a scale
    numbers: Callable[[int, int], torch.Tensor]  # rows of them, (n, K)
    scales: torch.Tensor  # (ceil(N / rows), ceil(K / columns)) float32
    zeros: torch.Tensor | None = None  # as scales
    rows_at_once: int = 1

    def floats(self, first: int, last: int) -> torch.Tensor:
        """See Matrix."""
        rows = torch.arange(first, last) // self.block[0]
        columns = torch.arange(self.shape[1]) // self.block[1]
        numbers = self.numbers(first, last).float()
        if self.zeros is not None:
            numbers -= self.zeros[rows][:, columns]
        return numbers.mul_(self.scales[rows][:, columns])

    def blocks(self) -> Blocks | None:
        """See Matrix."""
        return None

    def packed(self, first: int, last: int) -> Packed:
        """See Matrix."""
        raise NotImplementedError("its grid is not MatMulNBits'")


def packed_matrices(config: dict[str, Any] | None, reader: Reader, where: Path) -> tuple[dict[str, Matrix], set[str]]:
    """The packed matrices, by the name their weights would have ("<module>.weight"), and the tensors that are but parts
    of them. `config` is config.json's quantization_config, `where` config.json.

    Raises UnsupportedModelError for a method or a layout that is not read, PackageError for tensors that do not fit
    together or that nobody unpacks.
    """
    found: dict[str, Matrix] = {}
    parts: set[str] = set()
    if config is not None:
        found, parts = _METHODS[method_of(config, where)](config, reader, where)
    for path in reader.stored:
        if path in parts or path.endswith(COUNTERS) or reader.dtype(path) in (*FLOATS, ""):
            continue
        said = "its quantization_config does not explain" if config else "it has no quantization_config to explain"
        raise PackageError(f"{where}: {path} is stored as {reader.dtype(path)}, which {said}; {INSTEAD}")
    return found, parts


def method_of(config: dict[str, Any], where: Path) -> str:
    """The method of a quantization_config; raises UnsupportedModelError if it is not supported."""
    method = str(config.get("quant_method", "")) or ("bitsandbytes" if "load_in_4bit" in config else "unnamed")
    if method in _METHODS:
        return method
    raise UnsupportedModelError(
        f"{where}: the weights are quantised by {method!r}, which is not read ({', '.join(_METHODS)} are); {INSTEAD}"
    )


def _gptq(config: dict[str, Any], reader: Reader, where: Path) -> tuple[dict[str, Matrix], set[str]]:
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    bits = config.get("bits") or 0
    _demand(where, "gptq", f"checkpoint_format {layout!r}", layout in ("gptq", "gptq_v2"))
    _demand(where, "gptq", f"{bits} bits", bits in (4, 8))
    _demand(where, "gptq", "bits that differ by module (dynamic)", not config.get("dynamic"))
    _demand(where, "gptq", f"pack_dtype {config.get('pack_dtype')}", config.get("pack_dtype", "int32") == "int32")
    per_word = WORD // bits
    less_one = sum(1 << (bits * i) for i in range(per_word)) if layout == "gptq" else 0

    def matrix(module: str) -> Integers:
        words, n = _shape(reader, f"{module}.qweight", 2)
        k, g = words * per_word, _shape(reader, f"{module}.scales", 2)[0]
        _fits(reader, f"{module}.scales", (g, n))
        _fits(reader, f"{module}.qzeros", (g, n // per_word))
        group = _group(f"{module}.scales", k, g, config.get("group_size"))
        groups = _order(reader, f"{module}.g_idx", k, g, group)

        def grid(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            here = slice(first, last)
            codes = _unpack(reader.read(f"{module}.qweight", slice(None), here).T, bits)
            word = reader.read(f"{module}.qzeros", slice(None), slice(first // per_word, last // per_word)).T
            top = (1 << (2 * bits)) - 1
            if less_one and bool(((word >> (WORD - 2 * bits)) & top == top).any()):
                raise PackageError(
                    f"{module}.qzeros: a zero point of 0, with which old writers of checkpoint_format gptq spoil its "
                    f"neighbours; quantise again with checkpoint_format gptq_v2, or {INSTEAD}"
                )
            zeros = _unpack((word + less_one).T, bits).T  # of int32, as a whole: what writers subtract may borrow
            return codes, zeros, reader.read(f"{module}.scales", slice(None), here).T.float()

        return Integers((n, k), reader.stored[f"{module}.qweight"], bits, group, groups, grid, per_word)

    return _all(reader, "qweight", matrix, ("qweight", "qzeros", "scales", "g_idx"))


def _awq(config: dict[str, Any], reader: Reader, where: Path) -> tuple[dict[str, Matrix], set[str]]:
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit"))
    _demand(where, "awq", f"version {version!r}", version == "gemm")
    _demand(where, "awq", f"{bits} bits", bits == 4)
    _demand(where, "awq", "no zero points", config.get("zero_point", True))
    per_word = WORD // 4

    def matrix(module: str) -> Integers:
        k, words = _shape(reader, f"{module}.qweight", 2)
        n, g = words * per_word, _shape(reader, f"{module}.scales", 2)[0]
        _fits(reader, f"{module}.scales", (g, n))
        _fits(reader, f"{module}.qzeros", (g, words))
        group = _group(f"{module}.scales", k, g, config.get("group_size", config.get("q_group_size")))

        def grid(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            here = slice(first // per_word, last // per_word)
            words = (reader.read(f"{module}.{part}", slice(None), here) for part in ("qweight", "qzeros"))
            codes, zeros = (_unpack(word, 4, AWQ_ORDER).T for word in words)
            return codes, zeros, reader.read(f"{module}.scales", slice(None), slice(first, last)).T.float()

        return Integers((n, k), reader.stored[f"{module}.qweight"], 4, group, None, grid, per_word)

    return _all(reader, "qweight", matrix, ("qweight", "qzeros", "scales"))


def _fp8(config: dict[str, Any], reader: Reader, where: Path) -> tuple[dict[str, Matrix], set[str]]:
    block = config.get("weight_block_size")
    _demand(where, "fp8", f"weights of type {config.get('expert_dtype')}", config.get("expert_dtype", "fp8") == "fp8")

    def matrix(module: str) -> Scaled:
        return _scaled(reader, module, "weight_scale_inv", "F8_E4M3", block)

    return _all(reader, "weight_scale_inv", matrix, ("weight", "weight_scale_inv"))


def _compressed_tensors(config: dict[str, Any], reader: Reader, where: Path) -> tuple[dict[str, Matrix], set[str]]:
    name = "compressed-tensors"
    schemes = list((config.get("config_groups") or {}).values())
    status = str(config.get("quantization_status", "compressed"))
    formats = {str(config.get("format")), *(str(scheme.get("format")) for scheme in schemes)}
    _demand(where, name, f"status {status!r}", status == "compressed")
    _demand(where, name, f"format {', '.join(sorted(formats - CT_FORMATS))!r}", formats <= CT_FORMATS)
    _demand(where, name, "sparse weights", (config.get("sparsity_config") or {}).get("format", "dense") == "dense")
    rotated = (config.get("transform_config") or {}).get("config_groups")
    _demand(where, name, "rotated weights (transform_config)", not rotated)
    shapes = {tuple(shape) for scheme in schemes if (shape := (scheme.get("weights") or {}).get("block_structure"))}
    _demand(where, name, "blocks of several shapes", len(shapes) <= 1)
    block = next(iter(shapes), None)

    def eight_bits(module: str) -> Scaled:
        dtype = "I8" if reader.dtype(f"{module}.weight") == "I8" else "F8_E4M3"
        return _scaled(reader, module, "weight_scale", dtype, block)

    def packed(module: str) -> Integers:
        n, k = (int(x) for x in reader.read(f"{module}.weight_shape"))
        words = _shape(reader, f"{module}.weight_packed", 2)[1]
        bits = next((b for b in (4, 8) if -(-k * b // WORD) == words), None)
        _demand(where, name, f"{module}.weight_packed of {words} words a row for {k} weights", bits is not None)
        assert bits is not None
        per_word, middle = WORD // bits, 1 << (bits - 1)
        g = _shape(reader, f"{module}.weight_scale", 2)[1]
        _fits(reader, f"{module}.weight_packed", (n, words))
        _fits(reader, f"{module}.weight_scale", (n, g))
        group = _group(f"{module}.weight_scale", k, g, None)
        groups = _order(reader, f"{module}.weight_g_idx", k, g, group)
        zeros_path = f"{module}.weight_zero_point"
        if reader.has(zeros_path):
            _fits(reader, zeros_path, (-(-n // per_word), g))

        def grid(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            here = slice(first, last)
            codes = _unpack(reader.read(f"{module}.weight_packed", here), bits)[:, :k]
            scales = reader.read(f"{module}.weight_scale", here).float()
            if not reader.has(zeros_path):
                return codes, torch.full(scales.shape, middle, dtype=torch.uint8), scales
            words = reader.read(zeros_path, slice(first // per_word, -(-last // per_word)))
            return codes, _unpack(words.T, bits).T[: last - first], scales

        return Integers((n, k), reader.stored[f"{module}.weight_packed"], bits, group, groups, grid, per_word)

    ours, its = _all(reader, "weight_packed", packed, ("weight_packed", "weight_scale", *_CT_SMALL))
    more, others = _all(
        reader, "weight_scale", eight_bits, ("weight", "weight_scale", "weight_zero_point"), but=ours.keys()
    )
    return ours | more, its | others


CT_FORMATS = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "None"}
_CT_SMALL = ("weight_shape", "weight_zero_point", "weight_g_idx")
_METHODS: dict[str, Callable[[dict[str, Any], Reader, Path], tuple[dict[str, Matrix], set[str]]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}


def _all(
    reader: Reader, mark: str, matrix: Callable[[str], Matrix], parts: tuple[str, ...], but: Any = ()
) -> tuple[dict[str, Matrix], set[str]]:
    """Every module that has a tensor `mark`, and its tensors that are parts; not those whose weights are in `but`."""
    modules = [path.removesuffix(f".{mark}") for path in reader.stored if path.endswith(f".{mark}")]
    modules = [module for module in modules if f"{module}.weight" not in but]
    names = {f"{module}.{part}" for module in modules for part in (*parts, *OF_ACTIVATIONS)}
    names |= {f"{module.rpartition('.')[0]}.{part}" for module in modules for part in OF_ACTIVATIONS}  # of caches
    return {f"{module}.weight": matrix(module) for module in modules}, names & reader.stored.keys()


def _scaled(reader: Reader, module: str, scale: str, dtype: str, block: Any) -> Scaled:
    path, (n, k) = f"{module}.weight", _shape(reader, f"{module}.weight", 2)
    if reader.dtype(path) != dtype:
        raise PackageError(f"{path}: stored as {reader.dtype(path)}, not {dtype}, although it has a {scale}; {INSTEAD}")
    stored = reader.read(f"{module}.{scale}").float()
    stored = stored.reshape(1, 1) if stored.numel() == 1 else stored
    if stored.ndim == 2 and block and stored.shape == (-(-n // block[0]), -(-k // block[1])):
        rows, columns = block
    else:
        rows, columns = {1: n, n: 1}.get(stored.shape[0], 0), k // stored.shape[-1]
    if stored.ndim != 2 or not rows or (-(-n // rows), -(-k // columns)) != tuple(stored.shape):
        raise PackageError(f"{module}.{scale} is {list(stored.shape)}, which does not fit {path}, {[n, k]}; {INSTEAD}")
    zeros = None
    if reader.has(f"{module}.weight_zero_point"):
        zeros = reader.read(f"{module}.weight_zero_point").float().reshape(stored.shape)
    read = reader.read
    return Scaled(
        (n, k), reader.stored[path], (rows, columns), lambda first, last: read(path, slice(first, last)), stored, zeros
    )


def _unpack(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Words (.., m) of int32 -> the numbers in them (.., m * 32 / bits) uint8."""
    shifts = torch.tensor(order or range(WORD // bits), dtype=torch.int32) * bits
    return (words[..., None] >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8).flatten(-2)


def _shape(reader: Reader, path: str, rank: int) -> tuple[int, ...]:
    shape = reader.shape(path)
    if len(shape) != rank:
        raise PackageError(f"{path} is {list(shape)}, not a matrix; {INSTEAD}")
    return shape


def _fits(reader: Reader, path: str, shape: tuple[int, ...]) -> None:
    if reader.shape(path) != shape:
        raise PackageError(
            f"{path} is {list(reader.shape(path))}; the packed numbers beside it want {list(shape)}; download it again"
        )


def _group(path: str, k: int, count: int, said: int | None) -> int:
    """Columns of a group, from how many groups there are."""
    group = k // max(1, count)
    if group * count != k or (count > 1 and said not in (None, -1, group)):
        raise PackageError(f"{path} has {count} groups of {k} columns, config.json says groups of {said}; {INSTEAD}")
    return group


def _order(reader: Reader, path: str, k: int, count: int, group: int) -> torch.Tensor | None:
    """The group of each column (desc_act, actorder); None where groups are columns in order."""
    if not reader.has(path):
        return None
    _fits(reader, path, (k,))
    groups = reader.read(path).long()
    if bool((groups < 0).any()) or int(groups.max()) >= count:
        raise PackageError(f"{path} names groups outside 0..{count - 1}; download it again")
    return None if torch.equal(groups, torch.arange(k) // group) else groups


def _demand(where: Path, method: str, what: str, given: bool) -> None:
    if not given:
        raise UnsupportedModelError(f"{where}: {method} with {what} is not read; {INSTEAD}")
