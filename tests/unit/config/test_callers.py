"""`compose` called from Python: from several threads, and inside a program that uses Hydra itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from megatrain.config.compose import compose


def test_threads_compose_one_after_another():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: compose("train", [f"model={('tiny', 'small')[n % 2]}", f"seed={n}"]), range(8)))
    assert [(config.model.name, config.seed) for config in found] == [(("tiny", "small")[n % 2], n) for n in range(8)]


def test_the_callers_own_hydra_stays_as_it_was(tmp_path):
    (tmp_path / "mine.yaml").write_text("key: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert compose("train", ["model=tiny"]).model.name == "tiny"
        assert GlobalHydra.instance().hydra is theirs
        assert hydra_compose("mine").key == 3
    assert not GlobalHydra.instance().is_initialized()
