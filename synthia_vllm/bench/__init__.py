"""The load benchmark: workloads, the peers, what was measured, and the report."""
