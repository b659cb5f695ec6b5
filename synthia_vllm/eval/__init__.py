"""The card's evaluation table: lm-evaluation-harness against a server, over HTTP only."""
