"""What operators copy, made from the one settings tree: Kubernetes, Compose, Ray's launcher, systemd.

Files are data first: a renderer returns a mapping of paths to texts and writes nothing itself. The copies in the
repository's `deploy/` are what these renderers give for the settings beside them.
"""
