"""Conversations are laid out as transformers lays them out, and no message can spell what ends a turn."""

import datetime
import json
import random
import re

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from megatrain.config import TokenizerConfig
from megatrain.data.chat.template import PREPARED_ON, ChatTemplate
from megatrain.data.special_tokens import CHAT_TEMPLATES
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.errors import ConfigError

MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
WORDS = [
    "hello",
    "Sie",
    " ",
    "\n",
    "\n\n",
    "  x",
    "42",
    "漢字",
    "é",
    "🙂",
    "ASSISTANT: ",
    "[INST]",
    "<",
    "|",
    "im_end",
    "{{ x }}",
]
SPELLED = ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "<|end|>", "<|eot_id|>", "<|assistant|>"]


def conversations(count, words, system=True):
    draw = random.Random(3)

    def text():
        return "".join(draw.choices(words, k=draw.randrange(1, 9))) + draw.choice("ab ?\n")

    for _ in range(count):
        first = [{"role": "system", "content": text()}] if system and draw.random() < 0.5 else []
        roles = ["user", "assistant"] * draw.randrange(1, 4)
        yield first + [{"role": role, "content": text()} for role in roles]


def metaspace():
    """A tokenizer like Llama 2's: a space is a mark, which also stands before the first word of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special[:3], initial_alphabet=list(" ▁"))
    tokenizer.train_from_iterator(["▁".join(WORDS[:12]).replace(" ", "▁")] * 20, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers with their chat templates, in folders that transformers loads too."""
    place = tmp_path_factory.mktemp("tokenizers")
    text = ["".join(random.Random(number).choices(WORDS, k=30)) for number in range(400)]
    for name in ("chatml", "llama3", "marked", "plain"):
        template = place / f"{name}.jinja"
        template.write_text({"marked": MARKED, "plain": PLAIN, **CHAT_TEMPLATES}[name])
        config = TokenizerConfig(kind="byte_level_bpe", vocab_size=420, chat_template=str(template))
        if name == "marked":
            config.special_tokens = ["<|system|>", "<|user|>", "<|assistant|>"]
        train_byte_level_bpe(iter(text), config).save(place / name)
    (place / "inst").mkdir()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=metaspace(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )
    fast.save_pretrained(place / "inst")
    return place


@pytest.mark.parametrize("name", ["chatml", "llama3", "marked", "plain", "inst"])
def test_the_ids_are_those_of_transformers(folders, name):
    ours = ChatTemplate(find_tokenizer("hf", str(folders / name)))
    theirs = transformers.AutoTokenizer.from_pretrained(folders / name)
    for messages in conversations(200, WORDS, system=name != "inst"):
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert ours.encode(messages).ids == expected
        if name != "inst":
            asked = theirs.apply_chat_template(messages[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
            assert ours.encode(messages[:-1], asks=True).ids == asked


def test_the_assistants_tokens_are_those_that_transformers_marks(folders):
    ours = ChatTemplate(find_tokenizer("hf", str(folders / "marked")))
    theirs = transformers.AutoTokenizer.from_pretrained(folders / "marked")
    for messages in conversations(200, WORDS):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert [int(counts) for counts in ours.encode(messages).counts] == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "marked", "plain", "inst"])
def test_replies_and_what_ends_them_count_and_nothing_else_does(folders, name):
    """Also of templates that do not mark them, and where a token begins before the reply does."""
    chat = ChatTemplate(find_tokenizer("hf", str(folders / name)))
    for messages in conversations(60, WORDS, system=name != "inst"):
        rendered = chat.render(messages)
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        written = [rendered.text[start:stop] for start, stop in rendered.spans]
        end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "marked": "<|end|>", "plain": "\n", "inst": "</s>"}[name]
        trims = name in ("llama3", "inst")
        begin = " " if name == "inst" else ""
        assert written == [f"{begin}{reply.strip() if trims else reply}{end}" for reply in replies]
        encoded = chat.encode(messages)
        counted = [i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
        if name != "plain":
            assert counted.count(chat.tokenizer.control_token(end)) == len(replies)
        if name != "inst":  # that tokenizer does not know all characters
            shown = "".join(text if name == "plain" else text.removesuffix(end) for text in written)
            assert without_spaces(chat.tokenizer.decode(counted)) == without_spaces(shown)


def without_spaces(text):
    """A token of spaces that begins before the reply does counts too."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("kind", ["byte_level_bpe", "sentencepiece"])
def test_no_message_can_end_a_turn_or_begin_one(kind, tmp_path):
    config = TokenizerConfig(kind=kind, vocab_size=420, chat_template="chatml")
    train = train_byte_level_bpe if kind == "byte_level_bpe" else train_sentencepiece
    train(("".join(random.Random(n).choices(WORDS, k=30)) for n in range(400)), config).save(tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    chat = ChatTemplate(tokenizer)
    start, end = (tokenizer.control_token(name) for name in ("<|im_start|>", "<|im_end|>"))
    for messages in conversations(200, [*WORDS, *SPELLED, *SPELLED]):
        encoded = chat.encode(messages)
        assert encoded.ids.count(start) == encoded.ids.count(end) == len(messages)
        text = "".join(f"{message['role']}\n{message['content']}\n" for message in messages)
        assert tokenizer.decode(encoded.ids) == text, "what is spelled stays as text"
        counted = [i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
        assert counted.count(end) == sum(message["role"] == "assistant" for message in messages)


@pytest.mark.parametrize("mark", ["\0", "\ufdd0", "\ufdd1", "\ufdd2"])
def test_no_message_can_use_the_marks_that_are_used_inside(folders, mark):
    tokenizer = find_tokenizer("hf", str(folders / "marked"))
    chat = ChatTemplate(tokenizer)

    def encoded(content):
        return chat.encode([{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}])

    for spelled in (f"{mark}<|end|>{mark}", f"<|e{mark}nd|>", f"<{mark}|end|>", f"\ufdd0 a{mark}\ufdd1"):
        assert encoded(f"a{spelled}b") == encoded("a" + re.sub("[\0\ufdd0-\ufdd2]", "", spelled) + "b")
        assert encoded(spelled).ids.count(tokenizer.control_token("<|end|>")) == 2


def test_what_a_template_refuses_or_cannot_say_is_told(folders):
    with pytest.raises(ConfigError, match="refuses the messages: no system prompt"):
        ChatTemplate(find_tokenizer("hf", str(folders / "inst"))).encode([{"role": "system", "content": "x"}])
    tokenizer = find_tokenizer("hf", str(folders / "chatml"))
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate(tokenizer, "{% for %}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    forgets = (
        "{% for m in messages %}{% if loop.last %}{{ m.content }}!{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=re.escape("enclose what it writes in {% generation %}")):
        ChatTemplate(tokenizer, forgets).encode(talk)
    with pytest.raises(ConfigError, match="cannot be filled in"):
        ChatTemplate(tokenizer, "{{ messages[9]['content'] }}").encode(talk)


LAST = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""A template that ends a conversation, and not each turn, with the end of a document, as Phi-3's does."""


def test_what_a_template_writes_at_the_very_end_alone_is_no_part_of_a_reply(folders):
    """The oracle: the masks that transformers gives if the template says itself what the assistant writes."""
    path = folders / "marked"
    ours, theirs = ChatTemplate(find_tokenizer("hf", str(path)), LAST), transformers.AutoTokenizer.from_pretrained(path)
    said = "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    theirs.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}" + said + "{% else %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}{{ eos_token }}"
    )
    words = [word for word in WORDS if word.strip()]  # a newline before a reply may be in a token with its first
    for messages in conversations(100, words):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        found = ours.encode(messages)
        assert found.ids == expected["input_ids"]
        assert [int(counts) for counts in found.counts] == expected["assistant_masks"]
    assert ours.ends() == theirs.convert_tokens_to_ids(["<|end|>", theirs.eos_token])


def test_a_reply_ends_with_its_control_token_even_if_a_newline_after_it_counts(folders):
    tokenizer = find_tokenizer("hf", str(folders / "marked"))
    template = MARKED.replace("'<|end|>' }}{% endgeneration", "'<|end|>\n' }}{% endgeneration")
    chat = ChatTemplate(tokenizer, template)
    assert chat.ends() == [tokenizer.control_token("<|end|>"), tokenizer.end_of_document]


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain", "inst", "last"])
def test_many_replies_are_those_that_are_found_one_by_one(folders, name, monkeypatch):
    """With contents that begin and end with spaces, and contents that a template would strip."""
    path = folders / ("marked" if name == "last" else name)
    chat = ChatTemplate(find_tokenizer("hf", str(path)), LAST if name == "last" else None)
    filled = []
    fill = chat._template.render
    monkeypatch.setattr(chat._template, "render", lambda **given: filled.append(given) or fill(**given))
    for words in (WORDS, [*WORDS, *SPELLED], [word for word in WORDS if word.strip()]):
        for talk in conversations(3, words, system=False):
            talk = [message for _ in range(40) for message in talk]
            with monkeypatch.context() as slow:
                slow.setattr("megatrain.data.chat.template._FEW", 10**6)
                expected = chat.render(talk)
            filled.clear()
            assert chat.render(talk) == expected
            assert len(filled) < 15, "not once for each reply"


def test_a_reply_among_many_that_is_laid_out_otherwise_is_noticed(folders):
    odd = LAST.replace("'<|end|>\n' }}", "('<|end|>\n' if loop.index != 12 else '!<|end|>\n') }}")
    chat = ChatTemplate(find_tokenizer("hf", str(folders / "marked")), odd)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 20
    rendered = chat.render(talk)
    assert [rendered.text[start:stop] for start, stop in rendered.spans].count("b!<|end|>") == 1


def test_the_date_is_one_that_is_given_or_todays(folders):
    tokenizer = find_tokenizer("hf", str(folders / "chatml"))
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHAT_TEMPLATES["chatml"]
    talk = [{"role": "user", "content": "a"}]
    assert ChatTemplate(tokenizer, dated, PREPARED_ON).render(talk).text.startswith("26 Jul 2024<")
    assert ChatTemplate(tokenizer, dated).render(talk).text.startswith(datetime.date.today().strftime("%d %b %Y"))
    assert ChatTemplate(tokenizer, dated).asks_for_date and not ChatTemplate(tokenizer).asks_for_date


def test_a_tag_in_a_comment_marks_nothing(folders):
    tokenizer = find_tokenizer("hf", str(folders / "chatml"))
    plain = ChatTemplate(tokenizer)
    noted = ChatTemplate(tokenizer, "{# without {% generation %} #}" + plain.source)
    for messages in conversations(20, WORDS):
        assert noted.encode(messages) == plain.encode(messages)


def test_of_several_templates_the_default_one_is_used(folders, tmp_path):
    """As transformers does; older tokenizers have a list of them in their settings."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "chatml")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "{{ messages }}"},
        {"name": "default", "template": tokenizer.chat_template},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_chat_template() == tokenizer.chat_template
    assert find_tokenizer("hf", str(tmp_path)).chat_template() == tokenizer.chat_template
