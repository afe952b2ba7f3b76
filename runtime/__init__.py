"""Run an AutoSteer package: an ONNX multimodal LLM whose safety gate is part of the loop.

Needs numpy, tokenizers, Pillow and one onnxruntime wheel; never torch or transformers.

    from autosteer.runtime import Engine

    engine = Engine.load("package/")
    for chunk in engine.stream("what is shown here?", images=["photo.png"]):
        print(chunk.text, end="")
"""

from .engine import Chunk, Engine, Stats
from .errors import AutoSteerError, InputError, PackageError, ProviderError, UnsupportedModelError
from .gate import Action, GatePolicy, Mode, Verdict
from .manifest import Manifest
from .sampling import SamplingConfig
from .text import Message

__all__ = [
    "Action",
    "AutoSteerError",
    "Chunk",
    "Engine",
    "GatePolicy",
    "InputError",
    "Manifest",
    "Message",
    "Mode",
    "PackageError",
    "ProviderError",
    "SamplingConfig",
    "Stats",
    "UnsupportedModelError",
    "Verdict",
]
