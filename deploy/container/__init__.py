"""The container image, and the proof that its Dockerfile lacks nothing."""
