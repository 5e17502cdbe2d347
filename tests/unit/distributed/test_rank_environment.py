"""How a process reads its rank from its environment."""

import pytest

from megatrain.distributed.rank_environment import RankEnvironment, is_launched
from megatrain.errors import EnvironmentFault

FULL = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_a_process_without_a_launcher_is_rank_0_of_1():
    assert RankEnvironment.from_environ({}) == RankEnvironment(0, 0, 1, 1, None, None)
    assert not is_launched({})


def test_a_launched_process_reads_its_ranks_and_sizes():
    assert RankEnvironment.from_environ(FULL) == RankEnvironment(3, 1, 4, 2, "node0", 29500)
    assert is_launched(FULL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", "one"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "5"),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", None),
        ("MASTER_ADDR", ""),
    ],
)
def test_an_invalid_variable_is_named(name, value):
    environ = {key: text for key, text in {**FULL, name: value}.items() if text is not None}
    with pytest.raises(EnvironmentFault, match=name):
        RankEnvironment.from_environ(environ)
