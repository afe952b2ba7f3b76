"""From a Hugging Face checkpoint to an AutoSteer package. The only place for torch, transformers and onnx."""
