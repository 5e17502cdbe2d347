"""What the end-to-end tests train on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import megatrain


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a small prepared dataset."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        (folder / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    done = megatrain(
        folder, "prepare", "data=files", "data.name=tiny", "data.paths=[text/*.txt]", "tokenizer.vocab_size=400"
    )
    assert done.returncode == 0, done.stderr
    return folder
