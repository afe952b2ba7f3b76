"""Reads Hugging Face checkpoints: weights tensor by tensor, the chat template, the model on demand."""
