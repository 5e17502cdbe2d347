"""Scores on tasks of lm-evaluation-harness inside the training loop: all ranks score shares of the same requests.

The weights are gathered from the engine, so that scores do not depend on the layout, and are dropped again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatrain.config import TrainConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.engine.whole_model import WholeModel
from megatrain.errors import ConfigError
from megatrain.evaluation.harness import Settings, find_tasks, run_tasks
from megatrain.evaluation.progress import Progress
from megatrain.tracking.evaluation_records import write_record

if TYPE_CHECKING:
    from megatrain.evaluation.harness_model import Ranks


class TaskScores:
    """The tasks of a run, loaded at its start. Calling it scores the engine's weights; all ranks must do that together.

    A chat template lays the questions out where the run learns from conversations.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        engine: Engine,
        dataset: Path,
        run_dir: Path,
        may_write: Callable[[], None],
    ) -> None:
        """`dataset` is the folder whose tokenizer the run uses.

        Raises:
            ConfigError: there is no such task, or the dataset has no tokenizer.
            DataError, EnvironmentFault: a task's data cannot be read, or are not there.
        """
        loop = config.train
        place = dataset / "tokenizer"
        if not place.is_dir():
            raise ConfigError(
                f"train.tasks: {dataset} has no tokenizer, so tasks cannot be asked; leave train.tasks out"
            )
        self._config, self._world, self._engine = config, world, engine
        self._run_dir, self._may_write = run_dir, may_write
        self._tokenizer = load_tokenizer(place)
        self._tasks = find_tasks(loop.tasks, Path(loop.tasks_dir) if loop.tasks_dir is not None else None)

    def __call__(self, step: int, beat: Callable[[str], None]) -> dict[str, float]:
        """Return each score of the weights after a step by `tasks/<task>/<metric>`, and keep them in the run's folder.

        `beat` is called with how far this rank is.
        """
        from megatrain.evaluation.harness_model import HarnessModel

        random_state = torch.get_rng_state()
        whole = WholeModel(self._config, self._world)
        whole.take(self._engine.state())
        has_template = self._tokenizer.chat_template() is not None and self._config.data.kind in (
            "chat",
            "pairs",
            "prompts",
        )
        template = ChatTemplate(self._tokenizer) if has_template else None
        ends = frozenset({self._tokenizer.end_of_document, *(template.ends() if template else ())})
        model = HarnessModel(
            whole.model,
            self._tokenizer,
            ends=ends,
            batch_size=self._config.train.micro_batch_size,
            seed=self._config.seed,
            template=template,
            progress=_Beats(beat),
            ranks=self._ranks(),
        )
        limit = self._config.train.tasks_limit
        results = run_tasks(model, self._tasks, Settings(None, limit, self._config.seed))
        torch.set_rng_state(random_state)
        if self._world.is_main:
            self._may_write()
            settings = {"limit": limit, "seed": self._config.seed, "precision": self._config.precision.name}
            for result in results:
                record = {**result.to_dict(with_samples=True), "chat_template": has_template, "settings": settings}
                write_record(self._run_dir, step, "tasks", result.name, record)
        return {f"tasks/{result.name}/{one.key}": one.value for result in results for one in result.scores}

    def _ranks(self) -> Ranks:
        from megatrain.evaluation.harness_model import Ranks

        return Ranks(self._world.rank, self._world.size, self._world.all_gather_json)


class _Beats(Progress):
    """Progress that goes to the run's own display, and tells the agent that this rank is alive."""

    def __init__(self, beat: Callable[[str], None]) -> None:
        super().__init__()
        self._beat = beat

    @contextmanager
    def of(self, kind: str, total: int) -> Iterator[Callable[[], None]]:
        """Call `beat` after each request."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._beat(f"scoring tasks: {done}/{total} {kind}")

        self._beat(f"scoring tasks: {kind}")
        yield advance


def scores_tasks(config: TrainConfig) -> bool:
    """Return whether a run scores tasks."""
    return bool(config.train.tasks or config.train.tasks_dir)
