"""The `hooks:` section: from labels and options to checked configurations, and to the hooks themselves."""

import dataclasses
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from configs.typed import convert_options
from trainer.errors import ConfigError
from trainer.hooks import Hook, HookList
from trainer.registry import find_hook


def resolve_hooks(
    section: Mapping[str, Any], *, is_frozen: bool = False, has_phases: bool = False, is_uniform: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The section with every default filled in, and every problem in it.

    `is_frozen`: whether the hooks must do with weights that are fixed before a step. `has_phases`: whether the
    configuration changes the mixture of the data during the run. `is_uniform`: whether tokens are dealt to experts in
    turn, so that no bias takes part.
    """
    resolved: dict[str, Any] = {}
    problems: list[str] = []
    hooks: dict[str, Hook] = {}
    for label, spec in section.items():
        if not isinstance(spec, Mapping):
            problems.append(f"hooks.{label}: must be a mapping such as {{enabled: true}}, not {spec!r}")
            continue
        options = dict(spec)
        name, enabled = options.pop("hook", label), options.pop("enabled", True)
        if not isinstance(enabled, bool):
            problems.append(f"hooks.{label}.enabled: must be true or false, not {enabled!r}")
            continue
        try:
            hook_class = find_hook(str(name))
        except ConfigError as error:
            problems.append(f"hooks.{label}: {error}")
            continue
        complete, option_problems = _complete_options(hook_class, options)
        problems += [f"hooks.{label}.{line}" for line in option_problems]
        resolved[label] = {"hook": name, "enabled": enabled, **complete}
        if enabled and not option_problems:
            hooks[label] = _instantiate(hook_class, complete)
    try:
        built = HookList(hooks)
    except ConfigError as error:
        problems.append(str(error))
    else:
        if is_frozen and built.frozen_problem and not problems:
            problems.append(f"train.accumulation: frozen cannot be used: {built.frozen_problem}")
        if not is_frozen:
            problems += built.exact_problems
        if is_uniform and built.moves_bias:
            problems.append(
                "model.uniform_routing: deals tokens in turn, whatever the biases that a hook moves; set "
                "hooks.expert_bias.rule to none or disable the hook"
            )
        if has_phases and built.sets_sampling:
            problems.append("data.phases: a hook sets the weights of the sampling; remove the phases or the hook")
    return resolved, problems


def build_hooks(resolved: Mapping[str, Any]) -> HookList:
    """The enabled hooks of a resolved section, in its order."""
    hooks = {}
    for label, spec in resolved.items():
        options = dict(spec)
        name, enabled = options.pop("hook"), options.pop("enabled")
        if enabled:
            hooks[label] = _instantiate(find_hook(name), options)
    return HookList(hooks)


def _complete_options(hook_class: type[Hook], options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options with defaults. A hook with a `Config` dataclass is checked by it, any other by its signature."""
    schema = getattr(hook_class, "Config", None)
    if schema is not None:
        config, problems = convert_options(schema, options)
        if not problems and hasattr(config, "problems"):
            problems = list(config.problems())
        return dataclasses.asdict(config), problems
    accepted = inspect.signature(hook_class).parameters
    problems = []
    for key in options.keys() - accepted.keys():
        close = get_close_matches(key, accepted, n=1)
        problems.append(
            f"{key}: {hook_class.__name__} has no such option" + (f"; did you mean '{close[0]}'?" if close else "")
        )
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty
        and name not in options
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    problems += [f"{name}: is required by {hook_class.__name__}" for name in missing]
    defaults = {n: p.default for n, p in accepted.items() if p.default is not inspect.Parameter.empty}
    return defaults | options, sorted(problems)


def _instantiate(hook_class: type[Hook], options: Mapping[str, Any]) -> Hook:
    schema = getattr(hook_class, "Config", None)
    make: Any = hook_class
    hook: Hook = make(**options) if schema is None else make(convert_options(schema, options)[0])
    return hook
