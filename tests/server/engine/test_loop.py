import queue
from types import SimpleNamespace

import pytest

from headlong.server.engine.faults import Faults
from headlong.server.engine.loop import EngineLoop
from headlong.server.engine.messages import Abort, Add, Failed, Refused, Report, Stop
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.status import EngineStats
from headlong.server.errors import ContextLengthError, EngineDeadError, HeadlongError


class FakeEngine:
    """Takes `num_steps` steps for each request, the last of which says so."""

    def __init__(self, commands, num_steps=3):
        self.commands, self.num_steps = commands, num_steps
        self.left, self.aborted, self.refusal = {}, [], None
        self.num_idle = 0
        self.steps_total = 0
        self.before_forward = None
        self.obeyed_at = []

    @property
    def has_work(self):
        return bool(self.left)

    def add_request(self, request):
        if self.refusal is not None:
            raise self.refusal
        self.left[request.request_id] = self.num_steps
        self.obeyed_at.append(self.steps_total)

    def abort(self, request_id):
        self.aborted.append(request_id)
        self.left.pop(request_id, None)

    def step(self):
        self.steps_total += 1
        self.left = {name: count - 1 for name, count in self.left.items()}
        done = [name for name, count in self.left.items() if not count]
        for name in done:
            del self.left[name]
        return [SimpleNamespace(request_id=name) for name in done]

    def idle_step(self):
        if self.num_idle:
            self.num_idle -= 1
            return True
        return False

    def stats(self):
        return EngineStats(steps_total=self.steps_total)


def add(name):
    return Add(EngineRequest(name, [1], SamplingParams()))


@pytest.fixture
def setting():
    """An engine, its commands, what it sent, and a function that runs it to its end."""
    commands = queue.SimpleQueue()
    engine = FakeEngine(commands)
    sent = []

    def run(*asked, faults=None, at_rest=()):
        # What is asked while nothing runs.
        rest = [*at_rest, Stop()]

        def send(event):
            sent.append(event)
            if not engine.has_work and not engine.num_idle and rest:
                commands.put(rest.pop(0))

        for command in asked:
            commands.put(command)
        return EngineLoop(engine, commands, send, faults).run()

    return SimpleNamespace(engine=engine, sent=sent, run=run)


def test_every_step_is_reported(setting):
    assert setting.run(add("a"), add("b"))
    assert [event.stats.steps_total for event in setting.sent] == [1, 2, 3]
    assert [len(event.outputs) for event in setting.sent] == [0, 0, 2]
    assert setting.engine.obeyed_at == [0, 0]


def test_it_says_how_it_is_when_it_comes_to_rest(setting):
    # A report at the start, then one for the abort of what never ran.
    assert setting.run(at_rest=[Abort("x")])
    assert [type(event) for event in setting.sent] == [Report, Report]
    assert setting.engine.aborted == ["x"]


def test_background_work_runs_while_there_is_some(setting):
    setting.engine.num_idle = 4
    assert setting.run()
    assert setting.engine.num_idle == 0
    assert len(setting.sent) == 4


@pytest.mark.parametrize("error", [ContextLengthError("long", "prompt"), ZeroDivisionError("odd")])
def test_a_request_that_cannot_be_queued_harms_nobody(setting, error):
    setting.engine.refusal = error
    assert setting.run(add("bad"))
    refused = setting.sent[0]
    assert isinstance(refused, Refused)
    assert refused.request_id == "bad"
    known = isinstance(error, HeadlongError)
    assert type(refused.fault.error()) is (ContextLengthError if known else HeadlongError)
    assert "odd" not in refused.fault.message
    # Whatever was queued of it before it failed is forgotten.
    assert setting.engine.aborted == ([] if known else ["bad"])


def test_a_crash_is_reported_last(setting):
    assert not setting.run(add("a"), faults=Faults(crash_at_step=2))
    assert [type(event) for event in setting.sent] == [Report, Failed]
    assert type(setting.sent[-1].fault.error()) is EngineDeadError


def test_a_memory_fault_hooks_into_the_forward_pass(setting):
    import torch

    faults = Faults(out_of_memory_request="a")
    setting.run(faults=faults)
    setting.engine.before_forward(["b"])
    with pytest.raises(torch.OutOfMemoryError):
        setting.engine.before_forward(["b", "a"])
