"""Point trackers and flow estimators by name, learned ones among them, and how good they are."""

from nuwa_jax.estimation.registry import BACKENDS, Estimators, load_estimators, package_versions

__all__ = ["BACKENDS", "Estimators", "load_estimators", "package_versions"]
