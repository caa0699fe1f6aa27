"""VGGT (Wang et al. 2025): frames of a scene to their cameras, depth maps and point maps at once."""

from pqk.families.contract import Family

FAMILY = Family(
    name="vggt",
    settings="pqk.families.vggt.settings",
    model="pqk.families.vggt.build",
    predict="pqk.families.vggt.predict",
    data="pqk.families.vggt.data",
    scoring="pqk.families.vggt.scoring",
    learning="pqk.families.vggt.learning",
    cutting="pqk.families.vggt.cutting",
    reducing="pqk.families.vggt.reduce",
    export="pqk.families.vggt.export",
    vectors="pqk.families.vggt.vectors",
    view="pqk.families.vggt.view",
)
