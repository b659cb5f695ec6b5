"""The Compose file's services without a container engine."""
