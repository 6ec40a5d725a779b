"""Analyses that explain forgetting: similarity of data, difference of weights, drift of representations, code-mixing.

One file per kind. Each is a strict config with ``run(context) -> Result``; results become JSON, a figure and a section
of the report.
"""
