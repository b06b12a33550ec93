"""What a load test asks: sessions, each of one turn or of several in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "developer", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Attributes:
        role: Who says it.
        content: What.
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        prompt: Of a completion the whole prompt; of a chat what the user says in this turn.
        max_tokens: Most tokens of the answer.
        expected: What the answer must hold to be right, as whole words or numbers in any case
            (`tasks.task.is_named`); None if it is not judged.
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
        history: Messages of a chat that stand before its first turn, a system prompt among them;
            every turn brings them along. Empty outside a chat.
    """

    turns: tuple[Turn, ...]
    start_s: float | None = None
    history: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions in the order in which they begin.

    Attributes:
        name: Of its kind.
        sessions: At least one.
        chat: Whether turns are messages of a chat; completions otherwise.
        ignore_eos: Whether answers are to be as long as they may, so that lengths are known.
        approximate_lengths: Whether lengths are only about those that were asked for, because no
            tokenizer counted them.
    """

    name: str
    sessions: Sequence[Session]
    chat: bool = False
    ignore_eos: bool = False
    approximate_lengths: bool = False
