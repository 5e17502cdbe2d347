"""What `megatrain train` does before its ranks run."""

from megatrain.config.compose import compose
from megatrain.launch import agent
from megatrain.launch.nodes import SingleNode
from megatrain.verbs import resources
from megatrain.verbs.train import start_workers


def test_a_start_says_at_once_how_many_ranks_and_where_their_log_is(tmp_path, monkeypatch, capsys):
    """The first imports of the ranks take seconds, so the line comes before them."""
    seen = []
    monkeypatch.setattr(resources, "warnings", lambda *_: ())
    monkeypatch.setattr(agent, "launch", lambda *_: seen.append(capsys.readouterr().err) or 0)
    config = compose("train", [f"run.dir={tmp_path}", "run.name=first", "launch.nproc_per_node=2"])
    assert start_workers(config, [], SingleNode()) == 0
    assert seen == [f"megatrain: starting 2 ranks (log: {tmp_path}/first/logs/rank_00000.log)\n"]
