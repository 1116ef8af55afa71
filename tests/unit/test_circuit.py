"""The circuit breaker, and the figures custodians are ranked and hedged by."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keyquorum_coordinator.circuit import Circuit, CircuitState
from keyquorum_coordinator.latency import Latency


def opened(at: float = 100.0) -> Circuit:
    circuit = Circuit(threshold=3, first_rest=1.0, longest_rest=4.0)
    for _ in range(3):
        circuit.failed(at)
    return circuit


def test_it_opens_after_failures_in_a_row_only() -> None:
    circuit = Circuit(threshold=3)
    for _ in range(5):
        circuit.failed(1.0)
        circuit.failed(1.0)
        circuit.succeeded()
    assert circuit.state(1.0) is CircuitState.CLOSED
    assert opened().state(100.0) is CircuitState.OPEN
    assert not opened().admit(100.5)


def test_after_its_rest_exactly_one_request_may_try() -> None:
    circuit = opened()
    assert circuit.state(101.0) is CircuitState.HALF_OPEN
    assert circuit.admit(101.0)
    assert not circuit.admit(101.1)
    circuit.succeeded()
    assert circuit.state(101.2) is CircuitState.CLOSED
    assert circuit.admit(101.2)


def test_a_failed_trial_doubles_the_rest_up_to_the_longest() -> None:
    circuit, now = opened(), 100.0
    for rest in (1.0, 2.0, 4.0, 4.0):
        assert circuit.state(now + rest - 0.01) is CircuitState.OPEN
        now += rest
        assert circuit.admit(now)
        circuit.failed(now)


def test_failures_of_requests_sent_before_it_opened_do_not_prolong_the_rest() -> None:
    circuit = opened()
    for _ in range(10):
        circuit.failed(100.9)
    assert circuit.admit(101.0)


def test_being_reached_again_ends_the_rest() -> None:
    circuit = opened()
    circuit.recovered(100.2)
    assert circuit.state(100.2) is CircuitState.HALF_OPEN
    assert circuit.admit(100.2)


def test_a_trial_that_never_ends_gives_way() -> None:
    circuit = opened()
    assert circuit.admit(101.0)
    assert not circuit.admit(104.9)
    assert circuit.admit(105.0)


@given(st.lists(st.tuples(st.sampled_from(["fail", "ok", "admit", "recovered"]), st.floats(0, 5)), max_size=60))
def test_it_never_locks_a_custodian_out_for_longer_than_the_longest_rest(steps: list[tuple[str, float]]) -> None:
    circuit, now = Circuit(first_rest=1.0, longest_rest=4.0), 0.0
    for step, pause in steps:
        now += pause
        if step == "fail":
            circuit.failed(now)
        elif step == "ok":
            circuit.succeeded()
            assert circuit.state(now) is CircuitState.CLOSED
        elif step == "recovered":
            circuit.recovered(now)
        else:
            assert not circuit.admit(now) or circuit.state(now) is not CircuitState.OPEN
    assert circuit.admit(now + 8.01)


def test_latency_tells_the_usual_from_the_rare() -> None:
    latency = Latency()
    assert (latency.mean, latency.p95) == (0.0, 0.0)
    for sample in range(200):
        latency.add(0.5 if sample % 10 == 0 else 0.01)
    assert latency.p95 == 0.5
    for _ in range(200):
        latency.add(0.01)
    assert latency.p95 == 0.01
    assert 0.009 < latency.mean < 0.011
