"""Bytes on disk into lazy tensors: ``Checkpoint`` and ``BaseModel``."""
