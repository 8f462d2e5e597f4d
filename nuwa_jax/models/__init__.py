"""Flax Linen modules; `apply(params, ...)` is the whole interface."""
