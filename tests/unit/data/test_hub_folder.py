"""A folder in the hub's format whose files are damaged is refused with what reads it record by record."""

import json
from dataclasses import replace

import pytest

from megatrain.config import DataConfig
from megatrain.data.corpus.sources import open_source
from megatrain.errors import DataError


def test_a_folder_with_a_damaged_file_names_what_finds_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(9)))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{bad\n')
    config = DataConfig(name="d", kind="huggingface", hf_path=str(tmp_path), hf_split="train")
    with pytest.raises(DataError, match=r"part 2 of 2: cannot be read after row 0 .*; data=files with this folder"):
        list(open_source(config).records())
    source = open_source(replace(config, on_bad_record="skip"))
    with pytest.raises(DataError, match=r"skip applies to rows that the library can parse; data=files .* reads on"):
        list(source.records())
