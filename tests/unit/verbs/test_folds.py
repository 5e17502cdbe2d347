"""Cross-validation: what the folds of a sweep say together, and which commands ask for them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from megatrain.config.compose import compose
from megatrain.errors import ConfigError
from megatrain.verbs import folds, multirun
from megatrain.verbs.value_checks import check_fold

LOSSES = {"1e-3": [2.0, 2.5, 1.75], "1e-4": [3.0, 3.25, 2.75]}


@pytest.fixture
def points(tmp_path):
    """Return the six points of two settings and three folds, with what their runs recorded."""

    def made(lr, fold, loss):
        folder = tmp_path / f"fold{fold}-lr{lr}"
        folder.mkdir()
        records = [{"step": 1, "heldout_loss": 9.0}, {"step": 2, "heldout_loss": loss, "heldout_accuracy": 0.5}]
        records.append({"step": 3, "loss": 1.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        run = SimpleNamespace(name=folder.name, dir=str(tmp_path), sweep="sweep")
        config = SimpleNamespace(data=SimpleNamespace(fold=fold), run=run)
        return SimpleNamespace(values={"optim.lr": lr, "data.fold": str(fold)}, folder=folder, config=config)

    return [made(lr, fold, loss) for lr, of in LOSSES.items() for fold, loss in enumerate(of, 1)]


def test_each_setting_has_the_mean_of_its_folds_and_its_standard_error(points, tmp_path):
    settings = folds.summarise(points, [True] * 6)
    for setting, (lr, losses) in zip(settings, LOSSES.items(), strict=True):
        assert setting.values == {"optim.lr": lr}
        assert [fold.metrics["heldout_loss"] for fold in setting.folds] == losses, "that of the last evaluation"
        assert setting.mean["heldout_loss"] == pytest.approx(np.mean(losses))
        assert setting.standard_error["heldout_loss"] == pytest.approx(np.std(losses, ddof=1) / np.sqrt(3))
    shown = folds.table(settings)
    assert "optim.lr=1e-3" in shown and f"{np.mean(LOSSES['1e-4']):.4f}" in shown and "held-out accuracy" in shown
    named = folds.scores(settings)
    assert named["heldout_loss_mean/optim.lr=1e-4"] == pytest.approx(3.0) and len(named) == 8
    folds.save(tmp_path, settings)
    assert json.loads((tmp_path / folds.FILE).read_text())[1]["mean"] == {"heldout_loss": 3.0, "heldout_accuracy": 0.5}


def test_a_fold_that_is_not_done_leaves_its_setting_without_a_mean(points):
    first, second = folds.summarise(points, [True, False, True, True, True, True])
    assert first.folds[1].metrics == {} and first.mean == {} and second.mean["heldout_loss"] == pytest.approx(3.0)
    assert folds.table([first]).splitlines()[4].split() == ["2", "-", "-"]


def test_a_sweep_over_folds_shows_and_keeps_what_is_done_and_another_sweep_does_not(
    points, tmp_path, monkeypatch, capsys
):
    (tmp_path / "sweep").mkdir()
    sent = []
    monkeypatch.setattr(multirun, "send_sweep_scores", lambda folder, scores: sent.append((folder, scores)))
    monkeypatch.setattr(multirun, "is_done", lambda point: point.config.data.fold < 3)
    multirun.show_folds(points[:3])
    assert "2.5000" in capsys.readouterr().out and sent == [], "no mean yet"
    (kept,) = json.loads((tmp_path / "sweep" / folds.FILE).read_text())
    assert [fold["metrics"].get("heldout_loss") for fold in kept["folds"]] == [2.0, 2.5, None] and kept["mean"] == {}
    monkeypatch.setattr(multirun, "is_done", lambda point: True)
    multirun.show_folds(points[:3])
    assert sent[0][0] == points[0].folder and sent[0][1]["heldout_loss_mean"] == pytest.approx(25 / 12)
    capsys.readouterr()
    points[0].config.data.fold = None
    multirun.show_folds(points[:1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "asks"),
    [(["data.folds=3"], True), (["data.folds=3", "data.fold=2"], False), (["data.folds=null"], False), ([], False)],
)
def test_folds_without_a_fold_are_all_trained(words, asks):
    assert folds.asks_for_folds(words) == asks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.folds=3"], "data.folds=3 needs data.fold: .*trains a run for each fold"),
        (["data.fold=3"], "data.fold=3 needs data.folds"),
        (["data.fold=4", "data.folds=3"], "data.fold=4: there are only data.folds=3"),
    ],
)
def test_a_fold_and_their_number_go_together(words, message):
    with pytest.raises(ConfigError, match=message):
        check_fold(compose("prepare", ["data.name=x", *words]).data)
