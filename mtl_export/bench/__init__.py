"""Latency, throughput and memory of what was exported."""
