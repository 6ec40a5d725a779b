"""Importance of parameters for the source model's abilities. One file per scorer; the file name is the scorer's name."""

from addlang.scoring.base import GRANULARITIES, SCORERS, Granularity, Scorer, Scores, make_scorer

__all__ = ["GRANULARITIES", "SCORERS", "Granularity", "Scorer", "Scores", "make_scorer"]
