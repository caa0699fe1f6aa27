"""Builds DETR with the `transformers` library; its own configuration and weights are read as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import NotBuilt, PqkError, first_line, nearest
from pqk.families.contract import GraphSpec
from pqk.families.defaults import LAYOUT as LAYOUT
from pqk.families.defaults import UNDONE as UNDONE
from pqk.families.defaults import may_lack as may_lack
from pqk.families.defaults import official as official
from pqk.families.detection.norm import EPS, batch_norm
from pqk.families.detr.settings import Workload

_OWN = "net."
_QUERIES = "object_queries_position_embeddings"
"""What the decoder of the library calls its queries."""
_FIXED = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "auxiliary_loss": False}
"""With auxiliary_loss the library also normalises what one layer of the decoder gives to the next, as DETR does not."""
_RENAMED = {
    r"\.backbone\.conv_encoder\.": ".backbone.",
    r"\.out_proj\.": ".o_proj.",
    r"\.layers\.(\d+)\.(fc[12])\.": r".layers.\1.mlp.\2.",
}
_BACKBONE = "net.model.backbone.model."
_BORROWED = {
    r"^backbone\.bottom_up\.stem\.conv1\.": _BACKBONE + "embedder.embedder.",
    r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.": _BACKBONE + r"encoder.stages.\1.layers.\2.layer.\3.",
    r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.": _BACKBONE + r"encoder.stages.\1.layers.\2.shortcut.",
    r"\.norm\.(\w+)$": r".normalization.\1",
    r"(layer\.\d|shortcut|embedder)\.weight$": r"\1.convolution.weight",
}
"""What a ResNet of DiffusionDet calls its weights, and the library."""
_NORM = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
"""What a norm of the backbone begins with."""
_NORMS = ("frozen", "batch")
_OLD = (
    *("num_labels", "use_timm_backbone", "use_pretrained_backbone", "backbone", "backbone_kwargs", "torch_dtype"),
    *("classifier_dropout", "max_position_embeddings", "scale_embedding", "name_or_path", "out_features"),
    *("out_indices", "stage_names", "tie_word_embeddings", "tie_encoder_decoder", "is_decoder", "add_cross_attention"),
    *("cross_attention_hidden_size", "finetuning_task", "pruned_heads", "torchscript", "tf_legacy_loss", "prefix"),
    *("task_specific_params", "tokenizer_class", "sep_token_id", "use_bfloat16"),
)
"""Keys that files of the library hold beside the fields of its classes."""


class Norm(nn.Module):
    """Batch norm that learns (Ioffe and Szegedy 2015), with the names of the library's frozen one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self
        kept = (state.running_mean, state.running_var, self.weight, self.bias)
        return batch_norm(x, *kept) if self.training else F.batch_norm(x, *kept, eps=EPS)


class Detr(nn.Module):
    """The library's network of one configuration: normalised images (B, 3, H, W) -> logits, boxes.

    Every pixel counts, those of the padding too. Beside the library's keys the configuration has `backbone_norm`:
    'frozen', as the library has it, for a backbone that was trained before; 'batch': norms that learn, without which
    random convolutions do not. Raises NotBuilt without the library, and PqkError for a configuration that it refuses,
    an unknown key, or a backbone of timm.
    """

    family = "detr"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            from transformers import DetrConfig, DetrForObjectDetection, GenerationConfig, ResNetConfig
        except ImportError as error:
            raise NotBuilt(f"DETR needs the library transformers, pip install 'pqk[detr]' ({error})") from error
        self.config = {key: value for key, value in config.items() if key != "family"}
        backbone = self.config.get("backbone_config")
        timm = self.config.get("use_timm_backbone") or _kind(backbone) == "timm_backbone"
        if timm or not isinstance(backbone, Mapping):
            raise PqkError("detr configuration: needs a backbone_config of a ResNet of transformers; timm is not used")
        common = {*GenerationConfig().to_dict(), *_OLD}  # old files hold settings of a generator of text too
        for place, values, kind in (("", self.config, DetrConfig), ("backbone_config.", backbone, ResNetConfig)):
            known = {*kind().to_dict(), *kind.attribute_map, *common, *(() if place else ("backbone_norm",))}
            for key in values:
                if key not in known:
                    said = nearest(key, known - common)
                    raise PqkError(f"detr configuration: {place}{key} is unknown{said}")
        norm = self.config.get("backbone_norm", "frozen")
        if norm not in _NORMS:
            raise PqkError(f"detr configuration: backbone_norm must be {' or '.join(_NORMS)}, not {norm!r}")
        try:
            asked = DetrConfig.from_dict({**self.config, **_FIXED})
            self.net = DetrForObjectDetection(asked)
        except Exception as error:  # whatever the library says of a value
            raise PqkError(f"detr configuration: {first_line(error)}") from error
        if norm == "batch":
            _let_learn(self.net.model.backbone)
        self.net.requires_grad_(True)  # the library keeps the whole backbone as it is; here `rates` say what is trained
        for part in (self.net.model.encoder, self.net.model.decoder):
            part.register_forward_pre_hook(partial(_everywhere, self.net.model), with_kwargs=True)

    def forward(self, image: Tensor, every: bool = False) -> tuple[Tensor, Tensor]:
        """Returns logits (B, N, K + 1) and boxes (B, N, 4); every: (L, B, ...), of each of L layers of the decoder."""
        mask = torch.ones_like(image[:, 0], dtype=torch.int64)
        found = self.net.model(image, pixel_mask=mask, output_hidden_states=every)
        hidden = found.last_hidden_state
        if every:
            norm = self.net.model.decoder.layernorm
            hidden = torch.stack([*(norm(each) for each in found.decoder_hidden_states[1:-1]), hidden])
        return self.net.class_labels_classifier(hidden), self.net.bbox_predictor(hidden).sigmoid()

    def loss(self, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
        """Returns the library's loss, summed over L layers: a scalar. logits (L, B, N, K + 1), boxes (L, B, N, 4).

        labels: of each image `class_labels` (G,) and relative `boxes` (G, 4).
        """
        config = copy.copy(self.net.config)
        config.auxiliary_loss = True
        loss: Tensor = self.net.loss_function(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)[0]
        return loss


def _everywhere(model: Any, module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leaves masks of attention out, as every place counts, and gives queries a shape that an export can tell."""
    named = {name: value for name, value in named.items() if not name.endswith("attention_mask")}
    if _QUERIES in named:
        queries = model.query_position_embeddings.weight[None]
        if named["encoder_hidden_states"].shape[0] != 1:
            queries = named[_QUERIES]
        named |= {_QUERIES: queries, "inputs_embeds": torch.zeros_like(queries)}
    return args, named


def _let_learn(module: Any) -> None:
    """Replaces every frozen norm by one that learns."""
    for name, part in module.named_children():
        if hasattr(part, "running_var"):
            setattr(module, name, Norm(len(part.running_var)))
        else:
            _let_learn(part)


def _kind(backbone: Any) -> Any:
    return backbone.get("model_type") if isinstance(backbone, Mapping) else None


class DetectorGraph(nn.Module):
    """Image (B, 3, H, W) -> logits (B, N, K + 1), the last class being none, and refined (B, N, 4): cx, cy, w, h in
    [0, 1] of the input.

    every: of every layer of the decoder, with the layers as the first axis, as a training needs them.
    """

    def __init__(self, model: Detr, every: bool = False) -> None:
        super().__init__()
        self.model, self.every = model, every

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.model(image, self.every)
        return found


def build(config: Mapping[str, Any]) -> nn.Module:
    """Returns the network of a configuration, with keys of the library's DetrConfig. Raises as `Detr` does."""
    return Detr(config)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fills every weight for a training from nothing; the library's own start, with deviations of 0.02, is for weights
    that are loaded afterwards.

    Matrices of the transformer: Xavier (Carion et al. 2020, appendix A.4); convolutions of the backbone: He et al.
    2015, for outputs; queries: standard normal; norms change nothing; heads: as torch makes layers, for with 0.02 all
    queries begin with one box, up to 2e-5 of the image. generator: seeds it; None: torch's own random numbers.
    """
    with torch.random.fork_rng(enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        net: Any = model.net
        net.apply(net._init_weights)
        for part in (net.model.encoder, net.model.decoder):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.xavier_uniform_(weight)
        for module in net.model.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for layer in (net.model.input_projection, net.class_labels_classifier, *net.bbox_predictor.layers):
            layer.reset_parameters()
        nn.init.normal_(net.model.query_position_embeddings.weight)
        for part in net.model.backbone.modules():
            if hasattr(part, "running_var"):
                for name, value in _NORM.items():
                    getattr(part, name).fill_(value)


def adapt(weights: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Returns the library's weights under the names that they have here.

    Files keep the names of its first versions, `_RENAMED`, whatever the network calls its parts. The counters of norms
    are left out.
    """
    found = {}
    for key, value in weights.items():
        name = key if key.startswith(_OWN) else f"{_OWN}{key}"
        if name not in expected:
            for pattern, new in _RENAMED.items():
                name = re.sub(pattern, new, name)
        if not name.endswith(".num_batches_tracked"):
            found[name] = value
    return found


def resnet_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of DiffusionDet's ResNet up to stride 16 under the names that they have here."""
    found = {}
    for key, value in weights.items():
        if key.startswith("backbone.bottom_up.") and ".res5." not in key:
            for pattern, new in _BORROWED.items():
                key = re.sub(pattern, new, key)
            key = re.sub(r"stages\.(\d)", lambda at: f"stages.{int(at[1]) - 2}", key)
            found[re.sub(r"layer\.(\d)", lambda at: f"layer.{int(at[1]) - 1}", key)] = value
    return found


def graphs(model: nn.Module, workload: Workload) -> dict[str, GraphSpec]:
    """Returns the one graph, with a random image as its example."""
    random = torch.Generator().manual_seed(0)
    image = torch.randn((1, 3, workload.input.height, workload.input.width), generator=random)
    assert isinstance(model, Detr)
    return {"detector": GraphSpec(DetectorGraph(model), {"image": image}, ("image",), ("logits", "refined"))}
