"""What the batch script learns of a run before it requeues its job."""

from __future__ import annotations

import json

from megatrain.launch.requeue import furthest_step, main, suspected_nodes
from megatrain.resilience.ledger import FILE
from megatrain.tracking.events import EventLog


def test_the_furthest_step_of_all_starts_counts(tmp_path):
    assert furthest_step(tmp_path) == 0
    starts = [[{"done": 7}, {"done": 12}], [{"done": 9}, {}], []]
    (tmp_path / FILE).write_text(json.dumps({"format": 1, "agents": [{"starts": some} for some in starts]}))
    assert furthest_step(tmp_path) == 12
    (tmp_path / FILE).write_text("damaged")
    assert furthest_step(tmp_path) == 0


def test_one_line_says_step_limit_and_nodes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    main(["run.name=mine", "launch.max_requeues=4"])
    assert capsys.readouterr().out == "step=0 limit=4 exclude=\n"
    log = EventLog(run / "events.jsonl")
    for host in ("n3", "n1", "n7", "n3", "n7"):
        log.emit("failure", 3, how="AcceleratorError", host=host, **{"class": "machine"})
    log.close()
    (run / FILE).write_text(json.dumps({"format": 1, "agents": [{"starts": [{"done": 5}]}]}))
    main(["run.name=mine"])
    assert capsys.readouterr().out == "step=5 limit=10 exclude=n3,n7\n"
    assert suspected_nodes(tmp_path / "none") == []
