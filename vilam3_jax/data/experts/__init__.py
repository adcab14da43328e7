"""Expert models: how they are called, how results are stored, checked and rendered into turns.

Expert processes import this package too, so nothing here imports jax, flax or torch.
"""
