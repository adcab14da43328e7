"""The five runs of `make quickstart`."""
