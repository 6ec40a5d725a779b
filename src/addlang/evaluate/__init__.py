"""Measurements of a model, item by item, and the statistics that compare two models. Importing it loads no torch."""
