"""Folders import in one direction and each heavy dependency has one door: the contracts in pyproject.toml."""

import subprocess

from tests.harness import ROOT


def test_import_contracts_hold() -> None:
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
