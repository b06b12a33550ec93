"""What people are told of a setting."""

from dataclasses import dataclass

from pydantic_settings import BaseSettings


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting is shown to people.

    Attributes:
        help: One or two sentences; the default is added to them.
        panel: The heading it stands under.
        secret: Its value is never printed.
        guards: It keeps somebody out: set to nothing it is refused, and never left out quietly.
        default: What holds without it, in words, where no value says so.
        kind: Its type on the command line, where that is not its field's.
    """

    help: str
    panel: str
    secret: bool = False
    guards: bool = False
    default: str = ""
    kind: type[str] | None = None


def flag_of(settings: type[BaseSettings], name: str) -> Flag:
    """Returns what a setting's field says of it."""
    return next(each for each in settings.model_fields[name].metadata if isinstance(each, Flag))
