"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    """A valid record with the fewest known fields, and whatever the test adds."""
    from pqk.record.schema import empty_record

    def make(**known: Any) -> dict[str, Any]:
        least = {"exp_id": "B1", "role": "candidate", "status": "ok", "datetime": "2025-10-08T12:00:00Z"}
        return {**empty_record(), **least, **known}

    return make
