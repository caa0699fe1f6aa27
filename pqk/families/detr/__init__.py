"""DETR (Carion et al. 2020), as the `transformers` library has it (extra `detr`): one graph, an image to its boxes."""

from pqk.families.contract import Family

FAMILY = Family(
    name="detr",
    settings="pqk.families.detr.settings",
    model="pqk.families.detr.model",
    predict="pqk.families.detr.predict",
    data="pqk.families.detection.data",
    scoring="pqk.families.detection.scoring",
    learning="pqk.families.detr.learning",
    view="pqk.families.detection.view",
)
