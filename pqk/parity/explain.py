"""Explains differences for `pqk parity --explain`: where runtimes differ, and which nodes cause the int8 error.

Two measurements for each run, each on a few validation pairs:

- Float: the first node at which the backend differs from ONNX Runtime on the float graphs.
- Int8: the share of the error at the outputs that disappears when one part of the model computes in float. To prove
  it, the worst part is put back to float, scored on all validation pairs and, where the engines are real, timed beside
  the int8 model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.base import BackendError
from pqk.errors import PqkError
from pqk.recipe.candidate import Candidate
from pqk.recipe.ranking import can_rank, parted, ranking, times_beside, with_floats
from pqk.stats.latency import percentile, speedup


def explain(candidate: Candidate) -> dict[str, Any]:
    """Ranks the parts of a quantized run, puts the worst back to float, and measures the change.

    Returns parted, groups, nodes (see `ranking`), worst (the row chosen), proof (drop on validation samples and pair
    time before and after in the same interleaved run, and the speedup from before to after) and a sentence. Of a
    backend that is emulated, parted and times are null.
    Raises PqkError or BackendError for a candidate whose nodes cannot go back to float.
    """
    backend = candidate.variants[-1].backend
    if not can_rank(backend):
        raise PqkError(f"backend {backend} cannot put nodes of its quantized graphs back to float")
    timed = candidate.records[-1]["measured"] == "engine"
    # An emulated engine computes in ONNX Runtime: it cannot differ from it.
    found: dict[str, Any] = {"parted": parted(candidate) if timed else None, **ranking(candidate)}
    worst = found["worst"] = found["groups"][0]
    mixed = with_floats(candidate, {worst["graph"]: worst["nodes"]})
    before, after = candidate.drop(candidate.variants[-1]), candidate.drop(mixed, ())
    times = times_beside(candidate, mixed) if timed else None
    before_ms, after_ms = [percentile(t, 50) for t in times] if times else (None, None)
    found["proof"] = {
        "drop_before_pct": before.value if before else None,
        "drop_after_pct": after.value if after else None,
        "t_pair_p50_before_ms": before_ms,
        "t_pair_p50_after_ms": after_ms,
        "speedup": speedup(*times).value if times else None,
    }
    found["sentence"] = _sentence(worst, found["proof"])
    return found


def explain_all(candidates: Mapping[tuple[str, str], Candidate]) -> dict[str, dict[str, Any]]:
    """Returns `explain` of each candidate under 'backend/quantizer'; on failure only a sentence with the reason."""
    found: dict[str, dict[str, Any]] = {}
    for (backend, quantizer), candidate in candidates.items():
        try:
            found[f"{backend}/{quantizer}"] = explain(candidate)
        except (BackendError, PqkError) as error:
            found[f"{backend}/{quantizer}"] = {"sentence": f"cannot be explained: {error}"}
    return found


def _sentence(worst: Mapping[str, Any], proof: Mapping[str, Any]) -> str:
    before, after = proof["drop_before_pct"], proof["drop_after_pct"]
    drop = (
        "the drop cannot be measured"
        if before is None or after is None
        else f"the drop on validation samples goes from {before:.2f} % to {after:.2f} %"
    )
    if proof["speedup"] is None:
        time = "the cost in time was not measured, as these engines are emulated"
    else:
        slower = 100 * (1 / proof["speedup"] - 1)
        time = f"a pair takes {slower:+.1f} % time"
    return (
        f"{worst['graph']} {worst['name']}: {100 * worst['of_all']:.0f} % of the final error; with its "
        f"{len(worst['nodes'])} nodes in float {drop} and {time}"
    )
