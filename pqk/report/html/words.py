"""Holds every text of the HTML report in English and Chinese: `words`. Texts of records stay as they were recorded."""

from __future__ import annotations

from pqk.errors import PqkError, nearest

LANGUAGES = ("en", "zh")

_WORDS: dict[str, tuple[str, str]] = {
    # page
    "language": ("en", "zh"),
    "report": ("Report", "报告"),
    "all_records": ("all records", "全部记录"),
    "records": ("records", "条记录"),
    "newest": ("newest record", "最新记录"),
    "from": ("from", "来源"),
    "theme": ("Dark / light", "深色 / 浅色"),
    "contents": ("Contents", "目录"),
    "missing": ("Not there.", "暂无。"),
    "missing_points": (
        "Not there. Of models that predict points; make it:",
        "暂无。仅适用于预测点的模型；生成命令：",
    ),
    "not_frozen": ("Not part of this deliverable.", "该交付物中没有。"),
    "make_it": ("Make it:", "生成命令："),
    "skip": ("Skip to the table", "跳到表格"),
    # verdicts
    "verdict": ("Verdict", "结论"),
    "pass": ("pass", "通过"),
    "fail": ("fail", "未通过"),
    "undecided": ("undecided", "未定"),
    "not_judged": ("not judged", "未评判"),
    "stopped": ("stopped", "已中止"),
    "failed": ("did not end well", "运行失败"),
    "unavailable": ("unavailable", "不可用"),
    "drop": ("drop", "下降"),
    "drop_axis": (
        "drop of the main metric against the Teacher (%), lower is better",
        "主要指标相对 Teacher 的下降 (%)，越低越好",
    ),
    "drop_short": ("drop against the Teacher (%), lower is better", "相对 Teacher 的下降 (%)，越低越好"),
    "metric_axis": ("{0}, {1} is better", "{0}，越{1}越好"),
    "lower": ("lower", "低"),
    "higher": ("higher", "高"),
    "no_interval": ("no interval was recorded", "未记录区间"),
    "over": ("over {0}", "基于 {0}"),
    "speed_own": ("speed against its own f32", "相对自身 f32 的速度"),
    "speed_best": ("speed against the best float", "相对最佳浮点的速度"),
    "speed_teacher": ("speed against the Teacher in f32", "相对 Teacher f32 的速度"),
    "size": ("size", "大小"),
    "of_teacher": ("of the Teacher's", "相对 Teacher"),
    "reasons": ("Why", "理由"),
    "recipes_note": (
        "Over all evaluations of the campaign. The records below are single runs.",
        "基于该活动的全部评估；下方记录为单次运行。",
    ),
    "no_candidate": (
        "No record of a candidate: only float rows were measured.",
        "没有候选模型的记录：只测量了浮点行。",
    ),
    # table
    "table": ("Table", "表格"),
    "filter": ("Filter rows", "筛选"),
    "filter_hint": ("words, all of which a row must hold", "输入若干词，行须全部包含"),
    "all": ("all", "全部"),
    "shown_rows": ("{0} of {1} rows", "显示 {0} / {1} 行"),
    "sort_hint": (
        "Click a heading, or press Enter on it, to sort; again to reverse. Bold: best of the rows on the same scenes. "
        "Below a value: its 95 % interval.",
        "点击表头(或按 Enter)排序，再次则反序。粗体：相同场景各行中的最佳值。数值下方：95 % 区间。",
    ),
    "row": ("row", "行"),
    "exp": ("card", "任务卡"),
    "role": ("role", "角色"),
    "precision": ("precision", "精度"),
    "teacher": ("teacher", "Teacher"),
    "candidate": ("candidate", "候选"),
    "baseline": ("baseline", "基线"),
    "model": ("model", "模型"),
    "toolchain": ("toolchain", "工具链"),
    "scenes": ("scenes", "场景"),
    "seed": ("train seed", "训练种子"),
    "disturbed": ("timing disturbed", "计时受干扰"),
    "emulated": ("emulated", "模拟"),
    # charts
    "pareto": ("Quality against time", "质量与时间"),
    "pareto_note": (
        "Hollow: failed; with a dot: undecided. Dashed: Pareto front; dotted: limits; bars: 95 % intervals.",
        "空心：未通过；带点：未定。虚线：帕累托前沿。点线：阈值。误差棒：95 % 区间。",
    ),
    "front": ("Pareto front", "帕累托前沿"),
    "time_axis": ("median time of a sample (ms), lower is better", "单个样本的中位时间 (ms)，越低越好"),
    "ratio_axis": (
        "speed against the Teacher in f32, same interleaved run (×), higher is better",
        "同一交错计时中相对 Teacher f32 的速度 (×)，越高越好",
    ),
    "caution": (
        "Milliseconds belong to each row's own run; only ratios are compared across runs.",
        "毫秒数属于各行自己的运行；跨运行只比较比值。",
    ),
    "limit_drop": ("limit: drop of {0} %", "阈值：下降 {0} %"),
    "latency": ("Latency", "延迟"),
    "latency_note": (
        "Every timed sample is a dot; the box holds the middle half, its line is the median.",
        "每个点为一次计时；箱体为中间一半，线为中位数。",
    ),
    "latency_axis": ("time of a sample (ms)", "单个样本的时间 (ms)"),
    "speeds": ("Speed within a run", "同一运行内的速度"),
    "speeds_axis": ("speed (×), higher is better; bars: 95 % interval", "速度 (×)，越高越好；误差棒：95 % 区间"),
    "executed": ("Executed precision", "实际执行的精度"),
    "executed_axis": (
        "share of matmul and convolution FLOPs (%)",
        "矩阵乘法与卷积 FLOPs 的占比 (%)",
    ),
    "executed_note": ("Read from the engines, not from what was asked for.", "读自引擎，而非所请求的精度。"),
    "newest_only": ("The {0} newest of {1} rows are drawn.", "仅绘制 {1} 行中最新的 {0} 行。"),
    # parity
    "parity": ("Parity of toolchains", "工具链一致性"),
    "level": ("level", "层级"),
    "agree": ("agree", "一致"),
    "differ": ("differ", "不一致"),
    "not compared": ("not compared", "未比较"),
    "side": ("side", "一方"),
    "against": ("against", "对照"),
    "run_as": ("run as", "运行方式"),
    "points_rel": ("points, mean relative error", "点的平均相对误差"),
    "values_rel": ("values, mean relative error", "数值的平均相对误差"),
    "moved": ("points moved by more than 1 % of the depth (%)", "移动超过深度 1 % 的点 (%)"),
    "explain": ("What causes the error", "误差来源"),
    "explain_note": (
        "Share of the final error that disappears when this part computes in float (about 1 % is rounding noise).",
        "该部分改用浮点计算后消失的最终误差占比(约 1 % 为舍入噪声)。",
    ),
    "part": ("part", "部分"),
    "graph": ("graph", "计算图"),
    "share": ("share", "占比"),
    # blocks
    "blocks": ("Time per block", "各模块时间"),
    "graphs_note": (
        "Median time of each graph in one sample, from the raw samples; glue is the rest of the sample.",
        "单个样本中各计算图的中位时间(来自原始计时)；其余为胶水代码。",
    ),
    "glue": ("glue", "胶水代码"),
    "graphs_axis": ("median time in one sample (ms)", "单个样本内的中位时间 (ms)"),
    "parts_note": (
        "f32 engines of the Teacher and of the smaller model, in turns.",
        "Teacher 与较小模型的 f32 引擎，交替测量。",
    ),
    "profile_note": (
        "Kernel times of one sample, f32 and int8 in turns.",
        "单个样本的内核时间，f32 与 int8 交替测量。",
    ),
    # ablations
    "ablations": ("Ablations", "消融实验"),
    "point": ("point", "取值"),
    # evidence
    "again": ("How to make each row again", "如何重现每一行"),
    "again_note": (
        "Each command as it was given; OUTSIDE stands for a folder outside of the project. The same inputs give the "
        "hashes below again.",
        "命令与运行时给出的相同；OUTSIDE 代表项目之外的文件夹。输入相同时，会得到下列相同的哈希值。",
    ),
    "again_old": (
        "Records before schema 2.1 do not hold the options --model, --scenes, --images and --set of their run.",
        "schema 2.1 之前的记录不含运行时的 --model、--scenes、--images 与 --set 选项。",
    ),
    "command": ("command", "命令"),
    "evidence": ("evidence", "证据"),
    "environment": ("Environment", "环境"),
    "machine": ("machine", "机器"),
    "versions": ("versions", "版本"),
    "rows": ("rows", "行"),
    # evaluations of a deliverable
    "evaluations": ("Evaluations", "评估"),
    "evaluations_note": (
        "Mean ± sample standard deviation over the runs of a line.",
        "每行各次运行的均值 ± 样本标准差。",
    ),
    "runs": ("runs", "运行"),
    # 3D
    "points": ("Point maps", "点图"),
    "points_note": (
        "Both models see the same pictures; one camera moves both. Drawn are {0} of {1} points, without the {2} % "
        "that the Teacher is least sure of. Lengths of the candidate times {3}, the ratio of the median depths.",
        "两个模型输入相同图像；一个相机同时控制两个视图。绘制 {1} 个点中的 {0} 个，略去 Teacher 置信度最低的 {2} %。"
        "候选模型的长度乘以 {3}(中位深度之比)。",
    ),
    "colour": ("Colour", "颜色"),
    "from_image": ("from the pictures", "来自图像"),
    "from_error": ("from the error", "来自误差"),
    "error": ("error", "误差"),
    "error_axis": (
        "distance of the candidate's point from the Teacher's (% of its depth)",
        "候选点到 Teacher 点的距离(占其深度的 %)",
    ),
    "mean": ("mean", "平均"),
    "pictures": ("pictures", "图像"),
    "error_map": ("error map", "误差图"),
}


def words(language: str) -> dict[str, str]:
    """Returns the texts of a language by their names. Raises PqkError for an unknown one."""
    if language not in LANGUAGES:
        raise PqkError(f"--lang {language}: there are {', '.join(LANGUAGES)}{nearest(language, LANGUAGES)}")
    place = LANGUAGES.index(language)
    return {name: both[place] for name, both in _WORDS.items()}
