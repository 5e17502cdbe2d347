"""`megatrain.load`: a trained model in this process, to compute with or to generate text."""

from __future__ import annotations

import operator
from os import PathLike
from typing import Any, NamedTuple

from megatrain.api.folder_argument import existing_path
from megatrain.config import GenerateConfig, ModelConfig
from megatrain.config.compose import check_bounds, key_types
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import read_value
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError
from megatrain.interop.load_model import load as load_path
from megatrain.model.gpt import GPT
from megatrain.verbs.generate import stream


class _Parts(NamedTuple):
    model: GPT
    tokenizer: Tokenizer | None
    config: ModelConfig


class TrainedModel(_Parts):
    """A model, its tokenizer (None if it comes without one) and its config: `model, tokenizer, config = load(path)`.

    `model(tokens)` takes token ids `[B, T]` and returns logits `[B, T, vocab]`. It is in fp32 and in eval mode.
    `end_tokens` are the ids that end a text.
    """

    end_tokens: frozenset[int] = frozenset()

    def generate(self, prompt: str = "", **options: Any) -> str:
        """Return the text that continues `prompt`, or fills the gap before `suffix`, without them.

        `options` and their defaults are the keys of `megatrain generate`, such as `max_new_tokens=50, temperature=0`.

        Raises:
            ConfigError: an option is out of its bounds, the prompt is not text or is too long for the model, or the
                model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError("this model comes without a tokenizer: copy the one that made its data into its folder")
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt: give text, not {type(prompt).__name__}")
        config = GenerateConfig(
            path="", prompt=prompt, **{name: _typed(name, value) for name, value in options.items()}
        )
        check_bounds(config)
        return "".join(stream(self.model, self.tokenizer, self.end_tokens, config))


def _typed(name: str, value: Any) -> Any:
    """Return the value of a key of `megatrain generate`, read as on the command line. Raises ConfigError."""
    hints = {
        key: hint
        for key, hint in key_types(GenerateConfig).items()
        if key not in ("path", "step", "ensemble", "prompt", "device")
    }
    if name not in hints:
        raise ConfigError(f"generate has no {name}{did_you_mean('', name, list(hints))} (it has {', '.join(hints)})")
    return read_value(name, hints[name], str(value))


def load(path: str | PathLike[str], device: str = "auto", *, step: int | None = None) -> TrainedModel:
    """Load the model of a run, a checkpoint, or an imported or Hugging Face folder.

    Of a run, that is the checkpoint of `step`, or else its newest intact one. Checksums are verified first. `device` is
    `cpu`, `cuda` or `auto`: CUDA where there is any.

    Raises:
        ConfigError: there is no such path, or it holds no model, its tokenizer is another model's, `step` is no number
            or has no checkpoint, or the device has another name.
        CheckpointError: the checkpoint is damaged, or a run has no intact one.
        EnvironmentFault: there is no such device.
    """
    folder = existing_path(path)
    check_bounds(GenerateConfig(path=str(folder), device=device))
    target = device_by_name(device)
    try:
        number = None if step is None else operator.index(step)  # it may come from a table's index
    except TypeError:
        raise ConfigError(f"step={step!r}: expected the number of a step") from None
    loaded = load_path(folder, number)
    tokenizer = loaded.need_tokenizer(writes=False) if loaded.tokenizer is not None else None
    trained = TrainedModel(loaded.build(target), tokenizer, loaded.config)
    trained.end_tokens = loaded.end_tokens()
    return trained
