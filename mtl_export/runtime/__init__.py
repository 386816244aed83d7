"""Artefacts into outputs: one backend per library."""
