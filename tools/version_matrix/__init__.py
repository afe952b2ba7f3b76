"""One question asked of every onnxruntime: does a package answer there as it does on the newest? See tools/matrix."""
