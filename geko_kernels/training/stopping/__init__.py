"""A run that finds its own length: the average of the weights, the samples held back, the rule that ends it."""
