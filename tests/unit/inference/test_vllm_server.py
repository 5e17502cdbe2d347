"""`serve.backend=vllm`: the settings that vLLM gets, what is refused, and how its server begins and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
from support.serving import LIMIT_S, make_assistant, save_assistant, wait_until

from megatrain.config import ServeConfig, ServeGroup
from megatrain.data.chat.template import ChatTemplate
from megatrain.errors import ConfigError, EnvironmentFault
from megatrain.inference import vllm_server
from megatrain.inference.server import bind
from megatrain.inference.vllm_server import HONOURED, check_keys, find_command, run_server, settings
from megatrain.verbs.serve import exported, serve

FAKE = Path(__file__).parents[2] / "support" / "fake_vllm.py"


def fake(record, mode):
    """The words that start the stand-in."""
    return [sys.executable, str(FAKE), str(record), mode]


def run(tmp_path, mode, announce=lambda: None, **changes):
    """Run the stand-in until a signal; return the exit code."""
    config = ServeGroup(**{"grace_s": 0.0, "vllm_start_s": LIMIT_S, **changes})
    with bind("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()
    options = settings(config, tmp_path, host, port, "toy", ["first secret", "second secret"])
    return run_server(fake(tmp_path / "record", mode), options, config, announce)


def is_running(pid):
    """Whether a process exists, and is no zombie that its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def signals(*numbers, when):
    """Send signals to this process once `when` is set, from a thread."""

    def send():
        assert when.wait(LIMIT_S)
        for number in numbers:
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_the_server_gets_the_settings_and_ends_with_the_signal(tmp_path):
    is_ready = threading.Event()
    signals(signal.SIGTERM, when=is_ready)
    code = run(
        tmp_path,
        "serve",
        is_ready.set,
        max_concurrent=3,
        prompt_chunk=100,
        max_new_tokens=7,
        reuse_prefixes=False,
        grace_s=12.0,
        vllm_args=["--dtype=bfloat16"],
    )
    record = json.loads((tmp_path / "record").read_text())
    assert code == 0
    assert (tmp_path / "record.term").exists(), "the server itself got the signal"
    assert not is_running(record["pid"])
    assert "secret" not in " ".join([*record["words"], *record["environ"].values()])
    assert record["words"][-1] == "--dtype=bfloat16"
    assert not Path(record["words"][-2]).exists(), "the file with the keys is gone"
    port = record["options"].pop("port")
    assert 0 < port < 65536
    assert record["options"] == {
        "model": str(tmp_path),
        "served-model-name": ["toy"],
        "host": "127.0.0.1",
        "dtype": "float32",
        "max-num-seqs": 3,
        "max-num-batched-tokens": 103,
        "enable-prefix-caching": False,
        "override-generation-config": {"max_new_tokens": 7},
        "shutdown-timeout": 12,
        "api-key": ["first secret", "second secret"],
    }
    assert record["environ"]["VLLM_NO_USAGE_STATS"] == record["environ"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("mode", "limit_s", "message"),
    [
        ("broken", LIMIT_S, "ended with code 3 before it took requests"),
        ("short", LIMIT_S, "ended with code 3; the lines"),
        ("loading", 0.5, "takes no requests after 0.5 seconds; raise serve.vllm_start_s"),
    ],
)
def test_a_server_that_fails_is_a_fault_and_leaves_no_process(tmp_path, mode, limit_s, message):
    announced = []
    with pytest.raises(EnvironmentFault, match=message):
        run(tmp_path, mode, lambda: announced.append(mode), vllm_start_s=limit_s)
    assert announced == (["short"] if mode == "short" else [])
    if (tmp_path / "record").exists():
        assert not is_running(json.loads((tmp_path / "record").read_text())["pid"])


@pytest.mark.parametrize(("numbers", "code"), [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGTERM], 130)])
def test_a_server_that_ignores_the_signal_is_killed_with_its_children(tmp_path, monkeypatch, numbers, code):
    monkeypatch.setattr(vllm_server, "_LAST_S", 0.3 if code == 0 else LIMIT_S)
    is_ready = threading.Event()
    signals(*numbers, when=is_ready)
    assert run(tmp_path, "deaf", is_ready.set) == code
    record = json.loads((tmp_path / "record").read_text())
    wait_until(lambda: not is_running(record["pid"]) and not is_running(record["child"]), "both are gone")


def test_every_key_that_vllm_cannot_honour_is_refused_with_what_works():
    check_keys(ServeGroup(backend="vllm"))
    refused = [field.name for field in fields(ServeGroup) if field.name not in HONOURED]
    assert {"workers", "max_queue", "timeout_s", "blocked_words", "hold_back"} <= set(refused)
    for name in refused:
        with pytest.raises(ConfigError, match=rf"serve\.{name}=99: .*; .*, or use serve\.backend=embedded"):
            check_keys(ServeGroup(backend="vllm", **{name: 99}))
    with pytest.raises(ConfigError, match=r"serve.api_key: .* hyphen"):
        settings(ServeGroup(), Path("model"), "127.0.0.1", 1, "toy", ["-secret"])


def test_a_missing_vllm_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"this Python has no vLLM; install .*pip install vllm"):
        find_command([])
    with pytest.raises(ConfigError, match=r"serve.vllm_command: there is no program /no/vllm; install"):
        find_command(["/no/vllm", "serve"])
    assert find_command([sys.executable, "-m", "vllm"]) == [sys.executable, "-m", "vllm"]


def test_the_verb_exports_a_checkpoint_once_and_serves_the_folder(tmp_path, capsys):
    save_assistant(tmp_path / "toy")
    config = ServeConfig(path=str(tmp_path / "toy"))
    config.serve = ServeGroup(backend="vllm", port=0, grace_s=0.0, vllm_command=fake(tmp_path / "record", "serve"))
    is_recorded = threading.Event()
    threading.Thread(
        target=lambda: (wait_until((tmp_path / "record").exists, "a start"), is_recorded.set()), daemon=True
    ).start()
    signals(signal.SIGTERM, when=is_recorded)
    assert serve(config) == 0
    options = json.loads((tmp_path / "record").read_text())["options"]
    folder = Path(options["model"])
    assert options["served-model-name"] == ["toy"]
    assert folder.parent == tmp_path / "exported"
    assert {"config.json", "model.safetensors", "tokenizer.json", "lineage.json"} <= {p.name for p in folder.iterdir()}
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = make_assistant().tokenizer
    assert set(ends) == {tokenizer.end_of_document, *ChatTemplate(tokenizer).ends()}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert exported(config) == folder
    assert exported(ServeConfig(path=str(folder))) == folder, "an exported folder is served as it is"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "toy").rename(tmp_path / "old")
    save_assistant(tmp_path / "toy", max_seq_len=96)
    assert exported(config) != folder, "another model has another folder"
