"""The model of the protocol in docs/model: spin finds nothing against it, and something against each broken variant."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "model"


def load() -> ModuleType:
    """docs/model/check.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("model_check", FOLDER / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


check = load()


@pytest.fixture(autouse=True)
def _spin() -> None:
    if shutil.which("spin") is None:
        pytest.fail("spin is not here; `make packages` installs it")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("asked", [c for c in check.CHECKS if not c.long], ids=lambda c: c.name.replace(" ", "-"))
def test_the_model(asked: object) -> None:
    """Given the protocol, or a variant without one of its guards, when spin looks at every state, then all properties
    hold, or the one fails that the guard is there for.
    """
    assert check.ask(asked).failed == asked.fails  # type: ignore[attr-defined]


def test_every_guard_has_a_variant_without_it() -> None:
    """Given the switches of the model, when the checks are looked through, then each is used by one that fails, so that
    none stands there unproved.
    """
    text = (FOLDER / "protocol.pml").read_text()
    switches = {line.split()[1] for line in text.splitlines() if line.startswith(("#ifdef ", "#ifndef "))}
    sizes = {"JOBS", "CHUNK", "STAGES", "WORKERS", "LEADERS", "FAULTS"}
    harmless = {"EARLY_ACK", "RELIABLE", "NO_ORDER_RULES"}
    used = {define for c in check.CHECKS if c.fails for define in c.defines}
    assert switches - sizes - harmless <= used
    assert harmless <= {define for c in check.CHECKS for define in c.defines}
