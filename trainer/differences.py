"""What differs between two sets of settings, in the one form in which it is logged and refused."""

from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: before -> now` for each key of either whose value is another; a missing value is the same as None."""
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
