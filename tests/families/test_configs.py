"""Configurations: the named ones are valid (their keys: test_vectors.py), bad ones give one sentence."""

import math

import pytest

from pqk.errors import PqkError
from pqk.families.build import build_model, empty_model
from pqk.families.dust3r.configs import NAMED, dpt_hooks, plain_config, read_config
from pqk.families.sizes import BlockSize

COUNTS = {"224_linear": 532_342_784, "512_linear": 532_342_784, "512_dpt": 571_171_208}


@pytest.mark.parametrize("name", COUNTS)
def test_official_sizes(name):
    model = empty_model("dust3r", NAMED[f"dust3r-{name.replace('_', '-')}"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_every_named_configuration_is_valid():
    for config in NAMED.values():
        assert plain_config(config) == config
        read_config(config)


def test_infinities_are_read_in_both_spellings(small_config):
    for low, high in (("-inf", "inf"), (-math.inf, math.inf)):
        config = {**small_config, "depth_mode": ("exp", low, high), "conf_mode": ("exp", 1, high)}
        assert read_config(config).depth_mode.low == -math.inf
        assert plain_config(config)["depth_mode"] == ["exp", "-inf", "inf"]


def test_block_lists_win_over_the_uniform_sizes(small_config):
    blocks = [{"heads": 3, "ffn": 20}, {"heads": 1, "ffn": 8}, {"heads": 2, "ffn": 4}]
    sizes = read_config({**small_config, "enc_blocks": blocks, "enc_head_dim": 8, "mlp_ratio": 2})
    assert sizes.enc_blocks == (BlockSize(3, 8, 20), BlockSize(1, 8, 8), BlockSize(2, 8, 4))
    assert sizes.dec_blocks == (BlockSize(2, 8, 32),) * 3


def test_dpt_hooks():
    assert dpt_hooks(12) == (0, 6, 9, 12)
    assert dpt_hooks(3) == (0, 1, 2, 3)
    with pytest.raises(PqkError, match="at least 3, got 2"):
        dpt_hooks(2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"enc_deph": 3}, r"unknown key 'enc_deph'.*did you mean 'enc_depth'"),
        ({"enc_depth": 0}, "enc_depth must be a whole number from 1"),
        ({"enc_depth": True}, "enc_depth must be a whole number from 1"),
        ({"dec_embed_dim": None}, "dec_embed_dim is missing"),
        ({"enc_num_heads": 5}, "not a multiple of enc_num_heads"),
        ({"enc_head_dim": 6}, "multiple of 4"),
        ({"head_type": "conv"}, "head_type must be one of linear, dpt"),
        ({"pos_embed": "cosine"}, "pos_embed must be RoPE"),
        ({"mlp_ratio": -1}, "mlp_ratio"),
        ({"patch_size": 14}, "patch_size 16"),
        ({"depth_mode": ["exp", 0, 5]}, "depth_mode must be unbounded"),
        ({"depth_mode": "exp"}, r"depth_mode must be \[name, low, high\]"),
        ({"conf_mode": ["sigmoid", 1, "inf"]}, "impossible bounds"),
        ({"landscape_only": "no"}, "landscape_only must be true or false"),
        ({"dec_depth": 2}, "dec_depth must be at least 3"),
        ({"dec_blocks": [{"heads": 1}]}, r"dec_blocks\[0\]"),
        ({"dec_blocks2": [{"heads": 1, "ffn": 4}]}, "same number of blocks"),
        ({"dpt": {"width": 3}}, "unknown key 'width' in dpt"),
        ({"dpt": {"layer_dims": [1, 2, 3]}}, "four whole numbers"),
        ({"dpt": {"feature_dim": 7}}, "even"),
        ({"enc_embed_dim": 10**9}, "enc_embed_dim must be a whole number from 1 to 262144, got 1000000000"),
        ({"enc_depth": 10**5}, "enc_depth must be at most 1024, got 100000"),
        ({"mlp_ratio": 1e9}, "mlp_ratio must make the MLP 1 to 262144 wide"),
        ({"dec_blocks": [{"heads": 1, "ffn": 10**9}] * 3}, r"dec_blocks\[0\]"),
        ({"dec_blocks": [{"heads": 1, "ffn": 4}] * 1025}, "list of 1 to 1024 blocks, got 1025 entries"),
        ({"dpt": {"last_dim": 10**9}}, "last_dim must be a whole number"),
        ({"enc_embed_dim": 2**16, "enc_num_heads": 2**8}, "has .* parameters; at most 1e\\+10"),
    ],
)
def test_bad_configurations_give_one_sentence(small_config, change, sentence):
    with pytest.raises(PqkError, match=sentence) as caught:
        build_model("dust3r", {**small_config, **change})
    assert "\n" not in str(caught.value)


def test_unknown_family():
    with pytest.raises(PqkError, match=r"unknown model family 'dustr'.*did you mean 'dust3r'"):
        build_model("dustr", {})
