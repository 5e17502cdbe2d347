"""Each rule of the published heuristics removes what is just outside its threshold and keeps what is just inside."""

import pytest

from megatrain.config.choices import conf_folder, read_yaml
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe, new_reports, run_recipe
from megatrain.data.corpus.splitting import words_of
from megatrain.data.corpus.steps.c4 import C4Paragraphs, C4Quality
from megatrain.data.corpus.steps.fineweb_quality import FinewebQuality
from megatrain.data.corpus.steps.gopher_quality import GopherQuality
from megatrain.data.corpus.steps.gopher_repetition import GopherRepetition
from megatrain.errors import EnvironmentFault


def distinct(count, length=5):
    """Return different words of letters, all of one length."""
    alphabet = "bcdfghjklmnpqrstvwxz"
    digits = [[(i // 20**place) % 20 for place in range(length)] for i in range(count)]
    return ["".join(alphabet[digit] for digit in reversed(word)) for word in digits]


def filled(*given, count=100, length=5):
    """Return a text of `count` words: the given ones, two stop words, and different ones."""
    words = [*given, "the", "and"]
    return " ".join([*words, *distinct(count - len(words), length)])


def rule_of(step, text):
    known = (text, "en", text.split()) if len(text) > 100_000 else None  # these are plain words; it saves time
    removal = step.apply(Document(text, "id", split=known))
    return removal.rule if removal else None


GOPHER_QUALITY = [  # Rae et al. 2021, A1.1: the rule, a text just inside its threshold, and one just outside
    ("too_few_words", filled(count=50), filled(count=49)),  # 50 words
    ("too_few_words", filled(count=50) + " ;", filled(count=49) + " ;"),  # of which a symbol is none
    ("too_many_words", filled(count=100_000), filled(count=100_001)),  # 100,000 words
    ("short_words", filled(count=200, length=3), filled("aa", count=200, length=3)),  # mean length 3
    ("long_words", filled("b" * 24, count=100, length=10), filled("b" * 25, count=100, length=10)),  # mean length 10
    ("hash_signs", filled(*["#"] * 10), filled(*["#"] * 11)),  # 0.1 hash signs a word
    ("ellipses", filled(*["...", "…"] * 5), filled(*["...", "…"] * 5, "...")),  # 0.1 ellipses a word
    ("few_alphabetic_words", filled(*["12345"] * 20), filled(*["12345"] * 21)),  # 80% with a letter
    ("few_stop_words", filled(), " ".join(["the", *distinct(99)])),  # 2 stop words
    ("few_stop_words", " ".join(["with", "of", *distinct(98)]), " ".join(["The", "Of", *distinct(98)])),
]


@pytest.mark.parametrize("rule, inside, outside", GOPHER_QUALITY)
def test_gopher_quality_removes_beyond_the_thresholds_of_rae_et_al(rule, inside, outside):
    assert (rule_of(GopherQuality(), inside), rule_of(GopherQuality(), outside)) == (None, rule)


def lines(marked, plain, mark):
    """Return ten lines of ten words, some with a mark at their place."""
    words = ["the", "and", *distinct(98)]
    rows = [" ".join(words[10 * i : 10 * i + 10]) for i in range(10)]
    return "\n".join([mark(row) for row in rows[:marked]] + rows[marked : marked + plain])


@pytest.mark.parametrize(
    "rule, mark, most",
    [
        ("bullet_lines", "  • {}".format, 9),  # 90% of the lines (Rae et al. 2021, A1.1)
        ("bullet_lines", "- {}".format, 9),
        ("ellipsis_lines", "{}... ".format, 3),  # 30%
        ("ellipsis_lines", "{}…".format, 3),
    ],
)
def test_gopher_quality_counts_lines_with_bullets_and_ellipses(rule, mark, most):
    assert rule_of(GopherQuality(), lines(most, 10 - most, mark)) is None
    assert rule_of(GopherQuality(), lines(most + 1, 9 - most, mark)) == rule


def test_gopher_quality_keeps_any_number_where_a_rule_is_null():
    off = dict.fromkeys(("min_words", "min_stop_words", "max_symbols", "min_alphabetic_words", "max_mean_word_length"))
    assert rule_of(GopherQuality(**off, min_mean_word_length=None), "## ... 1") is None
    assert rule_of(GopherQuality(**off), " ") == "too_few_words"


def parts(repeated, total, between, length=20):
    """Return parts of which the first is there again `repeated` times."""
    words = distinct(total * length, 4)
    given = [" ".join(words[length * i : length * (i + 1)]) for i in range(total - repeated)]
    return between.join([*given, *[given[0]] * repeated])


GOPHER_REPETITION = [  # Rae et al. 2021, table A1
    ("duplicate_paragraphs", dict(max_duplicate_paragraphs=0.3), "\n\n\n", 3),  # 0.30
    ("duplicate_paragraph_characters", dict(max_duplicate_paragraph_characters=0.2), "\n\n", 2),  # 0.20
    ("duplicate_lines", dict(max_duplicate_lines=0.3), "\n", 3),  # 0.30
    ("duplicate_line_characters", dict(max_duplicate_line_characters=0.2), "\n", 2),  # 0.20
]
ALL_OFF = {name: None for name in GopherRepetition.__dataclass_fields__ if name.startswith("max_")}


@pytest.mark.parametrize("rule, threshold, between, most", GOPHER_REPETITION)
def test_gopher_repetition_removes_repeated_parts_beyond_table_a1(rule, threshold, between, most):
    step = GopherRepetition(**{**ALL_OFF, **threshold})
    assert GopherRepetition() == GopherRepetition(**threshold)
    assert rule_of(step, parts(most, 10, between)) is None
    assert rule_of(step, parts(most + 1, 10, between)) == rule


def repeated_words(n, times, size):
    """Return a text of `size` characters in which n words are there `times` times, apart, and any other word once.

    Each of the n words has three letters; spaces count where the commonest n-gram is looked for.
    """
    other = iter(distinct(2000, 4))
    text = " ".join(f"{' '.join(distinct(n, 3))} {next(other)}" for _ in range(times))
    while len(text) + 5 <= size - 5:
        text += " " + next(other)
    return text + " " + "y" * (size - len(text) - 1)


@pytest.mark.parametrize("n, fraction", [(2, 0.2), (3, 0.18), (4, 0.16)])
def test_gopher_repetition_removes_by_the_commonest_n_gram_of_table_a1(n, fraction):
    step = GopherRepetition(**{**ALL_OFF, f"max_top_{n}_gram": fraction})
    assert GopherRepetition() == GopherRepetition(**{f"max_top_{n}_gram": fraction})
    characters, times = 4 * n - 1, 10
    size = int(characters * times / fraction)
    assert characters * times / size >= fraction > characters * times / (size + 1)
    assert rule_of(step, repeated_words(n, times, size + 1)) is None
    assert rule_of(step, repeated_words(n, times, size - 1)) == f"top_{n}_gram"


@pytest.mark.parametrize("n, fraction", [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)])
def test_gopher_repetition_removes_repeated_n_grams_beyond_table_a1(n, fraction):
    step = GopherRepetition(**{**ALL_OFF, f"max_duplicate_{n}_grams": fraction})
    assert GopherRepetition() == GopherRepetition(**{f"max_duplicate_{n}_grams": fraction})
    characters, repeats = 3 * n, 9  # spaces do not count, nor does the first occurrence
    size = int(characters * repeats / fraction)
    assert rule_of(step, repeated_words(n, repeats + 1, size + 1)) is None
    assert rule_of(step, repeated_words(n, repeats + 1, size - 1)) == f"duplicate_{n}_grams"


def test_gopher_repetition_goes_on_behind_a_repeated_n_gram():
    text = " ".join(["ab"] * 14)  # two repeated n-grams of 10 characters, not nine that overlap, of 41
    assert rule_of(GopherRepetition(**{**ALL_OFF, "max_duplicate_5_grams": 0.5}), text) is None
    assert rule_of(GopherRepetition(**{**ALL_OFF, "max_duplicate_5_grams": 0.48}), text) == "duplicate_5_grams"


def test_gopher_repetition_takes_the_same_characters_for_the_same_n_gram_wherever_words_begin():
    step = GopherRepetition(**{**ALL_OFF, "max_duplicate_5_grams": 0.3})
    assert rule_of(step, "ab cd ef gh ij x a bcd ef gh ij") == "duplicate_5_grams"
    assert rule_of(step, "ab cd ef gh ij x a bce ef gh ij") is None


def test_gopher_repetition_counts_n_grams_of_more_words_than_fit_into_a_number():
    words = distinct(60_000, 4)  # 60,000⁴ > 2⁶³
    text = " ".join(words + words[:4] * 5000)
    assert rule_of(GopherRepetition(**{**ALL_OFF, "max_top_4_gram": 0.2}), text) == "top_4_gram"
    assert rule_of(GopherRepetition(**{**ALL_OFF, "max_top_4_gram": 0.3}), text) is None


SENTENCE = "This line has some words in it."


@pytest.mark.parametrize(
    "line, kept",
    [  # Raffel et al. 2020, 2.2, and C4's own code
        (SENTENCE, SENTENCE),
        ('She said: "Go on!"', 'She said: "Go on!"'),
        ("It has no end", None),
        ("It goes on...", None),
        ("Two words.", None),  # fewer than 3
        ("Three short words.", "Three short words."),
        (f"A word of {'b' * 1000} letters.", f"A word of {'b' * 1000} letters."),  # more than 1,000
        (f"A word of {'b' * 1001} letters.", None),
        ("You must enable JavaScript here.", None),
        ("Please read our Privacy Policy first.", None),
        ("This site uses cookies a lot.", None),
        ("A fact[3] and another[edit] one[citation needed].", "A fact and another one."),
        ("A fact and another one.[12]", "A fact and another one."),
    ],
)
def test_c4_keeps_lines_as_raffel_et_al(line, kept):
    document = Document("\n".join([SENTENCE, f"  {line} ", *[SENTENCE] * 5]), "id")
    assert C4Quality().apply(document) is None
    assert document.text == "\n".join([SENTENCE, *([kept] if kept else []), *[SENTENCE] * 5])


@pytest.mark.parametrize(
    "rule, inside, outside",
    [
        ("too_few_sentences", f"{SENTENCE} " * 5, f"{SENTENCE} " * 4),  # fewer than 5 sentences
        ("too_few_sentences", f"{SENTENCE} Go on.\n" * 2 + SENTENCE, f"{SENTENCE} Go on.\n" * 2),
        ("lorem_ipsum", f"{SENTENCE}\n" * 5 + "Lorem ipsum", f"{SENTENCE}\n" * 5 + "Here is Lorem Ipsum."),
        ("curly_bracket", f"{SENTENCE}\n" * 5 + "int main() {", f"{SENTENCE}\n" * 5 + "Here is a { in it."),
    ],
)
def test_c4_removes_pages_as_raffel_et_al(rule, inside, outside):
    assert (rule_of(C4Quality(), inside), rule_of(C4Quality(), outside)) == (None, rule)


def test_c4_counts_lines_by_the_rule_that_they_break():
    broken = ["It has no end", "Short.", f"{'b' * 1001}.", "You want JavaScript.", "See the terms of use."]
    document = Document("\n".join([*broken, *broken, *[SENTENCE] * 5]), "id")
    assert C4Quality().apply(document) is None
    rules = ("unended_line", "short_line", "long_word_line", "javascript_line", "policy_line")
    assert document.counts == dict.fromkeys(rules, 2)


def test_c4_leaves_alone_what_it_is_told_to():
    off = dict(min_sentences=None, min_line_words=None, max_word_length=None, end_punctuation=[], citations=False)
    step = C4Quality(**off, lorem_ipsum=False, javascript=False, curly_bracket=False, policy=False)
    text = f"Lorem ipsum {{\nuse cookies [3]\njavascript\n{'b' * 1001}"
    document = Document(text, "id")
    assert step.apply(document) is None and document.text == text


def test_mc4_wants_three_paragraphs_of_200_characters():
    long, short = "b" * 200, "b" * 199
    assert rule_of(C4Paragraphs(), f"{long}\n{short}\n{long}\n{long}") is None  # Xue et al. 2021
    assert rule_of(C4Paragraphs(), f"{long}\n{short}\n{long}\n{short}") == "few_paragraphs"


def numbered(count, end="", length=40):
    return [f"{i:03} {'word ' * 20}"[: length - len(end)].replace(" ", "_") + end for i in range(count)]


@pytest.mark.parametrize(
    "rule, inside, outside",
    [  # Penedo et al. 2024, 3.6
        ("few_ended_lines", numbered(12, ".") + numbered(88), numbered(11, ".") + numbered(89)),  # 0.12
        ("short_lines", numbered(67, ".", 30) + numbered(33), numbered(68, ".", 30) + numbered(32)),  # 0.67
        ("short_lines", numbered(67, ".", 30) + numbered(33, ".", 31), numbered(68, ".", 30) + numbered(32)),
        (
            "duplicate_lines",
            [*numbered(99, "."), numbered(1, ".")[0]],
            [*numbered(98, "."), *numbered(1, ".")],
        ),
    ],
)
def test_fineweb_removes_beyond_the_thresholds_of_penedo_et_al(rule, inside, outside):
    step = FinewebQuality(max_line_breaks=None)
    assert (rule_of(step, "\n".join(inside)), rule_of(step, "\n".join(outside))) == (None, rule)


def test_fineweb_does_not_count_blank_lines():
    step = FinewebQuality(max_line_breaks=None)
    assert rule_of(step, "\n \n\n".join(numbered(12, ".") + numbered(88))) is None
    assert rule_of(step, "\n \n") == "empty"


def test_fineweb_counts_line_breaks_for_each_word_as_penedo_et_al():
    words = distinct(10, 40)
    inside = "\n\n\n".join([" ".join(words[:8]), f"{words[8]}."])  # 3 line breaks for 10 words, the mark is one: 0.3
    outside = "\n\n\n".join([" ".join(words[:8]), words[9]])  # 3 for 9 words
    step = FinewebQuality(min_ended_lines=None)
    assert (rule_of(step, inside), rule_of(step, outside)) == (None, "line_breaks")


CHINESE = (
    "北京是中国的首都，也是全国的政治和文化中心。这座城市有三千多年的历史，每年都有许多人来这里参观。春天的时候，"
    "公园里开满了花，老人们在树下聊天，孩子们在草地上跑来跑去。\n到了秋天，香山的红叶非常有名，很多人在周末去爬山。"
    "如果你喜欢美食，一定要尝一尝烤鸭，也可以在胡同里找到一些小吃店。冬天的北京很冷，不过湖面结冰以后，人们可以"
    "在上面滑冰，这也是当地人喜欢的活动之一。"
)


def test_the_chinese_recipe_keeps_chinese_that_the_english_rules_remove():
    recipe = build_recipe(read_yaml(conf_folder() / "clean" / "zh.yaml")[0]["steps"])
    (repetition,) = [step for step in recipe if isinstance(step, GopherRepetition)]
    (quality,) = [step for step in recipe if isinstance(step, GopherQuality)]
    assert run_recipe(recipe, Document(CHINESE, "id"), new_reports(recipe), seed=1)
    assert rule_of(GopherQuality(), CHINESE) is not None
    assert rule_of(quality, CHINESE.replace("的", "")[:60]) == "too_few_words"
    without = CHINESE
    for word in quality.stop_words:
        without = without.replace(word, "")
    assert rule_of(quality, without) == "few_stop_words"
    assert rule_of(repetition, CHINESE + CHINESE.replace("\n", "")) is not None


def test_c4_in_chinese_ends_lines_with_chinese_marks_and_counts_chinese_words():
    step = C4Quality(language="zh", end_punctuation=["。", "！", "？", "；", "”"], min_sentences=3)
    document = Document(f"{CHINESE}\n首页 登录 注册\n好。", "id")
    assert step.apply(document) is None
    assert document.text == CHINESE
    assert rule_of(step, CHINESE.split("。")[0] + "。") == "too_few_sentences"


@pytest.mark.parametrize("name", ["c4", "fineweb", "gopher", "zh"])
def test_each_recipe_can_be_built_and_run(name):
    recipe = build_recipe(read_yaml(conf_folder() / "clean" / f"{name}.yaml")[0]["steps"])
    assert not run_recipe(recipe, Document("Too short.", "id"), new_reports(recipe), seed=1)


@pytest.mark.parametrize("language, library", [("en", "spacy"), ("zh", "jieba")])
def test_a_missing_splitter_is_named_before_any_work(monkeypatch, language, library):
    monkeypatch.setattr("megatrain.data.corpus.splitting.find_spec", lambda name: None)
    for kind in (C4Quality, FinewebQuality, GopherQuality, GopherRepetition):
        with pytest.raises(EnvironmentFault, match=rf"^{kind.name} .* {library}: pip install '\.\[corpus\]'"):
            kind(language=language)


def test_a_document_is_split_once_until_its_text_changes(monkeypatch):
    calls = []
    splitter = type("Counting", (), {"words": lambda self, text: calls.append(text) or text.split()})()
    monkeypatch.setattr("megatrain.data.corpus.splitting.splitter", lambda language: splitter)
    document = Document("one two", "id")
    assert words_of(document, "en") is words_of(document, "en")
    document.text = "one two three"
    assert words_of(document, "en") == ["one", "two", "three"]
    assert calls == ["one two", "one two three"]
