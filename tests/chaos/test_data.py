"""A dataset that changes under a running job. The oracle is a run whose data was left alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
from support.commands import TRAIN, TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, run_with

from megatrain.data.adopt import make_card
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.order import SampleOrder

SEED = 1234


def copy_of_the_data(workplace, name):
    folder = workplace / name / "tiny"
    shutil.copytree(workplace / "data" / "tiny", folder)
    return folder


def test_data_that_changes_during_a_run_ends_the_run_until_the_data_is_restored(workplace, undisturbed_native):
    """Replacing the data by an identical copy stops nothing. Cutting it, changing it or cutting its held-out part ends
    the job with exit code 3, names the file and the bytes, and trains on none of it. Once the data is restored, the
    run ends like the undisturbed one."""
    folder = copy_of_the_data(workplace, "changing")
    good = workplace / "data" / "tiny"
    size = (folder / "train.bin").stat().st_size
    train, heldout = folder / "train.bin", folder / "heldout.bin"
    words = [*TWO_NATIVE, "run.name=changing", "data.dir=changing"]
    whole = f"changing/tiny/train.bin: bytes 0 to {size} are not what was prepared"
    as_it_was = f"cp {train} {train}.new && mv {train}.new {train}"
    for rank, step, command, says in [
        (0, 7, f"truncate -s 1000 {train}", "cannot be read: it ends at byte 1000, but the card"),
        (1, 13, f"head -c {size} /dev/zero | dd of={train} conv=notrunc status=none", whole),
        (1, 38, f"truncate -s 500 {heldout}", "changing/tiny/heldout.bin: bytes 0 to"),
    ]:
        faults = [fault(0, step - 4, "data", "run", by=as_it_was), fault(rank, step, "data", "run", by=command)]
        done = run_with(workplace, faults, *words)
        shutil.rmtree(workplace / "faults_changing")  # the next start counts its own
        assert done.returncode == 3, done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr, done.stderr
        seen = metrics(workplace, "changing")
        same(seen, undisturbed_native[: len(seen)])
        assert len(seen) >= step - 1, "an identical copy stops nothing"
        for name in ("train.bin", "heldout.bin"):
            shutil.copy(good / name, folder / name)
    done = run_with(workplace, [], *words)
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, "changing"), undisturbed_native)
    assert final_files(workplace, "changing") == final_files(workplace, "undisturbed-native")
    assert not events(workplace, "changing", "failure"), "no fault led to a restart"


def test_an_id_outside_the_vocabulary_is_named_even_if_every_hash_matches(workplace):
    """The id is in the data of the job's second step, and the card was made for the file as it is."""
    folder = copy_of_the_data(workplace, "foreign")
    old = Card.load(folder)
    tokens = old.splits["train"].tokens
    with (folder / "train.bin").open("r+b") as file:  # one in every window: the order is the new fingerprint's
        ids = np.fromfile(file, np.uint16)
        ids[np.arange(7, tokens, 32)] = 65535
        file.seek(0)
        file.write(ids.tobytes())
    card = make_card(folder, "tiny", None)
    card.tokenizer = old.tokenizer
    card.save(folder)
    assert json.loads((folder / "card.json").read_text())["fingerprint"] != old.fingerprint
    dataset = IndexedDataset.open(folder, "train")
    first = SampleOrder(dataset.fingerprint, "train", 32, (dataset.num_tokens - 1) // 32, SEED).windows(np.array([0]))
    done = run_with(workplace, [], *TRAIN, "run.name=foreign", "data.dir=foreign", "engine=native")
    assert done.returncode == 3, done.stderr
    at = dataset.place(int(first[0]) * 32 + 7)
    assert f"foreign/tiny/train.bin: token id 65535 at {at} is outside the vocabulary (0 to 399)" in done.stderr
    assert metrics(workplace, "foreign") == []
