"""What a load test asks: sessions, each of one turn or of several in order."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        prompt: Of a completion the whole prompt; of a chat what the user says in this turn.
        max_tokens: Most tokens of the answer.
        expected: What the answer must contain to be right, or None if it is not judged.
    """

    prompt: str
    max_tokens: int
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """One client: its turns are sent one after the other, each when the one before has ended.

    In a chat every turn brings the history along: what the user said and what the server answered.

    Attributes:
        turns: At least one.
        start_s: When it begins, in seconds after the start of the test, where the workload says so
            (a trace); None leaves that to the arrivals.
    """

    turns: tuple[Turn, ...]
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions in the order in which they begin.

    Attributes:
        name: Of its kind.
        sessions: At least one.
        chat: Whether turns are messages of a chat; completions otherwise.
        ignore_eos: Whether answers are to be as long as they may, so that lengths are known.
    """

    name: str
    sessions: Sequence[Session]
    chat: bool = False
    ignore_eos: bool = False
