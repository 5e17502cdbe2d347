"""`megatrain evaluate examples=FILE`: classification and extraction on questions with right answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatrain.config import EvaluateConfig
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError
from megatrain.evaluation.continuation import Prompt, continuations
from megatrain.evaluation.labelled import Example, classify, extract, read_examples
from megatrain.evaluation.likelihood import Pair, likelihoods
from megatrain.evaluation.progress import Progress
from megatrain.evaluation.prompts import Answer, Prompts
from megatrain.evaluation.results import TaskResult
from megatrain.inference.draw import SamplingSettings
from megatrain.interop.load_model import load
from megatrain.model.gpt import GPT
from megatrain.verbs.contamination import with_contamination
from megatrain.verbs.evaluation_results import ModelResult, choose_template, ends_of, keep, show

NOTE = "in brackets: the 95% interval (accuracy and exact match by Wilson's score, the rest by the bootstrap)"


def evaluate_examples(config: EvaluateConfig) -> None:
    """Score each model on a file of prompts and labels, and print tables; JSON where that is no terminal.

    Raises:
        ConfigError: a prompt is too long for a model, or a model has no tokenizer.
        DataError: the file cannot be read, or a record of it has no prompt and label.
        CheckpointError: there is no intact model.
    """
    assert config.examples is not None
    path = Path(config.examples)
    examples = read_examples(path, config.limit)
    labels = sorted({example.label for example in examples})
    results = []
    for place in [config.path, *config.paths]:
        started = time.perf_counter()
        loaded = load(Path(place), config.step)
        template = choose_template(place, loaded, config)
        prompts = Prompts(loaded.need_tokenizer(), template)
        model = loaded.build(device_by_name(config.device))
        progress = Progress(f"evaluating {place}" if config.paths else "evaluating")
        if config.answer == "label":
            answers = choose_labels(model, prompts, examples, labels, config, progress)
        else:
            asked = [prompts.ask(example.prompt, config.system) for example in examples]
            written = write_answers(model, prompts, asked, ends_of(loaded, template), config, progress)
            answers = [answer.text().strip() for answer in written]
        grade = extract if config.answer == "text" else classify
        scores, detail = grade([example.label for example in examples], answers, config.seed)
        samples = [
            {"prompt": example.prompt, "label": example.label, "answer": answer}
            for example, answer in zip(examples, answers, strict=True)
        ]
        result = TaskResult(path.name.partition(".")[0], None, None, len(examples), scores, samples, detail)
        if config.contamination:
            texts = {result.name: [f"{example.prompt}\n{example.label}" for example in examples]}
            (result,) = with_contamination([result], loaded, texts)
        step = loaded.manifest.step if loaded.manifest else None
        seconds = time.perf_counter() - started
        results.append(ModelResult(place, loaded.folder, step, template is not None, [result], seconds))
        keep(results[-1], "examples", config)
    show(results, config, NOTE)


def choose_labels(
    model: GPT,
    prompts: Prompts,
    examples: Sequence[Example],
    labels: Sequence[str],
    config: EvaluateConfig,
    progress: Progress,
) -> list[str]:
    """Return the likeliest of the labels after each prompt, which a space separates where the prompt ends without one.

    Raises ConfigError if a prompt with a label is longer than the model takes.
    """
    pairs = []
    for example in examples:
        asked = prompts.ask(example.prompt, config.system)
        space = "" if prompts.template is not None or asked[-1:].isspace() else " "
        for label in labels:
            context, answer = prompts.pair(asked, f"{space}{label}")
            _check_length(model, len(context) + len(answer) - 1, example.prompt)
            pairs.append(Pair(tuple(context), tuple(answer)))
    found = [0.0] * len(pairs)
    with progress.of("likelihoods", len(pairs)) as advance:
        for number, one in likelihoods(model, pairs, config.batch_size, model.config.max_seq_len):
            found[number] = one.log_probability
            advance()
    rows = [found[start : start + len(labels)] for start in range(0, len(found), len(labels))]
    return [labels[max(range(len(labels)), key=row.__getitem__)] for row in rows]


def write_answers(
    model: GPT,
    prompts: Prompts,
    asked: Sequence[str],
    ends: frozenset[int],
    config: EvaluateConfig,
    progress: Progress,
    temperature: float = 0.0,
) -> list[Answer]:
    """Return what the model writes after each prompt; without a chat template, up to the end of the line.

    Raises ConfigError if a prompt leaves no room for an answer.
    """
    stops = [] if prompts.template is not None else ["\n"]
    answers = [Answer(prompts.tokenizer, ends, stops) for _ in asked]
    requests = []
    for number, (text, answer) in enumerate(zip(asked, answers, strict=True)):
        ids = prompts.encode(text) or [prompts.prefix]
        _check_length(model, len(ids) + 1, text)
        count = min(config.max_new_tokens, model.config.max_seq_len - len(ids))
        settings = SamplingSettings(count, temperature, seed=config.seed + number)
        requests.append(Prompt(ids, settings, answer.is_over))
    with progress.of("answers", len(asked)) as advance:
        for _ in continuations(model, requests, config.batch_size):
            advance()
    return answers


def _check_length(model: GPT, length: int, prompt: str) -> None:
    longest = model.config.max_seq_len
    if length > longest:
        raise ConfigError(
            f"a prompt has {length} tokens with its answer, and the model takes {longest} (model.max_seq_len): "
            f"{prompt[:80]!r}; shorten it, or leave it out"
        )
