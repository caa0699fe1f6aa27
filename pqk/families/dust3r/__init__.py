"""DUSt3R (Wang et al. 2024): two images to two point maps in the first camera, with confidences."""

from pqk.families.contract import Family

FAMILY = Family(
    name="dust3r",
    settings="pqk.families.dust3r.settings",
    model="pqk.families.dust3r.build",
    predict="pqk.families.dust3r.predict",
    data="pqk.families.dust3r.data",
    scoring="pqk.families.dust3r.scoring",
    learning="pqk.families.dust3r.learning",
    cutting="pqk.families.dust3r.cutting",
    reducing="pqk.families.dust3r.reduce",
    export="pqk.families.dust3r.export",
    vectors="pqk.families.dust3r.vectors",
    view="pqk.families.dust3r.view",
)
