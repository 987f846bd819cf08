"""The terminal as all commands write to it."""

from rich.console import Console


def terminal() -> Console:
    """Prints what it is given. To rich's own console a name such as `lr[bold]` or `a:bug:b` would be a command."""
    return Console(markup=False, emoji=False)
