"""Says the sentences of a verdict, and the names of limits, in Chinese: `in_language`.

Numbers, units and names stay as they were recorded.
"""

from __future__ import annotations

import re

_FRAMES: tuple[tuple[str, str], ...] = (
    (r"^(\d+) scenes?$", r"\1 个场景"),
    (r"^(\d+) draws?$", r"\1 次抽样"),
    (r"^ok: ", "通过："),
    (r"^FAILED: ", "未通过："),
    (r"^undecided: ", "未定："),
    (r"^\?: ", "未测量："),
    (r"the quality drop was not measured \(limit (\S+) %\)", r"未测量质量下降（上限 \1 %）"),
    (r"(\d+) scenes? gives no interval; at least 2 are needed", r"\1 个场景没有区间，至少需要 2 个"),
    (r"(\d+) (?:scenes|draws) give the drop to \+-(\S+) %", r"\1 个样本组把下降测到 ±\2 %"),
    (r"; about (\d+) (?:scenes |draws )?would decide", r"；约 \1 个可以判定"),
    (r"; no number of (?:scenes|draws) would decide", "；再多也无法判定"),
    (r" \((?:quality )?drop (\S+) %, at most (\S+) %\)", r"（下降 \1 %，至多 \2 %）"),
    (r"quality drop (\S+) % ± (\S+) % \(at most (\S+) %\)", r"质量下降 \1 % ± \2 %（至多 \3 %）"),
    (r"(\d+) rounds give no interval: ", r"\1 轮没有区间："),
    (r"; (\d+) rounds give a speedup of (\S+) to (\S+)x", r"；\1 轮给出 \2 至 \3 倍"),
    (
        r"t_pair p50 (\S+) % below the model's own f32 \(at least (\S+) % below\)",
        r"t_pair p50 比自身 f32 低 \1 %（至少低 \2 %）",
    ),
    (
        r"t_pair p50 (\S+) % above the model's own f32 \(at least (\S+) % below\)",
        r"t_pair p50 比自身 f32 高 \1 %（至少低 \2 %）",
    ),
    (r"([\d.]+)x the speed of the best float precision \(not slower\)", r"速度为最佳浮点精度的 \1 倍（不慢于）"),
    (
        r"([\d.]+)x the speed of the best float precision \(at most (\S+) % slower\)",
        r"速度为最佳浮点精度的 \1 倍（至多慢 \2 %）",
    ),
    (r"([\d.]+)x the speed of the Teacher in f32 \(not slower\)", r"速度为 Teacher f32 的 \1 倍（不慢于）"),
    (r"files (\S+)x smaller \(at least (\S+)x\)", r"文件缩小 \1 倍（至少 \2 倍）"),
    (r"files (\S+) % smaller \(at least (\S+) %\)", r"文件缩小 \1 %（至少 \2 %）"),
    (r"no kernel ran, so the share of (\S+) kernels was not measured", r"没有内核运行，因此未测量 \1 内核的占比"),
    (r"([\d.]+) % of matmul and convolution FLOPs ran in (\S+) kernels", r"\1 % 的矩阵乘与卷积 FLOPs 在 \2 内核中运行"),
    (r" \(the backend does not tell how many were planned\)", "（该后端不报告计划占比）"),
    (r", (\S+) % were planned \(at least (\S+) % of them\)", r"，计划 \1 %（至少达到其 \2 %）"),
    (r" \(at least (\S+) %\)$", r"（至少 \1 %）"),
    (r"^(.*：)confidence: ", r"\1置信度："),
    (r"^(.*：)pose error: ", r"\1位姿误差："),
    (r"^(.*：)guard metric: ", r"\1护栏指标："),
    (r"(\S+(?: %)?) against the Teacher \(at most (\S+(?: %)?)\)", r"\1，相对 Teacher（至多 \2）"),
    (r"; (\d+) scenes give (\S+) to (\S+)$", r"；\1 个场景给出 \2 至 \3"),
    (r"; (\d+) scenes? gives no interval$", r"；\1 个场景没有区间"),
    (r"compiled, not timed: there is no float precision to compare with", "已编译，未计时：没有可比较的浮点精度"),
    (r"compiled, not timed: there is no t_pair to judge", "已编译，未计时：没有可评判的 t_pair"),
    (r"compiled, not timed: there is no Teacher to compare with", "已编译，未计时：没有可比较的 Teacher"),
    (r"^limit: drop of (\S+) % \((.*)\)", r"阈值：下降 \1 %（\2）"),
    (r"^(阈值：.*)mainline", r"\1主线"),
    (r"^(阈值：.*) on the Teacher$", r"\1，相对 Teacher"),
    (r"^limit: (\S+) % slower than best float$", r"阈值：比最佳浮点慢 \1 %"),
    (r"^limit: not slower than best float$", "阈值：不慢于最佳浮点"),
    (r"^limit: (\S+) % below own f32$", r"阈值：比自身 f32 低 \1 %"),
)
"""What `pqk.recipe.verdict` and the limits of `pqk.report.plots` say, piece by piece; the rest stays English."""


def in_language(reason: str, language: str) -> str:
    """Returns a sentence of `verdict_reasons`, or a limit's name, in a language of the report, "en" or "zh"."""
    if language != "zh":
        return reason
    for pattern, words in _FRAMES:
        reason = re.sub(pattern, words, reason)
    return reason
