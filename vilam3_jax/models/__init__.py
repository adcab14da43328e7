"""Model families in Flax NNX, used functionally: one family a file."""
