"""The APIs that clients speak: one file each, from bytes to generations and from deltas back to bytes."""
