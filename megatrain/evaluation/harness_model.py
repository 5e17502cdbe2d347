"""Our model under the protocol of lm-evaluation-harness. Importing this needs lm-eval.

Requests become token ids as the harness's own class for transformers makes them (`lm_eval.models.huggingface.HFLM`), so
that scores compare with those of an exported model. One difference is on purpose: where a chat template lays a prompt
out, only the template's markers are control tokens, and what a document spells stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from megatrain.evaluation.continuation import Prompt, Sampling, continuations
from megatrain.evaluation.likelihood import Pair, likelihoods
from megatrain.evaluation.progress import Progress
from megatrain.model.gpt import GPT

_LOG = logging.getLogger("megatrain")

MAX_NEW_TOKENS = 256
"""Tokens to generate at most where a task does not say."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the library carries no types
    """A model that the harness can ask. With a `template`, tasks lay out their prompts by it."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        ends: frozenset[int],
        batch_size: int,
        seed: int,
        template: ChatTemplate | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`ends` are the ids that end a text; `seed` is that of sampled answers."""
        super().__init__()
        self.model, self._tokenizer, self._template = model, tokenizer, template
        self._ends, self._batch_size, self._seed = ends, batch_size, seed
        self._progress = progress or Progress()
        self._warned: set[str] = set()

    # -------------------------------------------------------------------------------------------------- token ids

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or else the end of a document."""
        bos = self._tokenizer.beginning_of_document
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template from others."""
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the source of the chat template; empty without one."""
        return self._template.source if self._template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a prompt or a text, with BOS before it if the model's documents begin so."""
        if self._template is not None and add_special_tokens is None:
            return self._template.encode_prompt(string)
        start = [] if add_special_tokens is False else self._tokenizer.start()
        return [*start, *self._tokenizer.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation, which are encoded as one text."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if self._template is not None:
            continuation = self._template.kept_apart(continuation)
        before = self.tok_encode(stripped)
        return before, self.tok_encode(stripped + continuation)[len(before) :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt. Without `add_generation_prompt` it ends within the last message."""
        assert self._template is not None
        try:
            return self._template.prompt(chat_history, continues=not add_generation_prompt)
        except ConfigError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            self._warn(f"{error}; the system message is left out, as the harness does")
            return self._template.prompt(without, continues=not add_generation_prompt)

    # --------------------------------------------------------------------------------------------------- requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for strings, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise ConfigError(
                    f"a task asks for the likelihood of {len(continuation)} tokens, and the model takes 1 to "
                    f"{self.max_length} (model.max_seq_len): {str(strings and strings[1])[:80]!r}"
                )
            if len(context) + len(continuation) > self.max_length + 1:
                self._warn(
                    f"prompts of more than {self.max_length} tokens (model.max_seq_len) lose their beginning; fewer "
                    "examples (num_fewshot) make them shorter"
                )
            pairs.append(Pair(tuple(context), tuple(continuation)))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with self._progress.of("likelihoods", len(pairs)) as advance:
            for number, likelihood in likelihoods(self.model, pairs, self._batch_size, self.max_length):
                found[number] = (likelihood.log_probability, likelihood.is_greedy)
                advance()
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-likelihood, read in windows of the model's length that share no predicted token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pieces = get_rolling_token_windows(
                [*self._tokenizer.start(), *self._tokenizer.encode(text)], self.prefix_token_id, self.max_length, 1
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_probability
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each prompt, up to a stop sequence or the end of a text."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        found = [""] * len(requests)
        with self._progress.of("answers", len(requests)) as advance:
            for numbers in groups.values():
                for number, text in self._generate([requests[number] for number in numbers]):
                    found[numbers[number]] = text
                    advance()
        return found

    def _generate(self, requests: list[Instance]) -> Any:
        """Yield the number and the text of each request; all have the same settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], MAX_NEW_TOKENS)
        stops = [text for text in handle_stop_sequences(settings.pop("until", None), eos=None) if text]
        wanted = settings.pop("max_gen_toks")
        sampling = self._sampling(settings)
        named = {self._tokenizer.control_token(text) for text in stops}
        ends = self._ends | {token for token in named if token is not None}
        prompts, answers = [], [_Answer(self._tokenizer, ends, stops) for _ in requests]
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            ids, count = self._fitted(ids, wanted)
            prompts.append(Prompt(ids, count, self._seed + number, answer.is_over))
        for number, _ in continuations(self.model, prompts, sampling, self._batch_size):
            yield number, postprocess_generated_text(answers[number].text(), stops, None)

    def _fitted(self, ids: list[int], wanted: int) -> tuple[list[int], int]:
        """Return a prompt and the number of tokens to generate, both cut to what the model takes."""
        if wanted < self.max_length:
            longest = self.max_length - wanted
            if len(ids) > longest:
                self._warn(
                    f"prompts of more than {longest} tokens lose their beginning, as {wanted} are to be generated and "
                    f"the model takes {self.max_length} (model.max_seq_len)"
                )
            return ids[-longest:], wanted
        ids = ids[-(self.max_length - 1) :]
        self._warn(
            f"a task asks for up to {wanted} generated tokens, and the model takes {self.max_length} with the prompt "
            "(model.max_seq_len); fewer are generated"
        )
        return ids, self.max_length - len(ids)

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Return how a task's `generation_kwargs` draw. Raises `ConfigError` for those that are not known here."""
        samples = bool(settings.pop("do_sample", False))
        temperature = float(settings.pop("temperature", 1.0) or 0.0)
        top_k, top_p = int(settings.pop("top_k", 0) or 0), float(settings.pop("top_p", 1.0) or 1.0)
        if left := sorted(name for name, value in settings.items() if value is not None):
            raise ConfigError(
                f"a task's generation_kwargs have {', '.join(left)}; megatrain knows until, max_gen_toks, do_sample, "
                "temperature, top_k and top_p"
            )
        return Sampling(temperature, top_k, top_p) if samples else Sampling()

    def _warn(self, text: str) -> None:
        """Warn once of each thing."""
        if text not in self._warned:
            self._warned.add(text)
            _LOG.warning("warning: %s", text)


class _Answer:
    """The text of one answer as its tokens arrive, and whether it is over."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], stops: list[str]) -> None:
        self._ends, self._stops, self._vocab_size = ends, stops, tokenizer.vocab_size
        self._longest = max(map(len, stops), default=0)
        self._decoder = tokenizer.stream_decoder()
        self._text, self._is_finished = "", False

    def is_over(self, token: int) -> bool:
        """Take a token; return whether it is an end, or completes a stop sequence."""
        if token in self._ends:
            return True
        piece = self._decoder.push(token) if token < self._vocab_size else "\ufffd"
        self._text += piece
        tail = self._text[-(self._longest + len(piece)) :]
        return any(stop in tail for stop in self._stops)

    def text(self) -> str:
        """Return the answer, with what completed its stop sequence."""
        if not self._is_finished:
            self._text, self._is_finished = self._text + self._decoder.finish(), True
        return self._text
