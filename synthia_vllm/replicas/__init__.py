"""Engines elsewhere, behind the engine port: over vLLM's tokens-in route, or over any engine's `/v1/completions`."""
