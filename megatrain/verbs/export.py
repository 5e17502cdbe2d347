"""`megatrain export`: a run or checkpoint as a Hugging Face folder. `interop/huggingface.py` converts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatrain.checkpoint.lineage import line_of, write_line
from megatrain.config import ExportConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.errors import ConfigError, cannot_write
from megatrain.interop.adapter import export_adapter
from megatrain.interop.huggingface import export_model
from megatrain.interop.load_model import Loaded, load
from megatrain.interop.path_kind import kind_of
from megatrain.report.sources import reads_conversations
from megatrain.verbs.conversion import print_result
from megatrain.verbs.path_checks import refuse_existing


def export_(config: ExportConfig) -> None:
    """Write the Hugging Face folder `out` from a checkpoint, or a run's: that of `step`, or the newest valid one.

    Raises:
        ConfigError: `out` exists or cannot be written, or no class of transformers can express this model.
        CheckpointError: there is no intact checkpoint.
        EnvironmentFault: the disk is full or broken.
    """
    out = Path(config.out)
    refuse_existing(out)
    if kind_of(Path(config.path)) == "huggingface":
        raise ConfigError(f"path={config.path} is a Hugging Face folder already")
    loaded = load(Path(config.path), config.step)
    if config.adapter:
        if loaded.lora is None:
            raise ConfigError(f"adapter=true: {loaded.folder} has no low-rank layers; leave adapter out")
        with _naming(out):
            export_adapter(loaded.config, loaded.adapters, loaded.lora, out, config.family)
        then = f"peft.PeftModel.from_pretrained(<the exported base>, {str(out)!r})"
        print_result(loaded, out, "fp32", then, is_model=False)
        return
    write_folder(loaded, out, config.dtype, config.family)
    theirs = "AutoModelForSequenceClassification" if loaded.config.output == "score" else "AutoModelForCausalLM"
    print_result(loaded, out, config.dtype, f"transformers.{theirs}.from_pretrained({str(out)!r})")


def write_folder(
    loaded: Loaded, out: Path, dtype: str = "fp32", family: str | None = None, is_for_chats: bool = False
) -> None:
    """Write the Hugging Face folder `out`, with the tokenizer and the line of ancestors. Raises as `export_` does.

    With `is_for_chats` the end of a reply ends a text, whatever the model was trained on.
    """
    tokenizer = loaded.need_tokenizer(writes=False) if loaded.tokenizer else None
    with _naming(out):
        export_model(
            loaded.config,
            loaded.need_dense(),
            out,
            dtype=dtype,
            tokenizer_dir=loaded.tokenizer_dir,
            end_of_document=tokenizer.end_of_document if tokenizer else None,
            generation=generation(loaded, is_for_chats),
            family=family,
        )
        if loaded.manifest is not None:
            write_line(line_of(loaded.folder, loaded.manifest), out)


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Turn an error of the disk into one that names the key."""
    try:
        yield
    except OSError as error:
        raise cannot_write(out, error, "out") from error


def generation(loaded: Loaded, is_for_chats: bool = False) -> dict[str, Any]:
    """Return the fields of generation_config.json to export: those of the folder that was imported, if it was one.

    Special tokens that it does not name are the tokenizer's. A model tuned on conversations, also in a mixture whose
    datasets are still there, or one `is_for_chats`, stops at what ends a reply as well.
    """
    fields: dict[str, Any] = dict(loaded.manifest.identity.generation) if loaded.manifest else {}
    if loaded.tokenizer is None:
        return fields
    if "eos_token_id" not in fields:
        given = {"bos_token_id": loaded.tokenizer.beginning_of_document, "pad_token_id": loaded.tokenizer.padding}
        fields |= {name: token for name, token in given.items() if token is not None}
    if loaded.tokenizer.chat_template() is None:
        return fields
    if is_for_chats or reads_conversations(loaded.run_config()):
        ends = {*loaded.end_tokens(), *ChatTemplate(loaded.tokenizer).ends()}
        fields["eos_token_id"] = sorted(ends) if len(ends) > 1 else min(ends)
    return fields
