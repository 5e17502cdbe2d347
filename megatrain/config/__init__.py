"""The schema of conf/: every key with its type, unit, default and bounds, one file per group. Imports no torch.

Defaults are defined only here; the YAML files of conf/ hold only what a choice changes. `compose.py` turns command-line
overrides into these dataclasses. Everything below the command line takes them as plain values.
"""

from __future__ import annotations

from megatrain.config.checkpoint_config import CheckpointConfig
from megatrain.config.clean_config import CleanConfig
from megatrain.config.compress_configs import CompressConfig, MergeConfig
from megatrain.config.data_config import DataConfig
from megatrain.config.engine_config import EngineConfig
from megatrain.config.evaluate_config import EvaluateConfig
from megatrain.config.key import key, walk
from megatrain.config.launch_config import JobConfig, LaunchConfig, PrepareLaunchConfig
from megatrain.config.loop_config import TrainLoopConfig
from megatrain.config.method_config import METHODS, SAMPLING, WITH_VALUES, LoraConfig, MethodConfig
from megatrain.config.model_config import ROPE_SCALING_KEYS, ModelConfig
from megatrain.config.optim_config import OptimConfig
from megatrain.config.parallel_config import ParallelConfig
from megatrain.config.precision_config import PrecisionConfig
from megatrain.config.resilience_config import ResilienceConfig
from megatrain.config.run_config import RunConfig
from megatrain.config.serve_config import ServeGroup
from megatrain.config.tokenizer_config import TokenizerConfig
from megatrain.config.tracking_config import TrackingConfig
from megatrain.config.verb_configs import (
    VERBS,
    ChatConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    InspectConfig,
    LayoutListConfig,
    LayoutsConfig,
    OpenDataConfig,
    OpenEngineConfig,
    OpenLaunchConfig,
    OpenParallelConfig,
    OpenTrainLoopConfig,
    PrepareConfig,
    ReportConfig,
    ServeConfig,
    TokenizersConfig,
    TrainConfig,
    TrainTokenizerConfig,
    TuneConfig,
)

__all__ = [
    "METHODS",
    "ROPE_SCALING_KEYS",
    "SAMPLING",
    "VERBS",
    "WITH_VALUES",
    "ChatConfig",
    "CheckpointConfig",
    "CleanConfig",
    "CompressConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "InspectConfig",
    "JobConfig",
    "LaunchConfig",
    "LayoutListConfig",
    "LayoutsConfig",
    "LoraConfig",
    "MergeConfig",
    "MethodConfig",
    "ModelConfig",
    "OpenDataConfig",
    "OpenEngineConfig",
    "OpenLaunchConfig",
    "OpenParallelConfig",
    "OpenTrainLoopConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PrepareConfig",
    "PrepareLaunchConfig",
    "ReportConfig",
    "ResilienceConfig",
    "RunConfig",
    "ServeConfig",
    "ServeGroup",
    "TokenizerConfig",
    "TokenizersConfig",
    "TrackingConfig",
    "TrainConfig",
    "TrainLoopConfig",
    "TrainTokenizerConfig",
    "TuneConfig",
    "key",
    "walk",
]
