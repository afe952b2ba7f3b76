"""From a Hugging Face checkpoint to an AutoSteer package. The only place for torch, transformers and onnx."""

import autosteer.runtime  # noqa: F401 (before onnxruntime, whose telemetry it turns off)
