"""From the name in a config to a hook class: an entry point's name, or a dotted path.

The shipped hooks are entry points of the group like anybody's, so this file knows none of them.
"""

import importlib
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from trainer.errors import ConfigError
from trainer.hooks import Hook

ENTRY_POINT_GROUP = "evenkeel.hooks"


def hook_names() -> tuple[str, ...]:
    """Names that installed packages registered."""
    return tuple(sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)}))


def find_hook(name: str) -> type[Hook]:
    """The hook class called `name`: registered, `package.module:Class` or `package.module.Class`.

    Raises ConfigError if there is none, or if what is there is not a Hook.
    """
    path = next((point.value for point in entry_points(group=ENTRY_POINT_GROUP, name=name)), name)
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not attribute:
        close = get_close_matches(name, hook_names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(hook_names()) or 'none'}"
        raise ConfigError(f"unknown hook '{name}'; {hint} A hook of your own is named package.module:Class")
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise ConfigError(f"hook '{name}': cannot import {module_name} ({error}); is it on PYTHONPATH?") from error
    if found is None:
        raise ConfigError(f"hook '{name}': module {module_name} has no '{attribute}'")
    if not (isinstance(found, type) and issubclass(found, Hook)):
        raise ConfigError(f"hook '{name}' is not a subclass of trainer.hooks.Hook")
    return found
