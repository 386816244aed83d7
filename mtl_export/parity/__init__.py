"""Outputs of two backends into a ``ParityReport``."""
