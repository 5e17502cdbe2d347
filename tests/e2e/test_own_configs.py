"""A user's own choices and saved config, from a working directory with module names that Python knows too."""

from __future__ import annotations

import subprocess

from support.commands import events, metrics

from megatrain.distributed.python_process import python_command


def test_a_run_of_own_choices_continues_from_its_folder_alone(tmp_path):
    """The working directory holds modules with the names of ours and of dependencies; no process imports them."""
    for name in ("json", "torch", "numpy", "yaml", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "megatrain").mkdir()
    (tmp_path / "megatrain" / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "text (1), a=b").mkdir()
    for number in range(40):
        text = f"document {number}: " + " ".join(f"word{number * place % 97}" for place in range(60))
        (tmp_path / "text (1), a=b" / f"{number}.txt").write_text(text)
    own = tmp_path / "own"
    for name, text in {
        "data/my": "kind: files\npaths: ['text (1), a=b/*.txt']\n",
        "model/my": "defaults: [tiny, _self_]\nnum_layers: 1\nhidden_size: 32\n",
        "experiment/my": "# @package _global_\ndefaults:\n  - override /tracking: none\n  - override /engine: native\n"
        "train: {steps: 3, seq_len: 16, global_batch_size: 4, micro_batch_size: 2, eval_every: 0}\n",
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / f"{name}.yaml").write_text(text)

    def megatrain(*words):
        done = subprocess.run(
            python_command("megatrain", *words), cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done

    megatrain("prepare", "--config-dir", "own", "data=my", "tokenizer.vocab_size=300")
    words = ["model=my", "data=my", "experiment=my", "launch.nproc_per_node=2"]
    megatrain("train", "--config-dir", "own", *words, "run.name=lr=0.1")
    megatrain("train", "runs/lr=0.1", "train.steps=5")
    assert [record["step"] for record in metrics(tmp_path, "lr=0.1")] == [1, 2, 3, 4, 5]
    assert events(tmp_path, "lr=0.1", "resume")[0]["step"] == 3
    assert megatrain("inspect", "runs/lr=0.1").stdout
