"""Finished files into verified folders with a manifest."""
