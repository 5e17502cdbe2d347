"""A reward model judges replies as transformers' class does after export; what cannot judge is refused by name."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.reward_models import write_reward_model

from megatrain.checkpoint.manifest import KeptReward
from megatrain.config import ExportConfig
from megatrain.data.chat.prompt import Prompt
from megatrain.errors import CheckpointError, ConfigError, RewardError
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.reward_model import RewardModel, check_kept, load_scorer
from megatrain.reinforcement.rewards import Replies
from megatrain.reinforcement.sampler import Sampler, Samples
from megatrain.verbs.export import export_
from megatrain.verbs.scorer_checks import check_scorer

CPU = torch.device("cpu")
TALK = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
REPLIES = Replies(
    prompts=[*(f"Say {number}" for number in range(20)), TALK],
    completions=[*("word " * (number % 7) + str(number) for number in range(20)), "<|eot_id|> é"],
    stopped=[True] * 21,
    fields={},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a reward model, and what it is exported to."""
    folder = tmp_path_factory.mktemp("rewards")
    write_reward_model(folder / "reward")
    write_reward_model(folder / "language", output="vocabulary")
    export_(ExportConfig(path=str(folder / "reward"), out=str(folder / "exported")))
    return folder


def reward_model(path: Path) -> RewardModel:
    return RewardModel(str(path), load_scorer(str(path)), CPU, torch.float32)


@pytest.mark.parametrize("name", ["reward", "exported"])
def test_scores_are_those_of_transformers(place: Path, name: str) -> None:
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(place / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "exported")
    model = reward_model(place / name)
    expected = []
    for prompt, reply in zip(REPLIES.prompts[:-1], REPLIES.completions[:-1], strict=True):
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected.append(float(theirs(ids).logits[0, 0]))
    found = model.scores(REPLIES)
    assert found[:-1] == pytest.approx(expected, abs=1e-5) and np.std(expected) > 0.1
    assert len(model.conversation(TALK, "<|eot_id|> é")) > len(model.conversation(TALK, "é")) + 1, "markers stay text"


def test_models_and_functions_give_columns_in_the_order_of_their_names(place: Path) -> None:
    model = reward_model(place / "reward")
    judge = Judge(["ends_by_itself", str(place / "reward"), "exact_match"], [model], ["answer"], 60.0)
    try:
        found = judge(replace(REPLIES, fields={"answer": REPLIES.completions}))
    finally:
        judge.close()
    assert found.shape == (21, 3) and (found[:, [0, 2]] == 1).all() and found[:, 1].tolist() == model.scores(REPLIES)


class _Words:
    """A tokenizer of the policy: an id is a word of the replies."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"word{token}" for token in ids)


class _Ranks:
    """Ranks that are threads: `all_gather_json` as `World` has it."""

    def __init__(self, size: int) -> None:
        self.size, self._said, self._barrier = size, [None] * size, threading.Barrier(size)

    def of(self, rank: int) -> SimpleNamespace:
        def gather(value: Any) -> list[Any]:
            self._said[rank] = value
            self._barrier.wait(10)
            found = list(self._said)
            self._barrier.wait(10)
            return found

        return SimpleNamespace(rank=rank, size=self.size, all_gather_json=gather)


@pytest.mark.parametrize("size", [2, 3])
def test_scores_have_the_same_bits_on_any_number_of_ranks(place: Path, size: int) -> None:
    model = reward_model(place / "reward")
    prompts = [Prompt([1], f"Say {number}", {}) for number in range(37)]
    ids = [list(range(number % 5 + 1)) for number in range(37)]
    own = Samples(ids, [], np.ones(37, bool), np.zeros((37, 0)), None)

    def judged(world: Any) -> list[float]:
        sampler = Sampler.__new__(Sampler)
        sampler.world, sampler.rewards = world, Judge([model.name], [model], [], 60.0)
        sampler.tokenizer = _Words()
        return sampler._scored(own, prompts).rewards[:, 0].tolist()

    ranks = _Ranks(size)
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(judged, [ranks.of(rank) for rank in range(size)]))
    alone = judged(_Ranks(1).of(0))
    assert len(alone) == 37 and found == [alone] * size
    words = [" ".join(f"word{token}" for token in reply[:-1]) for reply in ids]
    each = [
        model.scores(Replies([prompt.prompt], [text], [True], {}))[0]
        for prompt, text in zip(prompts, words, strict=True)
    ]
    assert alone == pytest.approx(each, abs=1e-5), "in the order of the replies"


def test_a_conversation_that_is_too_long_and_a_score_that_is_no_number_are_refused(place: Path, tmp_path: Path) -> None:
    model = reward_model(place / "reward")
    with pytest.raises(RewardError, match=r"takes at most model.max_seq_len=128 tokens.*Say 3.*xxx"):
        model.scores(Replies(["Say 3"], ["x" * 400], [True], {}))
    with torch.no_grad():
        model._model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match=r"method.rewards: .*reward returned nan; prompt 'Say 0', reply '0'"):
        model.scores(REPLIES)


def test_what_holds_no_reward_model_is_refused_without_loading_it(place: Path) -> None:
    (place / "empty").mkdir(exist_ok=True)
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name, said in {
        "language": "a language model gives no score; give a reward model",
        "other": "a language model gives no score",
        "empty": "it is no model",
        "rewards": "no such file or folder",
    }.items():
        with pytest.raises(ConfigError, match=said):
            check_scorer(f"method.rewards={place / name}", "method.rewards", place / name)
    for name in ("reward", "exported"):
        check_scorer("method.rewards=x", "method.rewards", place / name)
    with pytest.raises(ConfigError, match="language is a language model, which gives no score"):
        load_scorer(str(place / "language"))


def test_a_run_that_resumes_takes_the_reward_model_that_it_began_with(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "reward"
    shutil.copytree(place / "reward", path)
    model = reward_model(path)
    kept = {str(path): model.kept}
    check_kept(model, kept)
    assert load_scorer(str(path), {str(path): KeptReward(str(place / "reward"), "")}).folder == place / "reward"
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="is gone, the reward model that this run began with"):
        load_scorer(str(path), kept)
    write_reward_model(path, seed=4)
    with pytest.raises(CheckpointError, match="holds another reward model than when this run began"):
        check_kept(reward_model(path), kept)
