"""Studies: a grid of recipes (arms, learning rates, seeds, settings) carried out and compared at equal target gain."""
