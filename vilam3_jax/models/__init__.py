"""Model families in Flax NNX, one per file, used functionally."""
