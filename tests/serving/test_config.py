"""Settings that Ray Serve would refuse later, and less clearly."""

from __future__ import annotations

import pytest

from deliberation.types import InputError
from serving.config import ServeConfig


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("host", ["::1", "::", "[::1]"])
def test_an_address_that_cannot_be_listened_on_is_refused(host, keys):
    with pytest.raises(InputError, match="IPv4") as caught:
        ServeConfig(host=host, require_keys=keys)
    assert caught.value.field == "host"


def test_a_queue_holds_one_request_at_least():
    with pytest.raises(InputError, match="at least 1") as caught:
        ServeConfig(max_queued_requests=0)
    assert caught.value.field == "max_queued_requests"
    assert ServeConfig(max_queued_requests=1).max_queued_requests == 1
