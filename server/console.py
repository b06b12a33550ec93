"""Where commands print what people read."""

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints lines as they are: no markup, no emoji, no colours, no wrapping."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
