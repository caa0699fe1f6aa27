"""DETR's part of the configuration: what all detectors share, one graph, and its named configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pqk.families.contract import GraphUse
from pqk.families.defaults import KINDS as KINDS
from pqk.families.defaults import LAST_LAYERS as LAST_LAYERS
from pqk.families.defaults import Quant as Quant
from pqk.families.defaults import part_of as part_of
from pqk.families.detection import settings
from pqk.families.detection.settings import METRICS as METRICS
from pqk.families.detection.settings import PATCH as PATCH
from pqk.families.detection.settings import Evaluation as Evaluation
from pqk.settings.yamlfile import config_loader

SIGN = "model.query_position_embeddings.weight"
"""A weight that every checkpoint of the family has, and none of another family."""

GRAPHS = (GraphUse("detector", unit="images"),)

ATTENTION = ("attn/MatMul(_1)?$",)

# a stride of 16, as objects of the generated images are small, and the ResNet of diffusiondet-tiny up to there
NAMED: Mapping[str, Mapping[str, Any]] = {
    "detr-tiny": {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [64, 128, 256],
            "depths": [2, 2, 2],
            "layer_type": "bottleneck",
            "out_features": ["stage3"],
        },
        "backbone_norm": "batch",
        "num_labels": 3,
        "num_queries": 40,
        "dropout": 0.0,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
    }
}


class Workload(settings.Workload):
    """What is fed: the size of images, lists of images, calibration set, seeds."""

    @property
    def static(self) -> dict[str, Any]:
        """The graph has the input's height and width."""
        return {"shape": [self.input.height, self.input.width]}


load_workload = config_loader(Workload, "workload")
