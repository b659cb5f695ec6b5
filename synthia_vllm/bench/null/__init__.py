"""Stand-in engines: no model, only the shapes, the timing and the faults of a real one. For scale and faults."""
