"""`megatrain evaluate <one> <other> prompts=... judge=...`: replies of both models, scored by a function."""

import json

import numpy as np
import pytest
import torch
import transformers
from support.reward_models import write_reward_model

from megatrain.config import EvaluateConfig, ExportConfig
from megatrain.data.corpus.normalise import normalise
from megatrain.errors import ConfigError, DataError, RewardError
from megatrain.evaluation.win_rate import compare, read_prompts
from megatrain.verbs.evaluate import evaluate
from megatrain.verbs.evaluation_checks import check_evaluation
from megatrain.verbs.export import export_
from megatrain.verbs.value_checks import check_values

JUDGE = """
def length(completions, wanted):
    return [-abs(len(text) - goal) for text, goal in zip(completions, wanted)]

def text(completions):
    return ["good" for _ in completions]
"""


@pytest.fixture
def files(tmp_path):
    rows = [{"prompt": f"the model {'reads ' * number}", "wanted": 3 * number} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def config(finished, files, **keys) -> EvaluateConfig:
    earlier = finished / "checkpoints" / "step_00000002"
    given = {"prompts": str(files / "prompts.jsonl"), "judge": f"{files / 'judge.py'}:length", "max_new_tokens": 6}
    return EvaluateConfig(path=str(finished), device="cpu", **{"paths": [str(earlier)], **given, **keys})


def test_the_win_rate_is_that_of_the_judges_scores(finished, files, capsys):
    """Its JSON has both replies to each prompt with their scores, which are the function's own."""
    out = files / "out.json"
    evaluate(config(finished, files, out=str(out), temperature=1.0))
    (task,) = json.loads(out.read_text())["tasks"].values()
    assert len(task["samples"]) == task["documents"] == 12
    points = []
    for number, sample in enumerate(task["samples"]):
        scores = [-abs(len(sample[name]) - 3 * number) for name in ("reply", "other_reply")]
        assert [sample["score"], sample["other_score"]] == scores
        points.append((np.sign(scores[0] - scores[1]) + 1) / 2)
    found = {one["metric"]: one for one in task["scores"]}
    assert found["win_rate"]["value"] == np.mean(points)
    low, high = found["win_rate"]["interval"]
    assert low <= np.mean(points) <= high and low < high
    assert f"{task['detail']['wins']} wins" in capsys.readouterr().err
    assert task["detail"]["wins"] + task["detail"]["losses"] > 0


def test_a_reward_model_judges_and_one_model_alone_gets_its_mean_score(finished, files):
    """The scores are those that transformers' class gives the exported reward model."""
    judge = str(write_reward_model(files / "reward", max_seq_len=256))
    out = files / "out.json"
    evaluate(config(finished, files, judge=judge, out=str(out), limit=4))
    (against,) = json.loads(out.read_text())["tasks"].values()
    evaluate(config(finished, files, judge=judge, out=str(out), limit=4, paths=[]))
    (alone,) = json.loads(out.read_text())["tasks"].values()
    assert [one["score"] for one in alone["samples"]] == [one["score"] for one in against["samples"]]
    assert alone["scores"][0]["value"] == against["detail"]["mean_scores"][0]
    low, high = alone["scores"][0]["interval"]
    assert low < alone["scores"][0]["value"] < high
    export_(ExportConfig(path=judge, out=str(files / "exported")))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(files / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(files / "exported")
    sample = alone["samples"][1]
    reply = normalise(sample["reply"])  # as the texts of pairs were, which reward models learn from
    talk = [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": reply}]
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        assert sample["score"] == pytest.approx(float(theirs(ids).logits[0, 0]), abs=1e-5)


def test_a_tie_is_half_a_win_and_the_interval_narrows_with_prompts():
    scores, detail = compare([1, 2, 3, 4], [1, 1, 4, 5], seed=0)
    assert scores[0].value == 1.5 / 4 and detail["ties"] == 1 and scores[1].value == -0.25
    widths = []
    for count in (20, 2000):
        ours = np.random.default_rng(1).normal(0.2, 1, count)
        (rate, _), _ = compare(list(ours), [0.0] * count, seed=0)
        widths.append(rate.interval[1] - rate.interval[0])
    share = rate.value
    assert widths[1] == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 2000), rel=0.1)
    assert widths[0] > 5 * widths[1]


def test_judges_and_prompts_that_do_not_work_are_refused(finished, files, tmp_path):
    with pytest.raises(RewardError, match=r"^judge=.*judge.py:text .*number"):
        evaluate(config(finished, files, judge=f"{files / 'judge.py'}:text"))
    with pytest.raises(RewardError, match=r"^judge=.*judge.py:nothing: .*has no function nothing"):
        evaluate(config(finished, files, judge=f"{files / 'judge.py'}:nothing"))
    for keys, says in (
        ({"judge": None}, "give a judge that scores replies: a reward model, or module:function"),
        ({"judge": "better"}, "judge=better is neither module:function, exact_match"),
        ({"num_fewshot": 1}, "num_fewshot=1 has no effect on the win rate on prompts; add tasks=..."),
        ({"examples": "x.jsonl"}, "examples and prompts are evaluations of their own"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_values(config(finished, files, **keys))
    with pytest.raises(ConfigError, match=r"judge=.*first: a language model gives no score; give a reward model"):
        check_evaluation(config(finished, files, judge=str(finished)))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "answer": 1}\n')
    with pytest.raises(DataError, match=r"line 2: its fields differ from those of the first \(answer\)"):
        read_prompts(tmp_path / "bad.jsonl")
