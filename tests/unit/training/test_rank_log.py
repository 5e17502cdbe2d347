"""Where a rank's log records go."""

import logging

import pytest

from megatrain.config import TrainConfig
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.errors import ConfigError
from megatrain.training.rank import _warn_of_other_count as warn_of_other_count
from megatrain.training.run_folder import log_to

LOG = logging.getLogger("megatrain")


def test_rank_0_shows_warnings_once_and_the_file_has_everything(tmp_path, capsys):
    """A library that set up the root logger, and a second run in the process, double nothing."""
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    try:
        for turn in range(2):
            with log_to(tmp_path, 0):
                LOG.info("quiet %d", turn)
                logging.getLogger("megatrain.tracking").warning("loud %d", turn)
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "megatrain: warning: loud 0\nmegatrain: warning: loud 1\n"
    text = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert [text.count(line) for line in ("quiet 0", "quiet 1", "loud 0", "loud 1")] == [1, 1, 1, 1]


def test_the_other_ranks_keep_to_their_files(tmp_path, capsys):
    """Rank 0 alone has the terminal."""
    with log_to(tmp_path, 1):
        LOG.warning("loud")
    assert capsys.readouterr().err == ""
    assert "loud" in (tmp_path / "logs" / "rank_00001.log").read_text()


def test_text_that_is_not_unicode_reaches_the_log_escaped(tmp_path, capsys):
    with log_to(tmp_path, 0):
        LOG.info("half a pair: \ud83d, a fire: \N{FIRE}")
    assert capsys.readouterr().err == ""
    text = (tmp_path / "logs" / "rank_00000.log").read_text(encoding="utf-8")
    assert "half a pair: \\ud83d, a fire: \N{FIRE}" in text


def test_a_folder_that_cannot_be_written_is_refused_by_key(tmp_path):
    """A file in its place, for one."""
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir"), log_to(tmp_path / "run", 0):
        pass


@pytest.mark.parametrize(("asked", "started", "warned"), [(4, 2, True), (2, 2, False), (1, 2, False), (3, 1, True)])
def test_another_launchers_number_of_processes_is_not_passed_over_in_silence(asked, started, warned, tmp_path, capsys):
    """launch.nproc_per_node starts nothing under torchrun: set to something else, it is named."""
    config = TrainConfig()
    config.launch.nproc_per_node = asked
    with log_to(tmp_path, 0):
        warn_of_other_count(config, RankEnvironment(0, 0, started, started, "x", 1))
    assert ("launch.nproc_per_node=" in capsys.readouterr().err) == warned
