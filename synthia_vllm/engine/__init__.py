"""vLLM: its arguments from our settings, the demo model, the single-machine server, offline use."""
