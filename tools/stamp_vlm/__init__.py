"""Real weights that see: a DINOv2 tower, Qwen2.5-Coder, and a projector between them, trained on Tux Paint's stamps."""
