"""Synthia's geometry on a GPU: how fast, against whom, and with which options. `python -m benchmarks.gpu`."""
