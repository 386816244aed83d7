"""Checkpoint formats: one file per producer."""
