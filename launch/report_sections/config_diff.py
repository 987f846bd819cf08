"""The section on configurations: what differs between runs, and everything of one."""

from collections.abc import Sequence
from typing import Any

from launch.report_sections._parts import Section, Table
from launch.report_sections._record import RunRecord

_IDENTITY = ("name", "run_dir")


def configuration(runs: Sequence[RunRecord]) -> Section | None:
    """None if no run folder has a config.yaml."""
    known = [run for run in runs if run.config]
    if not known:
        return None
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    items = []
    if len(runs) > 1:
        different = [key for key in differing_keys(known) if key not in _IDENTITY]
        rows = [[run.name, *(_shown(run.config.get(key)) for key in different)] for run in known]
        if different:
            note = f"{len(different)} of {len(keys)} keys differ; name and run_dir are left out."
            items.append(Table("What differs", note, ["run", *different], rows))
        else:
            items.append(Table("What differs", "Nothing: all runs have the same configuration.", ["run"], []))
    rows = [[key, _shown(known[0].config.get(key))] for key in keys if key in known[0].config]
    whose = f" of {known[0].name}" if len(runs) > 1 else ""
    items.append(
        Table(
            f"All {len(rows)} keys{whose}",
            "As resolved: defaults are written out.",
            ["key", "value"],
            rows,
            folded=True,
        )
    )
    return Section("Configuration", "From the config.yaml of each run folder.", items)


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Keys whose values are not the same in all runs, in the order of the configuration."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)]


def _shown(value: Any) -> str:
    return "–" if value is None or value == "" else f"{value}"
