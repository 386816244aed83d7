"""Rows of the user's data, read once for parity, calibration and accuracy."""
