"""Turn a reply's tokens into text as they come: whole characters, ended before a stop text, with log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatrain.data.tokenizer import StreamDecoder, Tokenizer
from megatrain.inference.batch_generator import Token


@dataclass(frozen=True)
class TokenText:
    """A token as text with its log-probability, where it begins in the reply, and the likeliest tokens in its place."""

    text: str
    logprob: float
    start: int
    top: list[tuple[str, float]]


class ReplyText:
    """The text of one reply.

    `finish` is None until the reply has ended: then it says why. What could be the beginning of a stop text, and the
    last `hold_back` characters, wait until later tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], before: Sequence[int], hold_back: int = 0) -> None:
        """`before` are the ids that the reply continues, if its first token's text may depend on them."""
        self._tokenizer, self._stops, self._hold_back = tokenizer, stops, hold_back
        self._decoder = self._new_decoder(before)
        self._last = list(before[-1:])
        self._pending = ""
        self.text = ""
        self.num_tokens = 0
        self.finish: str | None = None

    @property
    def is_finished(self) -> bool:
        """Return whether the reply has ended."""
        return self.finish is not None

    @property
    def seen(self) -> str:
        """Return the text so far, with what still waits."""
        return self.text + self._pending

    def push(self, token: Token) -> tuple[str, TokenText | None]:
        """Take a token. Return the text that may go to the client now, and the token's own, unless it only stops."""
        assert self.finish is None
        self.num_tokens += 1
        start = len(self.seen)
        entry: TokenText | None = None
        if token.finish != "stop":
            piece = self._decode(self._decoder, token.id)
            top = [(self._alone(id), logprob) for id, logprob in token.top]
            entry = TokenText(piece, token.logprob, start, top)
            self._last = [token.id]
            self._pending += piece
        if token.finish is not None:
            self._pending += self._decoder.finish()
        if (found := self._stop_at()) is not None:
            self._pending = self._pending[:found]
            self.finish = "stop"
            if entry is not None and entry.start >= len(self.seen):
                entry = None
        elif token.finish is not None:
            self.finish = token.finish
        return self._released(), entry

    def cut(self) -> None:
        """End the reply before what still waits: its content is refused."""
        self._pending, self.finish = "", "content_filter"

    def _released(self) -> str:
        """Move the text that nothing can change any more from `_pending` to `text`, and return it."""
        keep = 0 if self.finish is not None else max(self._hold_back, self._possible_stop())
        keep = min(keep, len(self._pending))
        ready = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(ready) :]
        self.text += ready
        return ready

    def _stop_at(self) -> int | None:
        """Return where the first stop text in the pending text begins."""
        places = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        return min(places) if places else None

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the pending text that begins a stop text."""
        for length in range(min(max(map(len, self._stops), default=1) - 1, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stops):
                return length
        return 0

    def _alone(self, id: int) -> str:
        """Return the text of an id that could have come next."""
        return self._decode(self._new_decoder(self._last), id)

    def _new_decoder(self, before: Sequence[int]) -> StreamDecoder:
        decoder = self._tokenizer.stream_decoder()
        for token in before:
            self._decode(decoder, token)
        return decoder

    def _decode(self, decoder: StreamDecoder, id: int) -> str:
        return decoder.push(id) if id < self._tokenizer.vocab_size else "\ufffd"
