"""DiffusionDet (Chen et al. 2023): noisy boxes over an image are refined to detections, in one or more steps.

A backbone runs once for an image, a head once for every step.
"""

from pqk.families.contract import Family

FAMILY = Family(
    name="diffusiondet",
    settings="pqk.families.diffusiondet.settings",
    model="pqk.families.diffusiondet.build",
    predict="pqk.families.diffusiondet.predict",
    data="pqk.families.detection.data",
    scoring="pqk.families.detection.scoring",
    learning="pqk.families.diffusiondet.learning",
    cutting="pqk.families.diffusiondet.cutting",
    export="pqk.families.diffusiondet.export",
    vectors="pqk.families.diffusiondet.vectors",
    view="pqk.families.detection.view",
)
