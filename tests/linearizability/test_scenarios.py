# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scenarios, against servers that are shared by all of them: each has a key of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.linearizability.checker import violations
from tests.linearizability.ending import close
from tests.linearizability.scenarios import LOCAL, ONE_MACHINE, TWO_MACHINES, Stage
from tests.linearizability.staleness import widened
from tests.linearizability.system import MODES, System, running_system
from tests.support.azurite import Azurite

Scenario = Callable[[Stage], None]


def _running(mode: str, folder: Path, azurite: Azurite | None) -> Iterator[System]:
    with running_system(dataclasses.replace(MODES[mode], large_share=0), folder, azurite) as system:
        yield system
        assert [problem for server in system.servers for problem in close(server)] == []


@pytest.fixture(scope="module")
def one_machine(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from _running("azure", tmp_path_factory.mktemp("one"), azurite)


@pytest.fixture(scope="module")
def two_machines(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from _running("azure-two", tmp_path_factory.mktemp("two"), azurite)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    yield from _running("local", tmp_path_factory.mktemp("local"), None)


def name(scenario: Scenario) -> str:
    return scenario.__name__


def play(system: System, scenario: Scenario) -> None:
    stage = Stage(system, scenario.__name__)
    try:
        scenario(stage)
    finally:
        problems = stage.end()
    found = violations(widened(stage.history.operations, system.mode.revalidate_after))
    problems += [wrong.text(stage.history.zero) for wrong in found]
    assert problems + stage.history.wrong == [], "\n".join(problems)


@pytest.mark.parametrize("scenario", ONE_MACHINE, ids=name)
def test_one_machine(one_machine: System, scenario: Scenario) -> None:
    play(one_machine, scenario)


@pytest.mark.parametrize("scenario", TWO_MACHINES, ids=name)
def test_two_machines(two_machines: System, scenario: Scenario) -> None:
    play(two_machines, scenario)


@pytest.mark.parametrize("scenario", LOCAL, ids=name)
def test_local(local: System, scenario: Scenario) -> None:
    play(local, scenario)
