"""Compares a written package with its checkpoint, and records what it proves itself by elsewhere."""
