"""Our model under the protocol of lm-evaluation-harness. Importing this needs lm-eval.

Requests become token ids as the harness's own class for transformers makes them (`lm_eval.models.huggingface.HFLM`), so
that scores compare with those of an exported model. One difference is on purpose: where a chat template lays a prompt
out, only the template's markers are control tokens, and what a document spells stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from megatrain.evaluation.continuation import Prompt, continuations
from megatrain.evaluation.likelihood import Pair, likelihoods
from megatrain.evaluation.progress import Progress
from megatrain.evaluation.prompts import Answer, Prompts
from megatrain.inference.draw import SamplingSettings
from megatrain.model.gpt import GPT

MAX_NEW_TOKENS = 256
"""Tokens to generate at most where a task does not say."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share requests: every `size`-th is a rank's, and `gather` returns all ranks' JSON values."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def mine(self, count: int) -> list[int]:
        """Return which of `count` requests are this rank's."""
        return list(range(self.rank, count, self.size))

    def all_of(self, found: list[Any], count: int) -> list[Any]:
        """Return the results of all requests, given those of this rank's."""
        if self.size == 1:
            return found
        merged: list[Any] = [None] * count
        for rank, values in enumerate(self.gather(found)):
            merged[rank :: self.size] = values
        return merged


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
        ranks: Ranks = Ranks(),
    ) -> None:
        """`ends` are the ids that end a text; `seed` is that of sampled answers."""
        super().__init__()
        self.model, self._tokenizer, self._prompts = model, tokenizer, Prompts(tokenizer, template)
        self._ends, self._batch_size, self._seed = ends, batch_size, seed
        self._progress, self._ranks = progress or Progress(), ranks

    # -------------------------------------------------------------------------------------------------- token ids

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self._prompts.prefix

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
        return self._prompts.template.source if self._prompts.template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a prompt; without `add_special_tokens`, of a text alone."""
        return self._tokenizer.encode(string) if add_special_tokens is False else self._prompts.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._prompts.pair(context, continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt. Without `add_generation_prompt` it ends within the last message."""
        return self._prompts.lay_out(chat_history, continues=not add_generation_prompt)

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
                self._prompts.warn(
                    f"prompts of more than {self.max_length} tokens (model.max_seq_len) lose their beginning; fewer "
                    "examples (num_fewshot) make them shorter"
                )
            pairs.append(Pair(tuple(context), tuple(continuation)))
        mine = [pairs[number] for number in self._ranks.mine(len(pairs))]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(mine)
        with self._progress.of("likelihoods", len(mine)) as advance:
            for number, likelihood in likelihoods(self.model, mine, self._batch_size, self.max_length):
                found[number] = (likelihood.log_probability, likelihood.is_greedy)
                advance()
        return [(value, is_greedy) for value, is_greedy in self._ranks.all_of(found, len(pairs))]

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
        mine = self._ranks.mine(len(requests))
        groups: dict[str, list[int]] = {}
        for place, number in enumerate(mine):
            groups.setdefault(repr(sorted(requests[number].args[1].items())), []).append(place)
        found = [""] * len(mine)
        with self._progress.of("answers", len(mine)) as advance:
            for places in groups.values():
                for number, text in self._generate([mine[place] for place in places], requests):
                    found[places[number]] = text
                    advance()
        return self._ranks.all_of(found, len(requests))

    def _generate(self, numbers: Sequence[int], all_requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        """Yield the place among `numbers` and the text of each of these requests; all have the same settings."""
        requests = [all_requests[number] for number in numbers]
        given = normalize_gen_kwargs(requests[0].args[1], MAX_NEW_TOKENS)
        stops = [text for text in handle_stop_sequences(given.pop("until", None), eos=None) if text]
        wanted = given.pop("max_gen_toks")
        sampling = self._sampling(given)
        named = {self._tokenizer.control_token(text) for text in stops}
        ends = self._ends | {token for token in named if token is not None}
        prompts, answers = [], [Answer(self._tokenizer, ends, stops) for _ in requests]
        for number, request, answer in zip(numbers, requests, answers, strict=True):
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            ids, count = self._fitted(ids, wanted)
            settings = replace(sampling, max_new_tokens=count, seed=self._seed + number)
            prompts.append(Prompt(ids, settings, answer.is_over))
        for number in continuations(self.model, prompts, self._batch_size):
            yield number, answers[number].text()

    def _fitted(self, ids: list[int], wanted: int) -> tuple[list[int], int]:
        """Return a prompt and the number of tokens to generate, both cut to what the model takes."""
        if wanted < self.max_length:
            longest = self.max_length - wanted
            if len(ids) > longest:
                self._prompts.warn(
                    f"prompts of more than {longest} tokens lose their beginning, as {wanted} are to be generated and "
                    f"the model takes {self.max_length} (model.max_seq_len)"
                )
            return ids[-longest:], wanted
        ids = ids[-(self.max_length - 1) :]
        self._prompts.warn(
            f"a task asks for up to {wanted} generated tokens, and the model takes {self.max_length} with the prompt "
            "(model.max_seq_len); fewer are generated"
        )
        return ids, self.max_length - len(ids)

    def _sampling(self, settings: dict[str, Any]) -> SamplingSettings:
        """Return how a task's `generation_kwargs` draw. Raises `ConfigError` for those that are not known here."""
        samples = bool(settings.pop("do_sample", False))
        temperature = float(settings.pop("temperature", 1.0) or 0.0)
        top_k, top_p = int(settings.pop("top_k", 0) or 0), float(settings.pop("top_p", 1.0) or 1.0)
        if left := sorted(name for name, value in settings.items() if value is not None):
            raise ConfigError(
                f"a task's generation_kwargs have {', '.join(left)}; megatrain knows until, max_gen_toks, do_sample, "
                "temperature, top_k and top_p"
            )
        return SamplingSettings(MAX_NEW_TOKENS, temperature if samples else 0.0, top_k, top_p)
