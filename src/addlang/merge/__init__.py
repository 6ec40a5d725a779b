"""Merging models without training: see docs/merging.md. Importing this package loads no torch."""
