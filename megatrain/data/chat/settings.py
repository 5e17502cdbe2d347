"""What sources of messages need of the other settings, and which template lays them out."""

from __future__ import annotations

import sys

from megatrain.config import PrepareConfig
from megatrain.config.data_config import CHAT_KINDS
from megatrain.data.chat.template import PREPARED_ON, SHORT_TALK, ChatTemplate
from megatrain.data.special_tokens import MARKER, named_template
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

KEYS_FOR_CHAT = ("data.packing=best_fit", "train.mask_documents=true", "train.reset_positions=true")
"""Keys of a run on conversations: they stay whole, and apart from one another."""


def check_settings(config: PrepareConfig) -> None:
    """Refuse settings that conversations cannot honour. Raises ConfigError."""
    data, clean = config.data, config.clean
    if data.kind not in CHAT_KINDS:
        if data.chat_template is not None:
            raise ConfigError(
                f"data.chat_template={data.chat_template}: only data={' and data='.join(CHAT_KINDS)} lay out messages"
            )
        return
    if config.tokenizer.path is None:
        raise ConfigError(
            f"data={data.kind}: give the tokenizer of the model that is to be tuned: "
            "tokenizer.path=data/<name>/tokenizer, where <name> is the dataset that it was trained on, or "
            "tokenizer=hf tokenizer.path=<its folder>"
        )
    refused = {
        f"clean={clean.name}": bool(clean.steps),
        "clean.dedup=minhash": clean.dedup == "minhash",
        f"clean.dedup_passages={clean.dedup_passages}": clean.dedup_passages != "none",
        "data.write_text=true": data.write_text,
        "data.join_comments=true": data.join_comments,
        f"data.fim_rate={data.fim_rate:g}": data.fim_rate > 0,
    }
    if wrong := [key for key, given in refused.items() if given]:
        raise ConfigError(f"{wrong[0]}: the documents of data={data.kind} are messages, not plain text; leave it out")
    if data.bos:
        raise ConfigError("data.bos=true: the chat template says whether conversations begin with BOS; leave it out")


def use_template(tokenizer: Tokenizer, given: str | None) -> None:
    """Give the tokenizer the template that `data.chat_template` names, if any, and check that the two go together.

    Raises ConfigError if there is no template, it writes markers that are no control tokens of the tokenizer, or it
    cannot lay out a short conversation.
    """
    if given is not None:
        tokenizer.use_chat_template(named_template("data.chat_template", given))
    chat = ChatTemplate(tokenizer, date=PREPARED_ON)
    known = tokenizer.control_names()
    if missing := [name for name in dict.fromkeys(MARKER.findall(chat.source)) if name not in known]:
        raise ConfigError(
            f"data.chat_template: the template writes {', '.join(missing)}, which the tokenizer has no control token "
            f"for, so that any message could spell it; give a template with the tokenizer's own control tokens "
            f"({', '.join(known[:12])}), or a model whose tokenizer was trained with tokenizer.chat_template"
        )
    if not any(chat.encode(SHORT_TALK).counts):
        raise ConfigError(
            "data.chat_template: the template writes nothing of a reply, so no token would count in the loss; give a "
            "template that writes each message's content"
        )
    if chat.asks_for_date:
        print(
            f"note: the chat template asks for the date (strftime_now) and is told {PREPARED_ON:%d %B %Y}, so that the "
            "same conversations give the same dataset on any day; megatrain chat tells it today's",
            file=sys.stderr,
        )
