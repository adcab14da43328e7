"""Mesh, sharding, state and step of a training run."""
