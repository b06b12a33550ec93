import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.faults import Faults
from headlong.server.engine.messages import (
    LENGTH_BYTES,
    Abort,
    Add,
    Failed,
    Fault,
    FrameSplitter,
    Ready,
    Refused,
    Report,
    Start,
    Stop,
    decode_command,
    decode_event,
    encode,
)
from headlong.server.engine.outputs import (
    PositionLogprobs,
    PrefillChunk,
    RequestOutput,
    TokenLogprob,
)
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.sampling_params import SamplingParams, Structure
from headlong.server.engine.status import CanaryStats, EngineInfo, EngineStats, GroupInfo, RankInfo
from headlong.server.errors import (
    ConfigError,
    ContextLengthError,
    HeadlongError,
    InvalidRequestError,
    QueueFullError,
)

REQUEST = EngineRequest(
    "cmpl-1-0",
    [5, 6, 7],
    SamplingParams(
        max_tokens=9,
        seed=2**64 - 1,
        logit_bias={3: -100.0},
        stop=("\n", "wörd"),
        stop_token_ids=(4,),
        logprobs=20,
        prompt_logprobs=1,
        structure=Structure("regex", "a+"),
    ),
    n=3,
    asked_max_tokens=False,
    priority=-5,
    tenant="someone",
    cache_salt="salt",
    kv_policy=KVPolicy(sink_size=3, window_size=70),
    timeout_s=1.5,
)
POSITION = PositionLogprobs(
    TokenLogprob(1, "\ufffd", -0.1), (TokenLogprob(2, "b", float("-inf")),) * 2
)
OUTPUT = RequestOutput(
    request_id="cmpl-1-0",
    text="ö",
    token_ids=(7, 8),
    logprobs=(POSITION, POSITION),
    finish_reason="stop",
    stop_reason="wörd",
    num_prompt_tokens=3,
    num_cached_tokens=1,
    num_completion_tokens=2,
    index=2,
    queued_s=0.1,
    prefill_chunks=(PrefillChunk(1.5, 7), PrefillChunk(2.5, 3, 2)),
    prompt_logprobs=(POSITION,),
    cache_misses={"new": 2},
    kv_bytes_peak=2**40,
)
INFO = EngineInfo(
    model="m",
    max_model_len=100,
    vocab_size=10,
    max_num_seqs=4,
    block_size=16,
    eos_token_ids=(0, 2),
    default_sampling={"temperature": 0.5, "top_k": 7},
    head_groups=((0, 1), (1, 1)),
    groups=(
        GroupInfo(
            name="g", sink_size=0, window_size=None, num_heads=1, num_blocks=2, block_bytes=3
        ),
    ),
    full_token_bytes=64,
    device="cpu",
    dtype="float32",
    lines=("a", "b"),
    ranks=(RankInfo(device="cpu", num_heads=4, num_retrieval_heads=1, kv_bytes=4096),),
    pid=7,
)
STATS = EngineStats(
    steps_total=4,
    owned_blocks=(1, 2),
    prefix_misses_total={"new": 2},
    canary=CanaryStats(requests=1, kl_sum=0.25, skipped={"busy": 1}),
)


@pytest.mark.parametrize(
    "message",
    [
        Start(EngineConfig(model="m", sparsity=None), {"version": 1}, Faults(hang_at_step=3)),
        Add(REQUEST),
        Abort("cmpl-1-0"),
        Stop(),
    ],
)
def test_commands_arrive_as_they_were(message):
    assert decode_command(encode(message)[LENGTH_BYTES:]) == message


@pytest.mark.parametrize(
    "message",
    [
        Ready(INFO),
        Report([OUTPUT], STATS),
        Refused("r", Fault("InvalidRequestError", "no", "n")),
        Failed(Fault("ConfigError", "no")),
    ],
)
def test_events_arrive_as_they_were(message):
    assert decode_event(encode(message)[LENGTH_BYTES:]) == message


def test_a_message_of_the_other_way_is_none():
    with pytest.raises(msgspec.ValidationError):
        decode_event(encode(Stop())[LENGTH_BYTES:])


def test_a_request_is_checked_again_on_arrival():
    message = encode(Add(REQUEST))[LENGTH_BYTES:]
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        decode_command(message.replace(b"\xaamin_tokens\x00", b"\xaamin_tokens\x7f"))


@pytest.mark.parametrize(
    "error", [ContextLengthError("long", "prompt"), ConfigError("bad"), HeadlongError("what")]
)
def test_errors_arrive_as_the_same_class(error):
    again = Fault.of(error).error()
    assert type(again) is type(error)
    assert (again.message, again.param) == (error.message, error.param)


def test_an_error_without_an_entry_arrives_as_its_base():
    assert type(Fault.of(QueueFullError("full", 3)).error()) is HeadlongError


@given(st.lists(st.text(max_size=50)), st.data())
def test_frames_are_found_however_the_bytes_come(names, data):
    stream = b"".join(encode(Abort(name)) for name in names)
    splitter = FrameSplitter()
    found = []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        found += splitter.feed(stream[:count])
        stream = stream[count:]
    assert [decode_command(each) for each in found] == [Abort(name) for name in names]
