"""Kubernetes: a Kustomize base, components, and one overlay for the settings at hand."""
