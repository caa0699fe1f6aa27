"""The calibration set as every quantizer sees it, and the silence around the quantization tools."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest

from backends.base import BackendError, TensorInfo
from backends.calibration import CalibrationItems
from backends.quiet import quiet

INPUTS = (TensorInfo("a", (1, 2), "float32"), TensorInfo("b", (1,), "int64"))


def item(value=0.0, **changes):
    return {"a": np.full((1, 2), value, np.float32), "b": np.zeros(1, np.int64), **changes}


def test_only_the_wanted_items_are_handed_on_in_every_pass():
    made = []

    class Nine:
        def __iter__(self):
            for k in range(9):
                made.append(k)
                yield item(k)

    items = CalibrationItems(Nine(), INPUTS, 3)
    assert [float(found["a"][0, 0]) for found in items] == [0, 1, 2]
    assert (items.passes, items.used) == (1, 3)
    assert max(made) <= 3
    next(iter(items))
    assert (items.passes, items.used) == (2, 3)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([], "empty calibration set"),
        ([item()], "the calibration set holds 1 items, calibration_samples asks for 2"),
        ([item(), {"a": item()["a"]}], r"calibration item 1: inputs must be ['a', 'b'], got ['a']"),
        ([item(a=np.zeros((2, 1), np.float32))], "item 0: 'a' must be float32[1, 2], got float32[2, 1]"),
        ([item(b=np.zeros(1, np.int32))], "item 0: 'b' must be int64[1], got int32[1]"),
        ([item(), item(np.nan)], "item 1: 'a' holds a value that is not finite"),
        ([item(-np.inf)], "item 0: 'a' holds a value that is not finite"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(items, says):
    with pytest.raises(BackendError) as caught:
        list(CalibrationItems(items, INPUTS, 2))
    assert says in str(caught.value)


def test_an_iterator_is_refused_before_anything_is_read():
    with pytest.raises(BackendError, match="iterable again"):
        CalibrationItems(iter([item()]), INPUTS, 1)


def test_quiet_drops_words_and_lets_exceptions_through(capsys):
    before = logging.root.manager.disable
    with pytest.raises(ValueError, match="told"), quiet():
        print("printed")
        logging.getLogger("tool").critical("logged")
        warnings.warn("warned", stacklevel=1)
        raise ValueError("told")
    assert logging.root.manager.disable == before
    print("after")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("after\n", "")
