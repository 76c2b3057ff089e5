"""The benchmark's table of configurations is whole: what it names is there."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts" / "lib"
sys.path.append(str(SCRIPTS))
contenders: Any = importlib.import_module("bench_contenders")
environments: Any = importlib.import_module("bench_environments")
figures: Any = importlib.import_module("bench_figures")

#: Databases of a Valkey with its own settings: each contender has one.
DATABASES = 16


def test_each_configuration_is_a_project_or_a_script_that_is_there() -> None:
    for one in contenders.CONFIGURATIONS:
        assert bool(one.project) != bool(one.script), one.name
        if one.script:
            assert (SCRIPTS / "bench_peers" / f"{one.script[0]}.py").is_file()
        elif one.project != "legit_worker":
            assert (SCRIPTS / "stock" / f"{one.project}.py").is_file()
        assert one.environment in {"", *environments.PACKAGES}


def test_each_configuration_has_a_name_and_a_database_of_its_own() -> None:
    names = {one.name for one in contenders.CONFIGURATIONS}
    assert len(names) == len(contenders.CONFIGURATIONS) <= DATABASES


def test_targets_name_configurations() -> None:
    names = {one.name for one in contenders.CONFIGURATIONS}
    assert {name for target in figures.TARGETS for name in (target.name, target.reference)} <= names


def test_a_run_without_options_installs_no_peer() -> None:
    assert [one.name for one in contenders.CONFIGURATIONS if one.quick and one.environment] == []
