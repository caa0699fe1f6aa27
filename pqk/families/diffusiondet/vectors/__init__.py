"""Runners of the cases of DiffusionDet: networks, their parts, what they learn from, and the extensions."""

from pqk.families.diffusiondet.vectors import extensions, learning, metric, models, parts

KINDS = {**models.KINDS, **parts.KINDS, **learning.KINDS, **extensions.KINDS, **metric.KINDS}
