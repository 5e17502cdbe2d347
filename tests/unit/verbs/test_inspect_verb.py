"""`megatrain inspect`: prints the contents, verifies every checksum, and its exit code tells what is damaged."""

import json
import re
import shutil

import pytest

from megatrain import cli
from megatrain.checkpoint.manifest import Identity, Manifest, Progress
from megatrain.data.mixture import MixturePlan, Phase, PlannedSource
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.model.count import num_parameters
from megatrain.verbs.inspect import event_rows, highlights, mixture_rows
from megatrain.verbs.printer import printable


@pytest.fixture
def inspect(capsys):
    """Run the command; return its exit code, output and error message."""

    def run(path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["inspect", str(path)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def run_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def words(line: str) -> list[str]:
    return line.split()


def test_a_checkpoint_shows_the_runs_progress_and_its_tensors(inspect, finished, family):
    code, out, err = inspect(finished / "checkpoints" / "step_00000004")
    manifest = json.loads((finished / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    _, config, _ = family("llama")
    count, tensors = num_parameters(config), sum(name.startswith("model.") for name in manifest["tensors"])
    lines = [words(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["step:", "4"] in lines and ["tokens:", "256"] in lines and ["cursor", "(samples):", "16"] in lines
    assert ["engine:", "native"] in lines and ["parameters:", f"{count:,}"] in lines
    for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
        assert [kind, "float32", str(tensors), f"{count:,}", f"{4 * count:,}"] in lines
    size = (finished / "checkpoints" / "step_00000004" / "0.safetensors").stat().st_size
    assert ["0.safetensors", f"{size:,}", "ok"] in lines and ["train.seq_len", "16"] in lines
    assert "verdict: valid" in out


def test_a_damaged_checkpoint_is_printed_and_then_refused_by_file(inspect, run_copy):
    folder = run_copy / "checkpoints" / "step_00000004"
    shard = bytearray((folder / "0.safetensors").read_bytes())
    shard[-1] ^= 1
    (folder / "0.safetensors").write_bytes(shard)
    code, out, err = inspect(folder)
    assert code == CheckpointError.exit_code and str(folder / "0.safetensors") in err
    assert re.search(r"^step: +4$", out, re.MULTILINE) and "verdict: damaged" in out
    (folder / "manifest.json").write_text("{")
    code, out, err = inspect(folder)
    assert code == CheckpointError.exit_code and str(folder / "manifest.json") in err
    assert "0.safetensors" in out and "unknown" in out


def test_files_missing_from_the_manifest_are_listed(inspect, run_copy):
    folder = run_copy / "checkpoints" / "step_00000004"
    (folder / "extra.bin").write_bytes(b"")
    code, out, _ = inspect(folder)
    assert code == 0 and "not listed in the manifest" in out


def test_a_run_shows_its_checkpoints_the_one_to_resume_from_and_its_records(inspect, finished):
    code, out, err = inspect(finished)
    lines = [words(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line[-1] for line in lines if line and line[0].startswith("step_")] == ["valid", "valid"]
    assert "a resume takes: step_00000004" in out and ["status:", "done"] in lines
    assert ["step:", "4"] in lines and any(line[:3] == ["save", "2", "4"] for line in lines)
    assert any(line[:2] == ["held-out", "loss:"] and line[-2:] == ["step", "4"] for line in lines)
    assert ["tokenizer:", "sentencepiece,"] in [line[:2] for line in lines]
    assert "None" not in out and "True" not in out and "False" not in out


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(inspect, run_copy):
    damaged = run_copy / "checkpoints" / "step_00000004" / "0.safetensors"
    damaged.unlink()
    code, out, err = inspect(run_copy)
    assert code == CheckpointError.exit_code and str(damaged) in err
    assert "a resume takes: step_00000002" in out and "gradient norm: " in out


def test_a_damaged_tokenizer_of_a_run_is_named(inspect, run_copy):
    model = run_copy / "tokenizer" / "tokenizer.model"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    code, _, err = inspect(run_copy)
    assert code == CheckpointError.exit_code and str(run_copy / "tokenizer") in err


def test_inspecting_leaves_a_save_in_progress_alone(inspect, run_copy):
    saving = run_copy / "checkpoints" / "step_00000006.writing"
    saving.mkdir()
    code, out, _ = inspect(run_copy)
    assert code == 0 and "unfinished: step_00000006.writing" in out and saving.exists()


def test_a_dataset_shows_its_card_and_is_verified_whole(inspect, dataset, tmp_path):
    code, out, err = inspect(dataset)
    card = json.loads((dataset / "card.json").read_text())
    assert (code, err) == (0, "") and card["fingerprint"] in out
    heldout = card["splits"]["heldout"]
    row = ["heldout", str(heldout["documents"]), f"{heldout['bytes']:,}", f"{heldout['tokens']:,}", "uint16"]
    assert row in [words(line) for line in out.splitlines()]
    damaged = shutil.copytree(dataset, tmp_path / "damaged")
    ids = bytearray((damaged / "train.bin").read_bytes())
    ids[10] ^= 1
    (damaged / "train.bin").write_bytes(ids)
    code, out, err = inspect(damaged)
    assert code == DataError.exit_code and str(damaged / "train.bin") in err
    assert row in [words(line) for line in out.splitlines()], "the card is printed anyway"
    (damaged / "train.bin").unlink()
    code, _, err = inspect(damaged)
    assert code == DataError.exit_code and "train.bin" in err


def test_a_dataset_shows_what_was_left_out_and_random_documents(inspect, dataset, tmp_path, capsys):
    folder = shutil.copytree(dataset, tmp_path / "cleaned")
    card = json.loads((folder / "card.json").read_text())
    rules = {"too_short": 3, **{f"language_{n}": 1 for n in range(6)}}
    card["counts"] = {"read": 36, "bad": 2, "bad_not_json": 2, "cleaned_away": 9}
    card["cleaning"] = [
        {"name": "length", "documents_in": 34, "documents_out": 25, "bytes_in": 9000, "bytes_out": 8000, "changed": 4,
         "rules": rules, "changes": {"email": 5}}
    ]  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card))
    code, out, _ = inspect(folder)
    lines = [words(line) for line in out.splitlines()]
    assert code == 0 and ["bad", "records", "36", "2", "34", "not", "json", "2"] in lines
    (row,) = [line for line in lines if line[:1] == ["length"]]
    assert row[:9] == ["length", "34", "9", "25", "8,000", "4", "too", "short", "3,"] and row[-4:] == [
        "2",
        "others",
        "email",
        "5",
    ]
    shown = [line for line in out.splitlines() if " document " in line and line.endswith(" tokens")]
    assert len(shown) == 3 and "naïve" in out and "東京" in out

    def documents(*words):
        assert cli.main(["inspect", str(folder), *words]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if " document " in line]

    assert documents() == shown != documents("seed=1")
    assert documents("samples=0") == [] and len(documents("samples=99")) == 25


def test_no_text_of_a_dataset_steers_the_terminal():
    assert printable("a\x1b[2Jb\r\u202ec\n\td\u3000é") == "a\\x1b[2Jb\\r\\u202ec\n\td\u3000é"


@pytest.mark.parametrize("is_file", [False, True])
def test_anything_else_is_refused(inspect, tmp_path, is_file):
    (tmp_path / "notes.txt").write_text("x")
    code, out, err = inspect(tmp_path / "notes.txt" if is_file else tmp_path)
    assert code == ConfigError.exit_code and out == ""
    assert "is not a run folder, a checkpoint, a prepared dataset, a tokenizer or a Hugging Face folder" in err


def test_a_folder_of_runs_is_refused_with_their_names(inspect, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "first")
    (tmp_path / "notes").mkdir()
    code, _, err = inspect(tmp_path)
    assert code == ConfigError.exit_code and err.rstrip().endswith(f"give one of these, such as {tmp_path / 'first'}")


def test_a_tokenizer_is_shown_and_verified(inspect, finished, tmp_path):
    folder = shutil.copytree(finished / "tokenizer", tmp_path / "tokenizer")
    saved = json.loads((folder / "megatrain_tokenizer.json").read_text())
    code, out, err = inspect(folder)
    lines = [words(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and ["fingerprint:", saved["fingerprint"]] in lines
    assert ["kind:", "sentencepiece"] in lines and "verdict: valid" in out
    model = bytearray((folder / "tokenizer.model").read_bytes())
    model[-1] ^= 1
    (folder / "tokenizer.model").write_bytes(model)
    code, _, err = inspect(folder)
    assert code == DataError.exit_code and str(folder) in err


def test_a_hugging_face_folder_is_shown_and_its_tensors_checked(inspect, finished, tmp_path, family):
    out_folder = tmp_path / "hf"
    assert cli.main(["export", str(finished), f"out={out_folder}"]) == 0
    code, out, err = inspect(out_folder)
    _, config, _ = family("llama")
    lines = [words(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and ["parameters:", f"{num_parameters(config):,}"] in lines
    assert ["tokenizer:", "sentencepiece,"] in [line[:2] for line in lines] and ["layers:", "2"] in lines
    (out_folder / "model.safetensors").write_bytes(b"")
    code, _, err = inspect(out_folder)
    assert code == CheckpointError.exit_code and "model.safetensors" in err


def test_keys_that_the_model_does_not_use_are_left_out():
    model = {
        "position": "rope",
        "rope_theta": 1e4,
        "rope_scaling": None,
        "rope_beta_fast": 32.0,
        "qk_norm_over": "head",
    }
    shown = [name for name, _ in highlights({"model": model})]
    assert "model.rope_theta" in shown and not {"model.rope_beta_fast", "model.qk_norm_over"} & set(shown)
    shown = [name for name, _ in highlights({"model": model | {"rope_scaling": "yarn", "qk_norm": True}})]
    assert {"model.rope_beta_fast", "model.qk_norm_over", "model.rope_scaling"} <= set(shown)
    assert ["model.qk_norm", "true"] in highlights({"model": model | {"qk_norm": True}})


def test_the_last_event_of_each_kind_is_told_in_words():
    events = [
        {"kind": "evaluate", "step": step, "time": "2026-11-30T11:59:24.248Z", "heldout_loss": 2.0 + step}
        for step in (1, 2)
    ] + [{"kind": "init_from", "step": 0, "time": "x", "checkpoint": "runs/a", "drawn": ["head", "embed"]}]
    assert event_rows(events) == [
        ["evaluate", "2", "2", "2026-11-30 11:59:24Z", "held-out loss 4.0000"],
        ["init from", "1", "0", "x", "runs/a; drawn anew: head, embed"],
    ]


def test_a_checkpoint_of_a_mixture_shows_what_was_read_of_each_source():
    sources = {"code": PlannedSource("c", 10), "web": PlannedSource("w", 100)}
    plan = MixturePlan(sources, [Phase(0, {"code": 1, "web": 3}), Phase(40, {"code": 1})])
    progress = Progress(step=6, cursor=48, skip_ranges=[(0, 8)])
    rows = mixture_rows(Manifest(progress=progress, identity=Identity(mixture=plan)))
    assert rows == [["code", "16", "40.0000%", "100.0000%", "1.600"], ["web", "24", "60.0000%", "0.0000%", "0.240"]]
    assert mixture_rows(Manifest()) == []
