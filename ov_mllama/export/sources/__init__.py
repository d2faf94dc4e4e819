"""Sources of weights: one file for each kind of checkpoint, all giving `Tensor`s by name, read when needed."""
