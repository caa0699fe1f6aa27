"""DiffusionDet (Chen et al. 2023): noisy boxes over an image are refined to detections, in one or more steps.

The model is here: network, sampler, losses, official checkpoints. Recipes need more (data, scoring, the glue of
graphs), so the family is among those of `registry.MODELS`.
"""

from pqk.families.contract import Family

FAMILY = Family(
    name="diffusiondet",
    settings="pqk.families.diffusiondet.settings",
    model="pqk.families.diffusiondet.build",
    scoring="pqk.families.diffusiondet.scoring",
    vectors="pqk.families.diffusiondet.vectors",
)
