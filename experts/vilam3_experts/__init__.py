"""The domain experts: PyTorch, ONNX and Keras models that annotate scans for vilam3-jax.

Importing this package imports none of those libraries; each expert imports its own when it runs.
"""

__version__ = "0.1.0"
