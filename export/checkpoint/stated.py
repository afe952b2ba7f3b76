"""What a checkpoint's config files state, checked before anything is computed with it: an odd field is refused by its
name. transformers looks at the types of fields, and not whether a number makes sense.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosteer.models.family import RESAMPLE, Family
from autosteer.runtime.errors import AutoSteerError, UnsupportedModelError, first_line, is_out_of_memory

from .renderer import Renderer

ADVICE = "download it again, or correct it there"
NO_MODEL = "transformers cannot make the model that it describes"
DTYPES = r"(torch\.)?(auto|half|double|b?float\w*)"
NO_PROMPT = "transformers cannot run the model on a prompt of its processor"
MOST_POSITIONS = 1 << 24  # tables have a row for each


@dataclass(frozen=True)
class Kind:
    """What a field must be: in words, and as a function."""

    words: str
    fits: Callable[[Any], bool]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _all(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def both(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(fits, value))

    return both


SIZE = Kind("a whole number above 0", _is_size)
SIDES = Kind("whole numbers above 0", lambda value: _is_size(value) or _all(_is_size)(value))
POSITIONS = Kind(
    f"a whole number from 1 to {MOST_POSITIONS}", lambda value: _is_size(value) and value <= MOST_POSITIONS
)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", _is_positive)
FACTORS = Kind("numbers above 0", _all(_is_positive))
MEANS = Kind("three numbers", _all(_is_number, 3))
SPREADS = Kind("three numbers above 0", _all(_is_positive, 3))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
DTYPE = Kind("a type of numbers", lambda value: isinstance(value, str) and bool(re.fullmatch(DTYPES, value)))
PAIRS = Kind("pairs of whole numbers above 0", lambda value: value != [] and _all(_all(_is_size, 2))(value))

OF_THE_FILE = {  # what transformers takes apart without a look at its type
    **dict.fromkeys(("text_config", "vision_config", "quantization_config", "compression_config"), OBJECT),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
}
OF_A_MODEL = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), SIZE),
    "max_position_embeddings": POSITIONS,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"), SIZE),
    **dict.fromkeys(("depth", "embed_dim", "num_heads", "spatial_merge_size", "temporal_patch_size"), SIZE),
    **dict.fromkeys(("image_size", "patch_size"), SIDES),
    **dict.fromkeys(("num_channels", "in_channels"), Kind("3, as pictures have", lambda value: value == 3)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), POSITIVE),
    "image_grid_pinpoints": PAIRS,
}
OF_ROPE = {
    "rope_type": Kind("a name", lambda value: isinstance(value, str)),
    **dict.fromkeys(("rope_theta", "factor", "partial_rotary_factor", "attention_factor"), POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), POSITIVE),
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    "original_max_position_embeddings": SIZE,
}
OF_A_PROCESSOR = {  # of each of its parts; all of them have a default
    "image_mean": MEANS,
    "image_std": SPREADS,
    "rescale_factor": POSITIVE,
    "resample": Kind(
        f"one of {', '.join(map(str, RESAMPLE))}", lambda value: isinstance(value, int) and value in RESAMPLE
    ),
}
TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def check_stated(stated: dict[str, Any], file: Path) -> None:
    """Raise UnsupportedModelError for a field of config.json that transformers would fail at without naming it."""
    inner = [(f"{name}.", part) for name, part in stated.items() if isinstance(part, dict)]
    for prefix, part in [("", stated), *inner]:
        for name, kind in OF_THE_FILE.items():
            _check(file, prefix + name, part.get(name), kind)


def check_config(config: Any, file: Path) -> None:
    """Raise UnsupportedModelError for a field of a parsed config.json with which no model can be computed."""
    text = config.get_text_config()
    parts = {"" if text is config else "text_config.": text, "": config}
    parts["vision_config."] = getattr(config, "vision_config", None)
    words = f"a token of the vocabulary, which has {text.vocab_size}"
    in_vocabulary = Kind(words, lambda value: type(value) is int and 0 <= value < text.vocab_size)
    for prefix, part in parts.items():
        for name, kind in OF_A_MODEL.items():
            _check(file, prefix + name, getattr(part, name, None), kind)
        for name in TOKENS:
            _check(file, prefix + name, getattr(part, name, None), in_vocabulary)
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        for name, kind in OF_ROPE.items():
            _check(file, f"rope_parameters.{name}", rope.get(name), kind)


def check_processor(processor: Any, folder: Path, family: Family) -> None:
    """Raise UnsupportedModelError if the processor cannot prepare a dialogue, a picture and, if the family takes
    them, a video, because of a setting in its files.
    """
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    found = [folder / name for name in names if (folder / name).is_file()]
    file = found[0] if found else folder
    for part in ("image_processor", "video_processor") if family.vision else ():
        settings = getattr(processor, part, None)
        for name, kind in OF_A_PROCESSOR.items() if settings is not None else ():
            _check(file, f"{part}.{name}", getattr(settings, name, None), kind, optional=False)
    with in_one_line(file, "transformers cannot prepare a prompt with these settings"):
        video_token = processor.video_token if family.video_spec else None
        Renderer(processor, video_token).turns(("user", "x"), generation=True)


def check_generation_numbers(settings: dict[str, Any], file: Path) -> None:
    """Raise UnsupportedModelError for a recommendation of generation_config.json that is no number."""
    _check(file, "what it has", settings, OBJECT, optional=False)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        _check(file, name, settings.get(name), NUMBER)


def _check(file: Path, name: str, value: Any, kind: Kind, *, optional: bool = True) -> None:
    if (value is None and optional) or kind.fits(value):
        return
    raise UnsupportedModelError(f"{file}: {name} is {value!r:.60}, and not {kind.words}; {ADVICE}")


@contextmanager
def in_one_line(file: Path, cannot: str) -> Iterator[None]:
    """What transformers and torch raise in this block, because of a field in `file`, becomes an UnsupportedModelError.

    `cannot`: what they cannot do then.
    """
    try:
        yield
    except AutoSteerError:
        raise
    except Exception as err:  # a field that is missing or odd makes any of them
        if is_out_of_memory(err):
            raise
        raise UnsupportedModelError(f"{file}: {cannot} ({first_line(err)}); {ADVICE}") from err
