import pytest

from headlong.server.errors import InvalidRequestError, QueueFullError
from headlong.server.queue_gate import QueueGate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_places_are_taken_and_given_back_once() -> None:
    gate = QueueGate(3)
    with gate.enter(2) as ticket:
        assert gate.num_queued == 2
        with pytest.raises(QueueFullError):
            gate.enter(2)
        assert gate.num_queued == 2
        ticket.give_back_one()
        gate.enter(2)
        assert gate.num_queued == 3
        ticket.release()
        ticket.release()
        ticket.give_back_one()
    assert gate.num_queued == 2


def test_more_than_may_ever_wait_is_no_matter_of_time() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        QueueGate(3).enter(4)
    assert caught.value.param == "prompt"


def test_when_to_come_again_follows_the_recent_rate() -> None:
    clock = Clock()
    gate = QueueGate(40, clock)
    ticket = gate.enter(40)
    assert gate.retry_after_s == 5  # nothing has ever left
    for _ in range(10):
        clock.now += 0.5
        ticket.give_back_one()
    # 10 departures in 4.5 seconds; 30 wait.
    assert gate.retry_after_s == 14
    gate.enter(10)
    with pytest.raises(QueueFullError) as caught:
        gate.enter(1)
    assert caught.value.retry_after_s == 18
    clock.now += 100
    assert gate.retry_after_s == 5  # nothing has left lately
    ticket.release()
    assert gate.retry_after_s == 1
