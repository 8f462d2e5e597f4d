"""DragNUWA 1.5's layout on a pod: configs/dragnuwa_svd.py (1.64 B parameters train in the drag stage)."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, dragnuwa_svd


def get_config(arg: str | None = None) -> ConfigDict:
    """The config, or its `small` variant."""
    return common.variant(common.pod(dragnuwa_svd.get_config()), arg, "configs/pod_svd.py")
