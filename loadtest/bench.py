"""A whole load test: from what is asked to its report."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import TypeAdapter

from headlong.loadtest.arrivals import ArrivalKind, Arrivals
from headlong.loadtest.chats import chats
from headlong.loadtest.client import Client
from headlong.loadtest.figures import summarize
from headlong.loadtest.goodput import Goodput
from headlong.loadtest.needles import needles
from headlong.loadtest.random_lengths import random_lengths
from headlong.loadtest.report import Config, Report, Run
from headlong.loadtest.runner import Plan, run_load
from headlong.loadtest.shared_prefixes import shared_prefixes
from headlong.loadtest.tokens import Tokenizer
from headlong.loadtest.trace import trace
from headlong.loadtest.workload import Session, Workload
from headlong.profiling.progress import Progress, progress_bar

WorkloadKind = Literal["random", "shared-prefix", "chat", "needle", "trace"]
EndpointKind = Literal["completions", "chat"]

DEFAULT_NUM_PROMPTS = 100
DEFAULT_CONCURRENCY = 8

SHAPES: Mapping[WorkloadKind, Mapping[str, str]] = {
    "random": {
        "random_input_len": "input_len",
        "random_output_len": "output_len",
        "random_range_ratio": "range_ratio",
    },
    "shared-prefix": {
        "num_prefixes": "num_prefixes",
        "prefix_len": "prefix_len",
        "suffix_len": "suffix_len",
        "output_len": "output_len",
    },
    "chat": {
        "num_turns": "num_turns",
        "document_len": "document_len",
        "output_len": "output_len",
        "shared_document": "shared_document",
    },
    "needle": {"context_len": "context_lens"},
    "trace": {
        "trace": "path",
        "trace_speed": "speed",
        "trace_timestamp_unit": "timestamp_unit",
        "trace_block_size": "block_size",
        "output_len": "output_len",
    },
}
"""The options of each workload, and the arguments of its maker that they are."""
_ARRIVALS = {
    "rate": "request_rate",
    "burstiness": "burstiness",
    "from_rate": "ramp_up_start_rps",
    "duration_s": "ramp_up_duration",
}


@dataclass(frozen=True)
class BenchSettings:
    """What a load test asks; whatever contradicts itself is refused.

    Attributes:
        workload: Its kind.
        shape: The options of the workload that were given, by their names in `SHAPES`.
        num_prompts: Sessions; of a trace None is all.
        num_warmups: Sessions that are sent before the test starts.
        endpoint: Where requests go; None leaves it to the workload.
        ignore_eos: Whether answers are to be as long as they may; None leaves it to the workload.
        request_rates: Sessions a second, one test for each; empty is a closed loop, or a trace.
        arrivals: How an open loop's sessions follow each other; None is Poisson, or what else the
            other options mean.
        burstiness: Of gamma arrivals.
        ramp_up_start_rps: The rate with which a ramp begins.
        ramp_up_duration: Seconds until it has reached the request rate.
        max_concurrency: Clients of a closed loop; most requests in flight of an open one.
        goodput: The aims, if there are any.
        seed: Of prompts and arrivals.

    Raises:
        ValueError: Options contradict each other, or one is out of its range.
    """

    workload: WorkloadKind = "random"
    shape: Mapping[str, Any] = field(default_factory=dict)
    num_prompts: int | None = None
    num_warmups: int = 0
    endpoint: EndpointKind | None = None
    ignore_eos: bool | None = None
    request_rates: tuple[float, ...] = ()
    arrivals: ArrivalKind | None = None
    burstiness: float | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_duration: float | None = None
    max_concurrency: int | None = None
    goodput: Goodput | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.shape:
            if name not in SHAPES[self.workload]:
                owners = [kind for kind, names in SHAPES.items() if name in names]
                raise ValueError(
                    f"{_flag(name)} belongs to --workload {' or '.join(owners)}, "
                    f"not to {self.workload}"
                )
        for name, least in (("num_prompts", 1), ("num_warmups", 0), ("max_concurrency", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{_flag(name)} must be {least} or more, got {value}")
        self._check_endpoint()
        self._check_arrivals()

    def _check_endpoint(self) -> None:
        if self.workload == "trace":
            if "trace" not in self.shape:
                raise ValueError("--workload trace needs --trace FILE")
            if self.endpoint is not None:
                raise ValueError("--endpoint contradicts --workload trace: its lines say which")
        elif self.workload == "chat" and self.endpoint == "completions":
            raise ValueError("--endpoint completions contradicts --workload chat")

    def _check_arrivals(self) -> None:
        timed = ("arrivals", "burstiness", "ramp_up_start_rps", "ramp_up_duration")
        if self.workload == "trace" and self.request_rates:
            raise ValueError("--request-rate contradicts --workload trace: a trace has its times")
        if not self.request_rates:
            for name in timed:
                if getattr(self, name) is not None:
                    raise ValueError(f"{_flag(name)} needs --request-rate")
        if len(set(self.request_rates)) < len(self.request_rates):
            raise ValueError("--request-rate: the same rate is given twice")
        for rate in self.request_rates:
            self._arrivals(rate, self.seed)

    def _arrivals(self, rate: float, seed: int) -> Arrivals:
        """Makes the arrivals, of the kind that the options mean if none is named."""
        kind: ArrivalKind = "poisson"
        if self.ramp_up_duration is not None or self.ramp_up_start_rps is not None:
            kind = "ramp"
        elif self.burstiness is not None:
            kind = "gamma"
        kind = self.arrivals or kind
        from_rate = self.ramp_up_start_rps
        with _options_named(_ARRIVALS):
            return Arrivals(
                kind,
                rate,
                burstiness=self.burstiness,
                from_rate=0.0 if kind == "ramp" and from_rate is None else from_rate,
                duration_s=self.ramp_up_duration,
                seed=seed,
            )

    def config(self) -> Config:
        """Returns what a report says of it."""
        values: Config = TypeAdapter(BenchSettings).dump_python(self, mode="json")
        shape = values.pop("shape")
        assert isinstance(shape, dict)
        return {**values, **shape}

    def make_workload(self, tokenizer: Tokenizer, index: int) -> tuple[Workload, Sequence[Session]]:
        """Makes the sessions of one test.

        Args:
            tokenizer: Counts tokens.
            index: Of the test in a sweep: none finds its prompts in the cache of one before.

        Returns:
            The workload, and the sessions of its warm-up.

        Raises:
            ValueError: A number is out of its range, or a trace cannot be read.
        """
        arguments = SHAPES[self.workload]
        shape = {arguments[name]: value for name, value in self.shape.items()}
        with _options_named({argument: name for name, argument in arguments.items()}):
            made, warm_up = self._make(tokenizer, index, shape)
        if self.ignore_eos is not None:
            made = replace(made, ignore_eos=self.ignore_eos)
        return made, warm_up

    def _make(
        self, tokenizer: Tokenizer, index: int, shape: Mapping[str, Any]
    ) -> tuple[Workload, Sequence[Session]]:
        if self.workload == "trace":
            made = trace(tokenizer=tokenizer, num_prompts=self.num_prompts, **shape)
            if not self.num_warmups:
                return made, ()
            return made, random_lengths(tokenizer, self.num_warmups, seed=self.seed).sessions
        count = (self.num_prompts or DEFAULT_NUM_PROMPTS) + self.num_warmups
        made = self._draw(tokenizer, count, self.seed + index, shape)
        sessions = made.sessions
        return replace(made, sessions=sessions[self.num_warmups :]), sessions[: self.num_warmups]

    def _draw(
        self, tokenizer: Tokenizer, count: int, seed: int, shape: Mapping[str, Any]
    ) -> Workload:
        if self.workload == "chat":
            return chats(tokenizer, count, seed=seed, **shape)
        makers: dict[str, Callable[..., Workload]] = {
            "random": random_lengths,
            "shared-prefix": shared_prefixes,
            "needle": needles,
        }
        if self.endpoint is not None:
            shape = {**shape, "chat": self.endpoint == "chat"}
        return makers[self.workload](tokenizer, count, seed=seed, **shape)

    def make_plan(self, workload: Workload, rate: float | None, index: int) -> Plan:
        """Plans when the sessions of one test begin.

        Args:
            workload: Of `make_workload`.
            rate: Of the test; None without rates.
            index: Of the test in a sweep.
        """
        if rate is not None:
            times = self._arrivals(rate, self.seed + index).times(len(workload.sessions))
            return Plan(times, self.max_concurrency)
        if self.workload == "trace":
            return Plan([each.start_s or 0.0 for each in workload.sessions], self.max_concurrency)
        return Plan(None, self.max_concurrency or DEFAULT_CONCURRENCY)


ProgressOf = Callable[[str], AbstractContextManager[Progress]]


async def run_bench(
    client: Client,
    settings: BenchSettings,
    tokenizer: Tokenizer,
    config: Config,
    *,
    stop: asyncio.Event,
    on_start: Callable[[], None],
    progress_of: ProgressOf = progress_bar,
) -> Report:
    """Asks whether the endpoint answers, and then runs one test for each rate.

    Args:
        client: Of the endpoint.
        settings: What is asked.
        tokenizer: Counts tokens.
        config: What the report says of the command.
        stop: Ends the test that runs, and leaves out those that would follow.
        on_start: Is called once the endpoint has answered.
        progress_of: Shows how far a test is, by its title.

    Raises:
        EndpointError: The endpoint cannot be reached, or fails a first request.
        ValueError: The workload cannot be made.
    """
    rates = settings.request_rates or (None,)
    # Whatever is wrong with the workload is said before anything is sent.
    first = settings.make_workload(tokenizer, 0)
    model = await client.find_model()
    await client.check(chat=first[0].chat, ignore_eos=first[0].ignore_eos)
    on_start()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    runs: list[Run] = []
    for index, rate in enumerate(rates):
        workload, warm_up = first if index == 0 else settings.make_workload(tokenizer, index)
        plan = settings.make_plan(workload, rate, index)
        title = workload.name if rate is None else f"{workload.name} at {rate:g}/s"
        with progress_of(title) as progress:
            result = await run_load(
                workload, client, plan, warm_up=warm_up, stop=stop, progress=progress
            )
        summary = summarize(
            result,
            asked_rate=rate,
            starts_s=plan.starts_s,
            met=None if settings.goodput is None else settings.goodput.met,
        )
        runs.append(Run(summary, result.records))
        if result.interrupted:
            break
    said: Config = {"model": model, "approximate_lengths": first[0].approximate_lengths}
    return Report({**config, **said}, started_at, tuple(runs))


@contextmanager
def _options_named(options: Mapping[str, str]) -> Iterator[None]:
    """Puts options for the arguments that an error names.

    Args:
        options: By argument.
    """
    try:
        yield
    except ValueError as error:
        words = rf"\b({'|'.join(map(re.escape, options))})\b"
        message = re.sub(words, lambda found: _flag(options[found[0]]), str(error))
        raise ValueError(message) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
