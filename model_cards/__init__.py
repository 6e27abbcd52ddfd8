"""Templates of model cards, filled by `training.cards`."""
