"""A hub that does not answer costs one line of ours, then our own error."""

import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatrain.config import DataConfig
from megatrain.data.corpus.sources import open_source
from megatrain.data.hub import one_line_a_wait
from megatrain.data.tokenizer_loading import find_tokenizer
from megatrain.errors import EnvironmentFault


@pytest.fixture
def printed():
    """Messages that huggingface_hub and datasets print."""

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    messages, kept = [], Kept()
    import datasets  # noqa: F401 (sets its logger up)

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    for logger in loggers:
        logger.addHandler(kept)
    yield messages
    for logger in loggers:
        logger.removeHandler(kept)


@pytest.mark.parametrize("key", ["data.hf_path", "tokenizer.path"])
def test_an_unreachable_hub_costs_one_line_and_our_error(key, printed, monkeypatch, capsys):
    """The libraries retry as they always do, at an address where nothing listens."""
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/{filename}")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", nowhere)
    with pytest.raises(EnvironmentFault, match=rf"{key}.nobody/nothing.*|{key}: nobody/nothing.*"):
        if key == "tokenizer.path":
            find_tokenizer("hf", "nobody/nothing")
        else:
            open_source(DataConfig(name="d", kind="huggingface", hf_path="nobody/nothing"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{key}=nobody/nothing: the Hugging Face hub does not answer (")
    assert "Connection refused" in said[0]
    assert said[0].endswith(f"trying again up to {len(slept)} times, with pauses of {sum(slept):.0f} s in all")
    assert not printed


@pytest.mark.parametrize(
    ("library", "waits", "limit"),
    [
        ("huggingface_hub.utils._http", "Rate limited. Waiting 31.0s before retry [Retry {}/5].", "5 times, .* 155 s"),
        (
            "datasets.utils.file_utils",
            "Got disconnected from remote data host. Retrying in 5sec [{}/20]",
            "20 .* 100 s",
        ),
    ],
)
def test_each_series_of_retries_has_one_line_and_other_messages_are_kept(library, waits, limit, printed, capsys):
    logger = logging.getLogger(library)
    with one_line_a_wait("data.hf_path=x"):
        for number in (1, 2, 3, 1, 2):
            logger.warning(waits.format(number))
        logger.warning("You are sending requests without a token.")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0] == said[1]
    assert re.search(limit, said[0])
    assert printed == ["You are sending requests without a token."]
    logger.warning(waits.format(1))
    assert len(printed) == 2, "what comes after is not filtered"


def test_data_files_of_a_folder_that_the_library_does_not_read_are_noted(tmp_path):
    """It takes the files of the most frequent format; a description may name the files of each split."""
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "line"}\n')
    source = open_source(DataConfig(name="d", kind="huggingface", hf_path=str(tmp_path)))
    assert list(source.notes()) == []
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "more.parquet")
    source = open_source(DataConfig(name="d", kind="huggingface", hf_path=str(tmp_path)))
    (note,) = source.notes()
    assert "data files are not read (1), such as more.parquet: " in note and "data=files" in note
    assert len(list(source.records())) == 3
