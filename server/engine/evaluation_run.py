"""From what is asked of an evaluation to its report: one model, many labellings, many tasks."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import JsonValue

from headlong.profiling.errors import ProfilingError
from headlong.profiling.evaluation_results import (
    FULL,
    Cell,
    EvaluationReport,
    EvaluationSettings,
    ScoredMethod,
    resume_report,
)
from headlong.profiling.evaluation_sweep import CellDone, ProgressOf, Sweep
from headlong.profiling.evaluation_tokens import cut_windows, read_prompts
from headlong.profiling.evaluation_variants import (
    CONTROLS,
    RANDOM,
    STREAMING,
    Variant,
    full_variant,
    random_variants,
    streaming_variant,
    swept,
)
from headlong.profiling.files import read_text
from headlong.profiling.formats import load_head_profile
from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.profiling.profile_model import SCORERS, Dtype, make_scorer, run_profiler
from headlong.profiling.prompts import check_tokenizer, encode_content
from headlong.profiling.scorer import HeadScorer
from headlong.profiling.tasks.registry import TASKS, TOKEN_TASKS, parse_tasks
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.evaluate import EngineCaches, without_compression
from headlong.server.engine.model import LoadedModel, load_model
from headlong.server.engine.weights import dtype_name, weights_digest
from headlong.server.errors import ConfigError

DEFAULT_SPARSITIES = (0.25, 0.5, 0.75, 0.9)
DEFAULT_LENGTHS = (512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is to be evaluated.

    Attributes:
        config: Model and engine; what it says of compression of the cache plays no part.
        tasks: Names of tasks and groups.
        profiles: Head profiles: JSON files or DuoAttention's folders.
        methods: Names of scoring methods and controls.
        settings: Of methods, by method and name.
        scored: Scores of methods that another evaluation of the model measured; taken where their
            settings, and the haystack file's content, are those asked for here.
        sparsities: Fractions of KV heads that stream. Without any, profiles keep their own
            labelling and methods take 0.25, 0.5, 0.75 and 0.9.
        sink_size: Of all streaming heads. None: a profile's own, and 128 of what is scored here.
        window_size: Of all streaming heads. None: a profile's own, and 256 of what is scored here.
        lengths: Context lengths in tokens. None: those of 512, 1024, 2048 and 4096 that the model
            has room for.
        num_samples: Prompts of each task and length, and the most windows of the text. A prompts
            file is always read whole.
        num_depths: Places of an answer that lies in one place.
        seed: Which prompts.
        chat: Whether prompts are chats. None: if the model has a chat template.
        text: A text file, for perplexity, and for the divergence where there are no prompts.
        prompts: A prompts file, for the divergence.
        output: Where the report is kept and found again.
    """

    config: EngineConfig
    tasks: Sequence[str]
    profiles: Sequence[Path] = ()
    methods: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)
    scored: Mapping[str, ScoredMethod] = field(default_factory=dict)
    sparsities: Sequence[float] = ()
    sink_size: int | None = None
    window_size: int | None = None
    lengths: Sequence[int] | None = None
    num_samples: int = 20
    num_depths: int = 5
    seed: int = 0
    chat: bool | None = None
    text: Path | None = None
    prompts: Path | None = None
    output: Path | None = None


class Evaluation:
    """One run. What can be checked without the model is checked when it is made.

    Args:
        request: What is asked.
        say: Is told of every cell.
        progress: Shows how far scoring, or a cell, is.

    Attributes:
        tasks: Names of what is measured.
        cells: What the last run asked for, without the other cells of its report; none before.

    Raises:
        ProfilingError: A name is unknown, a file cannot be read, or a value is out of range.
    """

    def __init__(
        self, request: EvaluationRequest, say: Callable[[CellDone], None], progress: ProgressOf
    ) -> None:
        self._request = request
        self._say = say
        self._progress = progress
        if request.output is not None and not request.output.absolute().parent.is_dir():
            raise ProfilingError(f"cannot write {request.output}: its folder does not exist")
        self.tasks = parse_tasks(request.tasks)
        self.cells: list[Cell] = []
        self._check_numbers()
        self._scorers = self._make_scorers()
        self._haystacks = {name: _haystack(each) for name, each in self._scorers.items()}
        self._profiles = _named_profiles(request.profiles)
        if not self._profiles and not request.methods:
            raise ProfilingError("there is nothing to compare: give a profile or methods")
        self._files = {
            name: None if path is None else read_text(path)
            for name, path in (("text", request.text), ("prompts", request.prompts))
        }
        self._prompts = None if request.prompts is None else read_prompts(request.prompts)
        if "perplexity" in self.tasks and not (self._files["text"] or "").strip():
            raise ProfilingError("task perplexity needs a text file that is not empty")
        if "kl" in self.tasks and self._prompts is None and not (self._files["text"] or "").strip():
            raise ProfilingError("task kl needs a prompts file, or a text file that is not empty")

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of what a requirement is about: the profiles, or without any the methods."""
        asked = dict.fromkeys(self._request.methods)
        return tuple(self._profiles) or tuple(name for name in asked if name not in CONTROLS)

    def run(self) -> EvaluationReport:
        """Measures everything that the report at ``output`` does not hold yet.

        Raises:
            ConfigError: The checkpoint cannot be loaded.
            ProfilingError: A profile or given scores are another model's, a length is out of
                range, a method gave no scores, the model's numbers are not finite, or ``output``
                holds something else.
        """
        request = self._request
        model = load_model(request.config)
        chat = bool(model.tokenizer.chat_template) if request.chat is None else request.chat
        check_tokenizer(model.tokenizer, chat=chat)
        lengths = self._lengths(model)
        identity = ModelIdentity.from_config(model.config)
        report = resume_report(
            request.output,
            EvaluationSettings(
                model=request.config.model,
                revision=request.config.revision,
                fingerprint=identity.fingerprint,
                weights=weights_digest(model.module),
                dtype=dtype_name(model.dtype),
                block_size=request.config.block_size,
                lengths=lengths,
                num_samples=request.num_samples,
                num_depths=request.num_depths,
                seed=request.seed,
                chat=chat,
                text=_digest(request.text, self._files["text"]),
                prompts=_digest(request.prompts, self._files["prompts"]),
            ),
            str(model.device),
        )
        texts = self._texts(model, lengths, chat=chat)
        longest = max((*self._spans(lengths), *(len(t) for each in texts.values() for t in each)))
        config = replace(without_compression(request.config), max_model_len=longest)
        sweep = Sweep(
            report=report,
            tokenizer=model.tokenizer,
            caches=EngineCaches(config, model),
            full=full_variant(identity),
            texts=texts,
            path=request.output,
            say=self._say,
            progress=self._progress,
        )
        variants = self._variants(identity, report, dtype_name(model.dtype))
        self.cells = sweep.run(variants, self.tasks)
        return report

    def _check_numbers(self) -> None:
        request = self._request
        for name, number in (
            ("samples", request.num_samples),
            ("depths", request.num_depths),
            *(("lengths", length) for length in request.lengths or ()),
        ):
            if number < 1:
                raise ProfilingError(f"{name} must be at least 1, got {number}")
        if request.num_depths > request.num_samples:
            raise ProfilingError(
                f"depths is {request.num_depths}, which is more than the {request.num_samples} "
                "samples that take turns at them"
            )
        for sparsity in request.sparsities:
            if not 0.0 <= sparsity <= 1.0:
                raise ProfilingError(f"sparsity must be 0 to 1, got {sparsity}")

    def _make_scorers(self) -> dict[str, HeadScorer]:
        request = self._request
        known = (*SCORERS, *CONTROLS)
        for name in (*request.methods, *request.settings):
            if name not in known:
                raise ProfilingError(f"method {name!r} is unknown: methods are {', '.join(known)}")
        for name in request.settings:
            if name not in request.methods or name in CONTROLS:
                raise ProfilingError(f"a setting of {name!r}, which is not scored here")
        return {
            name: make_scorer(
                name,
                request.settings.get(name, {}),
                sink_size=request.sink_size,
                window_size=request.window_size,
            )
            for name in dict.fromkeys(request.methods)
            if name not in CONTROLS
        }

    def _spans(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of prompt and answer of each length."""
        answers = [TASKS[task].max_new_tokens for task in self.tasks if task in TASKS]
        return [length + max(answers, default=0) for length in lengths]

    def _lengths(self, model: LoadedModel) -> tuple[int, ...]:
        asked = self._request.lengths
        lengths = tuple(sorted(set(DEFAULT_LENGTHS if asked is None else asked)))
        room = [
            length
            for length, span in zip(lengths, self._spans(lengths), strict=True)
            if span <= model.max_context
        ]
        if not room or (asked is not None and len(room) < len(lengths)):
            longest = max(lengths) if asked is not None else min(lengths)
            span = self._spans([longest])[0]
            raise ProfilingError(
                f"a length of {longest} tokens takes {span} with its answer, but the model's "
                f"context is {model.max_context} tokens"
            )
        return tuple(room)

    def _texts(
        self, model: LoadedModel, lengths: Sequence[int], *, chat: bool
    ) -> dict[str, list[list[int]]]:
        texts: dict[str, list[list[int]]] = {}
        windows: list[list[int]] = []
        content = self._files["text"]
        if content is not None and set(self.tasks) & set(TOKEN_TASKS):
            windows = cut_windows(model.tokenizer, content, max(lengths), self._request.num_samples)
        if "perplexity" in self.tasks:
            texts["perplexity"] = windows
        if "kl" in self.tasks:
            texts["kl"] = windows
            if self._prompts is not None:
                texts["kl"] = [
                    encode_content(model.tokenizer, prompt, chat=chat) for prompt in self._prompts
                ]
        for task, each in texts.items():
            longest = max(map(len, each), default=0)
            if longest < 2:
                raise ProfilingError(f"task {task}: there is no text of at least two tokens")
            if longest > model.max_context:
                raise ProfilingError(
                    f"task {task}: a prompt has {longest} tokens, but the model's context is "
                    f"{model.max_context} tokens"
                )
        return texts

    def _variants(
        self, identity: ModelIdentity, report: EvaluationReport, dtype: str
    ) -> list[Variant]:
        request = self._request
        variants: list[Variant] = []
        for given in request.scored.values():
            given.profile.check_model(identity)
        for name, profile in self._profiles.items():
            profile.check_model(identity)
            variants += swept(name, identity, self._resized(profile), request.sparsities)
        sizes = (
            HeadScorer.default_sink_size if request.sink_size is None else request.sink_size,
            HeadScorer.default_window_size if request.window_size is None else request.window_size,
        )
        sparsities = request.sparsities or DEFAULT_SPARSITIES
        for name in dict.fromkeys(request.methods):
            if name == RANDOM:
                variants += random_variants(identity, sparsities, *sizes)
            elif name == STREAMING:
                variants.append(streaming_variant(identity, *sizes))
            else:
                scored = self._scored(name, report, *sizes, dtype=dtype)
                variants += swept(name, identity, scored, sparsities)
        return variants

    def _resized(self, profile: HeadProfile) -> HeadProfile:
        changes = {
            "sink_size": self._request.sink_size,
            "window_size": self._request.window_size,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return HeadProfile.model_validate(profile.model_dump() | given)

    def _scored(
        self, name: str, report: EvaluationReport, sink_size: int, window_size: int, *, dtype: str
    ) -> HeadProfile:
        """A method's profile: one found with the same settings, or a new one."""
        scorer = self._scorers[name]
        wanted = (scorer.settings, self._haystacks[name])
        found = (report.methods.get(name), self._request.scored.get(name))
        kept = next((each for each in found if each and _origin(each) == wanted), None)
        if kept is None:
            config = self._request.config
            started = time.perf_counter()
            with self._progress(f"scoring heads: {name}") as progress:
                profile = run_profiler(
                    config.model,
                    scorer,
                    sink_size=sink_size,
                    window_size=window_size,
                    dtype=_profiler_dtype(dtype),
                    device=config.device,
                    revision=config.revision,
                    trust_remote_code=config.trust_remote_code,
                    progress=progress,
                )
            kept = ScoredMethod(
                settings=scorer.settings,
                haystack=self._haystacks[name],
                profile=profile,
                scoring_s=round(time.perf_counter() - started, 3),
            )
        if report.methods.get(name) != kept:
            report.methods[name] = kept
            if self._request.output is not None:
                report.save(self._request.output)
        sizes = {"sink_size": sink_size, "window_size": window_size}
        return HeadProfile.model_validate(kept.profile.model_dump() | sizes)


def _profiler_dtype(name: str) -> Dtype:
    known: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    for dtype in known:
        if dtype == name:
            return dtype
    raise ConfigError(f"weights of {name} cannot be scored: choose a dtype", "dtype")


def _named_profiles(paths: Sequence[Path]) -> dict[str, HeadProfile]:
    """Reads profiles; the name is the file's, or its whole path where that would be ambiguous."""
    taken = {FULL, *CONTROLS, *SCORERS}
    stems = [path.name if path.is_dir() else path.stem for path in paths]
    profiles: dict[str, HeadProfile] = {}
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 and stem not in taken else str(path)
        profiles[name] = load_head_profile(path)
    return profiles


def _digest(path: Path | None, content: str | None) -> str:
    if path is None or content is None:
        return ""
    return f"{path.name} {_sha256(content)}"


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _haystack(scorer: HeadScorer) -> str:
    """SHA-256 of the text file that a method's settings name; empty if they name none."""
    path = scorer.settings.get("haystack")
    return _sha256(read_text(Path(path))) if isinstance(path, str) else ""


def _origin(scored: ScoredMethod) -> tuple[dict[str, JsonValue], str]:
    return scored.settings, scored.haystack
