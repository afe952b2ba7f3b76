"""Run an AutoSteer package: an ONNX multimodal LLM whose safety gate is part of the loop.

Needs numpy, tokenizers, Pillow and one onnxruntime wheel; never torch or transformers.

    from autosteer.runtime import Engine

    engine = Engine.load("package/")
    for chunk in engine.stream("what is shown here?", images=["photo.png"]):
        print(chunk.text, end="")
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime 1.32 sends telemetry to its makers (names of files and graphs, errors, the processor), unless this is set
# before it is imported. Set it to 0 to allow that; an empty value allows nothing.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"

if TYPE_CHECKING:
    from .cancel import Cancel
    from .chunk import Answer, Chunk
    from .conversation import Conversation
    from .engine import Engine
    from .errors import (
        AuditError,
        AutoSteerError,
        CancelledError,
        InputError,
        PackageError,
        ProviderError,
        UnsupportedModelError,
    )
    from .gate import Action, GatePolicy, Mode, Verdict
    from .manifest import Manifest
    from .sampling import SamplingConfig
    from .stats import Stats
    from .text import ImagePart, Message, VideoPart
    from .video import Video, open_video

__all__ = [
    "Action",
    "Answer",
    "AuditError",
    "AutoSteerError",
    "Cancel",
    "CancelledError",
    "Chunk",
    "Conversation",
    "Engine",
    "GatePolicy",
    "ImagePart",
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
    "Video",
    "VideoPart",
    "open_video",
]

_HOME = {
    "Cancel": "cancel",
    **dict.fromkeys(("Answer", "Chunk"), "chunk"),
    "Engine": "engine",
    "Conversation": "conversation",
    "Stats": "stats",
    **dict.fromkeys(
        (
            *("AuditError", "AutoSteerError", "CancelledError", "InputError", "PackageError", "ProviderError"),
            "UnsupportedModelError",
        ),
        "errors",
    ),
    **dict.fromkeys(("Action", "GatePolicy", "Mode", "Verdict"), "gate"),
    "Manifest": "manifest",
    "SamplingConfig": "sampling",
    **dict.fromkeys(("ImagePart", "Message", "VideoPart"), "text"),
    **dict.fromkeys(("Video", "open_video"), "video"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a name's module on first use: --help and the exporter need no onnxruntime."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
