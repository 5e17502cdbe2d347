"""What does not fit the memory is refused before it is loaded; what the message proposes fits. And bf16."""

from __future__ import annotations

import re

import pytest
import torch
from support.serving import make_assistant, save_assistant

from megatrain.config import ServeConfig, ServeGroup
from megatrain.errors import ConfigError
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.draw import SamplingSettings
from megatrain.inference.memory import check_memory, precision_of, stored_model
from megatrain.interop.load_model import load

torch.set_num_threads(1)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("memory") / "toy"
    save_assistant(place)
    return place


def config_with(**changes):
    return ServeConfig(path="toy", serve=ServeGroup(**{"max_concurrent": 64, **changes}))


def test_what_the_message_proposes_fits_and_nothing_more(folder):
    stored = stored_model(folder, None)
    weights = sum(p.numel() for p in make_assistant().model.parameters()) * 4
    assert stored is not None and stored.num_bytes == weights and not stored.is_quantized
    generator = BatchGenerator(make_assistant().model, 64, 160)
    needed = int(1.1 * (weights + generator._cache.storage.nbytes)) + 1
    check_memory(config_with(), stored, CPU, needed)
    for workers, free in ((1, needed - 100), (1, needed // 2), (2, needed)):
        with pytest.raises(ConfigError, match=r"serve\.max_concurrent=64 replies of serve\.max_context=160") as raised:
            check_memory(config_with(workers=workers), stored, CPU, free)
        proposed = re.findall(r"serve\.(max_\w+)=(\d+)", str(raised.value).partition("; give ")[2])
        assert {name for name, _ in proposed} == {"max_concurrent", "max_context"}
        for name, value in proposed:
            check_memory(config_with(workers=workers, **{name: int(value)}), stored, CPU, free)
            with pytest.raises(ConfigError):
                check_memory(config_with(workers=workers, **{name: int(value) + 1}), stored, CPU, free)
    with pytest.raises(ConfigError, match="a machine with more memory"):
        check_memory(config_with(precision="bf16"), stored, CPU, 1000)


def test_bf16_halves_weights_and_cache_and_stays_near_fp32(folder):
    loaded = load(folder)
    models = {
        name: loaded.build(CPU, dtype=precision_of(ServeGroup(precision=name), CPU, False)) for name in ("fp32", "bf16")
    }
    assert precision_of(ServeGroup(), CPU, False) is torch.float32
    assert precision_of(ServeGroup(), torch.device("cuda"), False) is torch.bfloat16
    with pytest.raises(ConfigError, match="int8 or int4"):
        precision_of(ServeGroup(precision="bf16"), CPU, True)
    found = {}
    for name, model in models.items():
        generator = BatchGenerator(model, 2, 64)
        assert generator._cache.storage.dtype is next(model.parameters()).dtype
        assert len(generator.run([[5, 6, 7]], SamplingSettings(9, temperature=0))[0].ids) == 9
        with torch.no_grad():
            found[name] = model(torch.tensor([[5, 6, 7, 8]])).float().log_softmax(-1)
    assert models["bf16"].embed.weight.dtype is torch.bfloat16
    difference = (found["bf16"] - found["fp32"]).abs().max()
    assert 0 < difference < 0.5, "rounded, and no more"
