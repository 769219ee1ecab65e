import functools
import pathlib
import sys

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))      # scenario.py, which other processes read, too


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Prompts of several lengths."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("A: hi\nhello there\nA: what a day it is\n")
    return str(file)


@pytest.fixture(scope="session")
def alone(tiny_folder, prompts):
    """kind -> its case, the episodes that one device samples, and three updates from them."""
    import scenario

    @functools.cache
    def run(kind):
        own = scenario.case(str(tiny_folder), prompts, **scenario.KINDS[kind])
        episodes = jax.device_get(scenario.sample(own))
        return own, episodes, scenario.updates(own, episodes)[0]

    return run
