"""Drag-controlled video generation, trained and sampled in JAX."""

__version__ = "0.1.0"
