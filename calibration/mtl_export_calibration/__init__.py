"""Calibration data in, ranges and Q/DQ nodes out."""
