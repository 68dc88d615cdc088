"""What a row asks for."""

import pytest

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError


def test_true_is_no_number():
    for field in ("temperature", "top_k"):
        with pytest.raises(RequestError, match=f"^{field} is True, expected a (whole )?number"):
            Sampling(**{field: True})
