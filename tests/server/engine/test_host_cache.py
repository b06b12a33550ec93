"""A small arena with the host's memory and a folder behind it answers like a large one."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headlong.cache.tiered_cache import TieredCache
from headlong.cache.transfers import ThreadMover
from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.errors import ConfigError
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (200, 150, 220, 180, 90, 260)
MAX_LEN = 300


@dataclass
class FixedRate:
    """What was measured, if it had been this."""

    per_second: float | None

    def add(self, amount: float, seconds: float) -> None:
        del amount, seconds


FOR_EVER = FixedRate(1e-9)
AT_ONCE = FixedRate(1e15)


@dataclass
class Setting:
    """A model, prompts, and what a cache that keeps everything answers."""

    model: Path
    profile: Path
    prompts: list[list[int]]
    answers: list[list[int]]
    arena_bytes: int
    opened: list[Engine] = field(default_factory=list)

    def open(self, **changes: object) -> Engine:
        settings: dict[str, object] = {
            "profile": str(self.profile),
            "kv_cache_memory_bytes": self.arena_bytes,
            "block_size": 8,
            "max_model_len": MAX_LEN,
            "host_cache_bytes": 8 << 20,
        }
        engine = build_engine(self.model, **(settings | changes))
        self.opened.append(engine)
        return engine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("model")
    model = save_tiny_model(folder, "llama")
    profile = random_profile(model, folder / "profile.json", seed=1)
    roomy = build_engine(model, profile=str(profile), enable_prefix_caching=False)
    prompts = random_prompts(LENGTHS, VOCAB_SIZE)
    return Setting(
        model, profile, prompts, run(roomy, prompts), roomy.plan.full_sequence_bytes(MAX_LEN) * 2
    )


@pytest.fixture
def setting(shared: Setting) -> Iterator[Setting]:
    yield shared
    while shared.opened:
        shared.opened.pop().close()


def tiered(engine: Engine) -> TieredCache:
    assert isinstance(engine.cache, TieredCache)
    return engine.cache


def mover(engine: Engine) -> ThreadMover:
    tiers = tiered(engine).tiers
    assert tiers is not None
    assert isinstance(tiers._mover, ThreadMover)
    return tiers._mover


def set_rates(engine: Engine, load: FixedRate, prefill: FixedRate) -> None:
    tiers = tiered(engine).tiers
    assert tiers is not None
    tiers.load_rate = load  # type: ignore[assignment]
    engine.scheduler.prefixes.prefill_rate = prefill  # type: ignore[assignment]


def rest(engine: Engine) -> None:
    """Let an idle engine do all that it does when it is idle."""
    while engine.idle_step():
        pass
    cache = tiered(engine)
    assert cache.tiers is not None
    assert not cache.tiers.busy
    cache.check_integrity()


def fill_disk(setting: Setting, folder: Path) -> Engine:
    """An engine that has left the blocks of the prompts in a folder."""
    engine = setting.open(disk_cache_dir=str(folder))
    run(engine, setting.prompts)
    rest(engine)
    return engine


def step_until(engine: Engine, condition: object) -> None:
    for _ in range(5000):
        if callable(condition) and condition():
            return
        engine.step()
    raise AssertionError("it never came to that")


@pytest.mark.parametrize("balance", ["slabs", "fixed"])
def test_prompts_come_back_from_the_host(setting: Setting, balance: str) -> None:
    engine = setting.open(arena_balance=balance)
    assert engine.stats().tiers.host_bytes == 0, "the warm-up left something"
    assert run(engine, setting.prompts) == setting.answers
    assert engine.stats().tiers.host_bytes > 0
    set_rates(engine, load=AT_ONCE, prefill=FOR_EVER)
    before = engine.stats().prefix_hits_total
    assert run(engine, setting.prompts) == setting.answers
    stats = engine.stats()
    assert stats.tiers.loaded_tokens > 400
    assert stats.prefix_hits_total - before >= stats.tiers.loaded_tokens
    assert stats.tiers.recomputed_tokens == 0
    assert stats.tiers.moved_bytes["from_host"] > 0
    rest(engine)


def test_blocks_bring_along_all_that_is_kept_with_them(setting: Setting) -> None:
    """Codes, scales, bounds and sums lie in the page; choices of pages come out the same."""
    features: dict[str, object] = {
        "kv_cache_dtype": "retrieval=int4,streaming=int8",
        "compensation": "on",
        "retrieval_budget": 64,
        "selection_reuse_steps": 4,
    }
    roomy = build_engine(
        setting.model,
        profile=str(setting.profile),
        block_size=8,
        enable_prefix_caching=False,
        **features,
    )
    answers = run(roomy, setting.prompts)
    assert answers != setting.answers
    arena_bytes = roomy.plan.full_sequence_bytes(MAX_LEN)
    engine = setting.open(kv_cache_memory_bytes=arena_bytes, **features)
    assert run(engine, setting.prompts) == answers
    set_rates(engine, load=AT_ONCE, prefill=FOR_EVER)
    assert run(engine, setting.prompts) == answers
    assert engine.stats().tiers.loaded_tokens > 200


def test_a_token_that_is_computed_alone_takes_a_step(setting: Setting) -> None:
    engine = setting.open(retrieval_budget=64)
    engine.add_request(EngineRequest("0", setting.prompts[0], greedy()))
    step_until(engine, lambda: engine.scheduler.running)
    (sequence,) = engine.scheduler.running
    prefixes = engine.scheduler.prefixes
    prefixes.prefill_rate = FixedRate(1000.0)  # type: ignore[assignment]
    prefixes.step_rate = FixedRate(10.0)  # type: ignore[assignment]
    assert prefixes._compute_seconds(sequence, 100, 200) == pytest.approx(0.1)
    assert prefixes._compute_seconds(sequence, 150, 205) == pytest.approx(0.05 + 0.5)
    assert prefixes._compute_seconds(sequence, 202, 205) == pytest.approx(0.3)
    engine.abort("0")


def test_what_is_quicker_to_compute_is_computed(setting: Setting) -> None:
    engine = setting.open()
    run(engine, setting.prompts)
    set_rates(engine, load=FOR_EVER, prefill=AT_ONCE)
    assert run(engine, setting.prompts) == setting.answers
    tiers = engine.stats().tiers
    assert tiers.loaded_tokens == tiers.moved_bytes["from_host"] == 0
    assert tiers.recomputed_tokens > 400


@pytest.mark.parametrize("swaps", [True, False])
def test_a_preempted_sequence_comes_back(setting: Setting, swaps: bool) -> None:
    engine = setting.open(kv_cache_memory_bytes=setting.arena_bytes // 2)
    rates = (AT_ONCE, FOR_EVER) if swaps else (FOR_EVER, AT_ONCE)
    set_rates(engine, *rates)
    tokens: dict[str, list[int]] = {"0": [], "5": []}
    engine.add_request(EngineRequest("0", setting.prompts[0], greedy()))
    step_until(engine, lambda: engine.scheduler.running and engine.scheduler.running[0].decoding)
    (sequence,) = engine.scheduler.running
    tokens["0"] += sequence.output_token_ids
    engine.scheduler._preempt(sequence)
    # The other takes its blocks while it waits.
    engine.scheduler.waiting.remove(sequence)
    engine.add_request(EngineRequest("5", setting.prompts[5], greedy()))
    step_until(engine, lambda: len(engine.scheduler.running) == 1)
    engine.scheduler.waiting.enter(sequence)
    engine.scheduler.waiting.put_back(sequence)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.cache.check_integrity()
    assert tokens == {"0": setting.answers[0], "5": setting.answers[5]}
    resumes = engine.stats().tiers.resumes
    assert resumes == {"swapped_in": int(swaps), "recomputed": int(not swaps)}


def test_slow_loads_hold_up_nobody_else(setting: Setting) -> None:
    engine = setting.open()
    run(engine, setting.prompts)
    set_rates(engine, load=AT_ONCE, prefill=FOR_EVER)
    gate = threading.Event()
    mover(engine)._loading.submit(gate.wait)
    engine.add_request(EngineRequest("slow", setting.prompts[0], greedy()))
    step_until(engine, lambda: tiered(engine).loads)
    fresh = random_prompts([60], VOCAB_SIZE, seed=9)[0]
    engine.add_request(EngineRequest("quick", fresh, greedy()))
    done: dict[str, list[int]] = {"slow": [], "quick": []}
    while len(done["quick"]) < 12:
        for output in engine.step():
            done[output.request_id] += output.token_ids
    assert done["slow"] == []
    gate.set()
    while engine.has_work:
        for output in engine.step():
            done[output.request_id] += output.token_ids
        engine.cache.check_integrity()
    assert done["slow"] == setting.answers[0]
    assert engine.cache.owned_blocks == (0, 0)


@pytest.mark.parametrize("preempts", [True, False])
def test_one_that_waits_for_loads_may_go(setting: Setting, preempts: bool) -> None:
    engine = setting.open()
    run(engine, setting.prompts)
    set_rates(engine, load=AT_ONCE, prefill=FOR_EVER)
    gate = threading.Event()
    mover(engine)._loading.submit(gate.wait)
    engine.add_request(EngineRequest("0", setting.prompts[0], greedy()))
    step_until(engine, lambda: tiered(engine).loads)
    engine.cache.check_integrity()
    if preempts:
        engine.scheduler._preempt(engine.scheduler.running[0])
    else:
        engine.abort("0")
    engine.cache.check_integrity()
    assert engine.has_work, "blocks are still on their way"
    # The arena is full of blocks that wait for their contents, and another wants all of it.
    engine.add_request(EngineRequest("5", setting.prompts[5], greedy()))
    done: dict[str, list[int]] = {"0": [], "5": []}
    for output in engine.step():
        done[output.request_id] += output.token_ids
    engine.cache.check_integrity()
    gate.set()
    while engine.has_work:
        for output in engine.step():
            done[output.request_id] += output.token_ids
        engine.cache.check_integrity()
    assert done["5"] == setting.answers[5]
    assert done["0"] == (setting.answers[0] if preempts else [])
    assert engine.cache.owned_blocks == (0, 0)


def test_nobody_loses_blocks_while_others_are_loaded(setting: Setting) -> None:
    engine = setting.open(arena_balance="fixed")
    run(engine, setting.prompts)
    set_rates(engine, load=AT_ONCE, prefill=FOR_EVER)
    engine.add_request(EngineRequest("4", setting.prompts[4], greedy()))
    done: dict[str, list[int]] = {"4": [], "0": []}
    while not done["4"]:
        for output in engine.step():
            done[output.request_id] += output.token_ids
    gate = threading.Event()
    mover(engine)._loading.submit(gate.wait)
    engine.add_request(EngineRequest("0", setting.prompts[0], greedy()))
    taken: list[list[int]] = []
    for _ in range(40):
        for output in engine.step():
            done[output.request_id] += output.token_ids
        if tiered(engine).loads and not taken:
            # What else there is, somebody has.
            taken = [pool.allocate(pool.num_free) for pool in engine.cache.pools]
    assert len(done["4"]) < 12, "it found blocks all the same"
    assert engine.scheduler.num_preemptions == 0
    for pool, blocks in zip(engine.cache.pools, taken, strict=True):
        pool.release(blocks)
    gate.set()
    while engine.has_work:
        for output in engine.step():
            done[output.request_id] += output.token_ids
        engine.cache.check_integrity()
    assert done == {"4": setting.answers[4], "0": setting.answers[0]}


def test_shutdown_with_copies_on_their_way(setting: Setting) -> None:
    engine = setting.open()
    run(engine, setting.prompts)
    gate = threading.Event()
    mover(engine)._loading.submit(gate.wait)
    engine.add_request(EngineRequest("0", setting.prompts[0], greedy()))
    step_until(engine, lambda: tiered(engine).loads)
    threading.Timer(0.05, gate.set).start()
    setting.opened.remove(engine)
    engine.close()
    assert not any(thread.name.startswith("kv-") for thread in threading.enumerate())


def test_a_restart_finds_what_was_on_disk(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    first = setting.open(disk_cache_dir=str(folder))
    assert run(first, setting.prompts) == setting.answers
    rest(first)
    assert first.stats().tiers.disk_bytes == sum(
        path.stat().st_size for path in folder.rglob("*.kv")
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    second = setting.open(disk_cache_dir=str(folder))
    assert second.stats().tiers.host_bytes == 0
    assert run(second, setting.prompts) == setting.answers
    stats = second.stats()
    assert stats.tiers.moved_bytes["from_disk"] > 0
    assert stats.tiers.loaded_tokens == stats.prefix_hits_total > 400
    rest(second)


def test_a_slow_disk_holds_up_nobody_else(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(setting, tmp_path)
    second = setting.open(disk_cache_dir=str(tmp_path))
    tiers = tiered(second).tiers
    assert tiers is not None
    assert tiers.disk is not None
    gate = threading.Event()
    for _ in range(4):
        tiers.disk._readers.submit(gate.wait)
    second.add_request(EngineRequest("slow", setting.prompts[0], greedy()))
    fresh = random_prompts([60], VOCAB_SIZE, seed=9)[0]
    second.add_request(EngineRequest("quick", fresh, greedy()))
    done: dict[str, list[int]] = {"slow": [], "quick": []}
    while len(done["quick"]) < 12:
        for output in second.step():
            done[output.request_id] += output.token_ids
        second.cache.check_integrity()
    assert done["slow"] == []
    assert tiers.num_reading > 0
    # It does not wait for ever, either.
    monkeypatch.setattr("headlong.server.engine.prefix_source.MAX_FETCH_S", 0.0)
    while second.has_work:
        for output in second.step():
            done[output.request_id] += output.token_ids
    assert done["slow"] == setting.answers[0]
    assert second.stats().tiers.loaded_tokens == 0
    gate.set()
    rest(second)


@pytest.mark.parametrize("harm", ["corrupt", "truncate", "lengthen", "foreign", "empty", "remove"])
def test_a_wrong_file_is_a_miss(setting: Setting, tmp_path: Path, harm: str) -> None:
    fill_disk(setting, tmp_path)
    second = setting.open(disk_cache_dir=str(tmp_path))
    files = sorted(tmp_path.rglob("*.kv"))
    contents = [path.read_bytes() for path in files]
    for path, content, other in zip(files, contents, reversed(contents), strict=True):
        if harm == "corrupt":
            path.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
        elif harm == "truncate":
            path.write_bytes(content[:-1])
        elif harm == "lengthen":
            path.write_bytes(content + b"\0")
        elif harm == "foreign":
            path.write_bytes(other)
        elif harm == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
    assert run(second, setting.prompts) == setting.answers
    stats = second.stats()
    assert stats.prefix_hits_total == stats.tiers.loaded_tokens == 0
    assert stats.tiers.lost_blocks["unreadable"] > 0
    rest(second)


def test_other_weights_find_nothing(setting: Setting, tmp_path: Path) -> None:
    fill_disk(setting, tmp_path / "disk")
    # The same path with other weights, as after a new training run.
    config = (setting.model / "model.safetensors").read_bytes()
    other = save_tiny_model(tmp_path, "llama", seed=1)
    try:
        (setting.model / "model.safetensors").write_bytes(
            (other / "model.safetensors").read_bytes()
        )
        second = setting.open(disk_cache_dir=str(tmp_path / "disk"))
        run(second, setting.prompts)
        assert second.stats().prefix_hits_total == 0
    finally:
        (setting.model / "model.safetensors").write_bytes(config)


def test_a_full_disk_stops_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    engine = setting.open(disk_cache_dir=str(tmp_path))
    monkeypatch.setattr("headlong.cache.block_files._write_all", full)
    assert run(engine, setting.prompts) == setting.answers
    rest(engine)
    assert engine.stats().tiers.lost_blocks["unwritten"] > 0
    assert engine.stats().tiers.disk_bytes == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_salts_stay_apart(setting: Setting) -> None:
    engine = setting.open()
    run(engine, setting.prompts, cache_salt="a")
    before = engine.stats().prefix_hits_total
    assert run(engine, setting.prompts, cache_salt="b") == setting.answers
    assert engine.stats().prefix_hits_total == before


def test_a_start_that_fails_leaves_nothing_open(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(setting, tmp_path).close()

    def fail(engine: Engine) -> None:
        del engine
        raise ConfigError("the first step failed")

    monkeypatch.setattr("headlong.server.engine.engine.warm_up", fail)
    with pytest.raises(ConfigError, match="first step failed"):
        # A folder that may hold less is made smaller at once, on a thread.
        setting.open(disk_cache_dir=str(tmp_path), disk_cache_bytes=10_000)
    assert not any(thread.name.startswith("kv-") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"host_cache_bytes": 100}, "host_cache_bytes"),
        ({"host_cache_bytes": 1 << 60}, "host_cache_bytes"),
        ({"disk_cache_bytes": 100, "disk_cache_dir": "{}"}, "disk_cache_bytes"),
        ({"disk_cache_dir": "{}/file/folder"}, "disk_cache_dir"),
        ({"disk_cache_dir": "/proc/nothing"}, "disk_cache_dir"),
    ],
)
def test_sizes_and_folders_that_cannot_be(
    setting: Setting, tmp_path: Path, changes: dict[str, object], param: str
) -> None:
    (tmp_path / "file").touch()
    named = {
        name: value.format(tmp_path) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(ConfigError) as caught:
        setting.open(**named)
    assert caught.value.param == param
    assert "\n" not in caught.value.message
