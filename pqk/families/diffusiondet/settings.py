"""DiffusionDet's named configurations, and the weight that its checkpoints are told by."""

from __future__ import annotations

from pqk.families.diffusiondet.network.configs import NAMED as NAMED

SIGN = "head.head_series.0.inst_interact.dynamic_layer.weight"
"""A weight that every checkpoint of the family has, and none of another family."""
