"""Compare ids and greedy replies of llama.cpp with ours, on the values that a GGUF file holds.

    megatrain compress runs/mine out=mine.gguf to=gguf
    npm install --ignore-scripts --omit=optional node-llama-cpp @node-llama-cpp/linux-x64
    python tools/bench/gguf_replies.py runs/mine mine.gguf

Run it where npm installed: llama_cpp.mjs looks for node_modules there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from megatrain.data.chat.conversation import Message
from megatrain.data.chat.template import ChatTemplate
from megatrain.interop.gguf_file import read_gguf
from megatrain.interop.load_model import load
from megatrain.model.sampling import generate

COUNT = 20
PROMPTS = [
    "def main(",
    "import os\n\nclass ",
    "    return self.",
    "  # 東京 naïve\n\tx = 12345",
    "for i in range(10):\n    ",
    "raise ValueError(",
    "<s> </s> <0x41> text",
]
CHATS = ["What is the larger of 31 and 58?", "你好，5 后面是几？"]


def main() -> int:
    """Print a line for each prompt; return 1 if any differs."""
    source, file = Path(sys.argv[1]), Path(sys.argv[2])
    loaded = load(source)
    tokenizer = loaded.need_tokenizer()
    asked = [(text, False, [*tokenizer.start(), *tokenizer.encode(text)]) for text in PROMPTS]
    if tokenizer.chat_template() is not None:
        template = ChatTemplate(tokenizer)
        chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in CHATS]
        asked += [(template.render(chat, asks=True).text, True, template.encode(chat, asks=True).ids) for chat in chats]
    model = replace(loaded, weights=read_gguf(file, loaded.config)).build(torch.device("cpu"))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as prompts:
        json.dump([{"text": text, "is_chat": is_chat} for text, is_chat, _ in asked], prompts)
        prompts.flush()
        script = Path(__file__).with_name("llama_cpp.mjs")
        command = ["node", str(script), str(file), prompts.name, str(COUNT)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    equal = True
    ends = {*loaded.end_tokens(), *(ChatTemplate(tokenizer).ends() if tokenizer.chat_template() is not None else [])}
    for (prompt, _, ids), theirs in zip(asked, json.loads(answer.splitlines()[-1]), strict=True):
        ours = list(generate(model, ids, max_new_tokens=COUNT, temperature=0, stop_ids=ends))
        same = (ids == theirs["ids"], ours == theirs["reply"])
        equal = equal and all(same)
        print(f"{prompt!r}: ids {'equal' if same[0] else 'differ'}, reply {'equal' if same[1] else 'differs'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
