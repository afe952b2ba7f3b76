"""Read the authors' own checkpoints, made with github.com/zjunlp/AutoSteer, as a safety artifact.

    prober          state_dict: layers.0.weight (h, d), layers.0.bias (h), layers.2.weight (2, h), layers.2.bias (2);
                    their code has h = 64
    steer matrix    one bare tensor (d, d), possibly an nn.Parameter, possibly saved on a GPU

Both are pickles and are read with weights_only=True: a file that needs code to run is refused. They do not state the
layer, the token, the order of the two classes, the threshold or the strength, so the caller does. They state no
measurements either, so the artifact has no calibration facts.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autosteer.export.safety_folder import FORMAT_VERSION, UNTRAINED, SafetyArtifact, SafetyFacts
from autosteer.runtime.errors import InputError, PackageError

from .prober import UNSAFE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AuthorsFiles:
    """The two files, and what they do not state."""

    prober: Path
    steer_matrix: Path
    layer: int  # the prober reads hidden_states[layer]; the paper: 20 of LLaVA-OneVision-7B, 24 of Chameleon-7B
    unsafe_class: Literal[0, 1]  # row of the prober's last layer: 0 in the paper's training, 1 in SafeSwitch's
    token_offset: int  # -1: the last token of the prompt rendered without the generation prompt
    threshold: float
    strength: float
    refusal_text: str  # what --policy stop says; the steer matrix was trained on the paper's sentence


def load_authors(files: AuthorsFiles, *, model: str, hidden_size: int, num_hidden_layers: int) -> SafetyArtifact:
    """Read and check both files against the model's sizes.

    Raises PackageError for a file that is missing, is no such checkpoint, would have to run code, has other shapes,
    holds a non-finite number or an untrained matrix; InputError for a layer or number out of range.
    """
    _check_numbers(files, num_hidden_layers)
    prober = _prober(files.prober, hidden_size)
    if files.unsafe_class != UNSAFE:
        prober |= {name: prober[name].flip(0) for name in ("2.weight", "2.bias")}
    facts = SafetyFacts(
        format_version=FORMAT_VERSION,
        model=model,
        split_layer=files.layer,
        token_offset=files.token_offset,
        threshold=files.threshold,
        strength=files.strength,
        refusal_text=files.refusal_text,
        layers=(),
        calibration={},
        training={},
        selected_by="user",
    )
    artifact = SafetyArtifact(facts, prober, _steer_matrix(files.steer_matrix, hidden_size))
    artifact.check(files.prober, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    return artifact


def _check_numbers(files: AuthorsFiles, num_hidden_layers: int) -> None:
    """Check the numbers before a file is opened."""
    if not 0 < files.layer < num_hidden_layers:
        raise InputError(f"--layer {files.layer}: this model can be split at 1..{num_hidden_layers - 1}")
    if files.token_offset >= 0:
        raise InputError(f"--token-offset {files.token_offset}: count from the prompt's end; -1 is its last token")
    if not 0.0 <= files.threshold < 1.0:
        raise InputError(f"--threshold {files.threshold:g}: give a number in [0, 1)")
    if not 0.0 < files.strength < math.inf:
        raise InputError(f"--strength {files.strength:g}: give a positive number")
    if not files.refusal_text.strip():
        raise InputError("--refusal-text is empty")


def _prober(path: Path, hidden_size: int) -> dict[str, torch.Tensor]:
    """The four tensors under the safety folder's names, float32."""
    import torch

    state = _load(path)
    if not isinstance(state, dict):
        swapped = "; it looks like the steer matrix" if isinstance(state, torch.Tensor) else ""
        raise PackageError(f"{path}: holds a {type(state).__name__} and not the state_dict of a prober{swapped}")
    names = ("layers.0.bias", "layers.0.weight", "layers.2.weight", "layers.2.bias")
    if set(state) != set(names):
        found = ", ".join(sorted(map(repr, state))[:8]) or "nothing"
        raise PackageError(f"{path}: a prober has {', '.join(names)}; here is {found}")
    bias = state["layers.0.bias"]
    h = bias.numel() if isinstance(bias, torch.Tensor) else 0
    shapes = dict(zip(names, ((h,), (h, hidden_size), (2, h), (2,)), strict=True))
    return {name.removeprefix("layers."): _tensor(state[name], shape, path, name) for name, shape in shapes.items()}


def _steer_matrix(path: Path, hidden_size: int) -> torch.Tensor:
    """W (d, d) float32."""
    import torch

    matrix = _load(path)
    if isinstance(matrix, dict):
        raise PackageError(f"{path}: holds a dict and not one tensor (d, d); a prober's file belongs to --prober")
    w = _tensor(matrix, (hidden_size, hidden_size), path, "the steer matrix")
    distance = float((w - torch.eye(hidden_size)).norm()) / math.sqrt(hidden_size)
    if distance < UNTRAINED:
        raise PackageError(
            f"{path}: the steer matrix is still the identity (|W - I| / |I| = {distance:.1e}): it was never trained; "
            "the authors' loader writes such a file when it does not find the one it was given"
        )
    return w


def _load(path: Path) -> Any:
    """Load what torch.save wrote, onto the CPU. Never runs code from the file."""
    import torch

    if not path.is_file():
        raise PackageError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():  # torch would advise to trust the file
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # the restricted unpickler raises many types for a damaged file
        if refused := re.search(r"GLOBAL (\S+)", str(err)):
            raise PackageError(
                f"{path}: is more than tensors: loading it would call {refused[1]}, which is refused; "
                "extract the state_dict, or the tensor, on a machine where you trust the file"
            ) from err
        raise PackageError(f"{path}: damaged, or not what torch.save writes of tensors ({type(err).__name__})") from err


def _tensor(value: Any, shape: tuple[int, ...], path: Path, name: str) -> torch.Tensor:
    """A float32 copy of a dense finite floating-point tensor of `shape`. Raises PackageError for anything else."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise PackageError(f"{path}: {name} is a {type(value).__name__} and not a tensor")
    if tuple(value.shape) != shape:
        raise PackageError(f"{path}: {name} is {tuple(value.shape)}, this model's would be {shape}: of another model?")
    if value.layout is not torch.strided or value.device.type != "cpu" or not value.is_floating_point():
        kind = f"{value.dtype}, {value.layout}, {value.device}"
        raise PackageError(f"{path}: {name} ({kind}) is not a dense tensor of floating-point numbers")
    plain = value.detach().to(torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(plain).all()):
        raise PackageError(f"{path}: {name} has a number that is NaN or infinite")
    return plain
