"""Ports for later: free now, and not of the range that the system gives to clients."""

from __future__ import annotations

import socket

import pytest

from keyquorum_core.errors import Reason, UnavailableError
from keyquorum_protos.wire import ports
from keyquorum_protos.wire.ports import choose_port


def test_a_chosen_port_can_be_listened_on_and_no_client_is_given_it() -> None:
    for _ in range(20):
        port = choose_port()
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
        with socket.socket() as client:
            client.bind(("127.0.0.1", 0))
            assert port < client.getsockname()[1]


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        taken = server.getsockname()[1]
        draws = iter([taken - 10_240, 5])
        monkeypatch.setattr(ports, "_draw", lambda limit: next(draws))
        assert choose_port() == 10_245


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(UnavailableError) as caught:
        choose_port("203.0.113.7")
    assert caught.value.reason is Reason.UNAVAILABLE
