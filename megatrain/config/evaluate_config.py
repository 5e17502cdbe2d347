"""The config of `megatrain evaluate`. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from megatrain.config.key import key

STEP_HELP = "step of the run's checkpoint to take; null takes the newest intact one"
ENSEMBLE_HELP = "further models of the same tokenizer (as path); the probabilities of all are averaged"


@dataclass
class EvaluateConfig:
    """`megatrain evaluate <run | checkpoint> ...`: score models by their loss on text, on tasks or on your examples."""

    path: str = key(MISSING, "run folder, checkpoint folder or Hugging Face folder", path=True)
    paths: list[str] = key([], "more of these, to compare with path: megatrain evaluate runs/a runs/b", path=True)
    step: int | None = key(None, STEP_HELP, minimum=0)
    ensemble: list[str] = key([], ENSEMBLE_HELP, path=True)
    data: str | None = key(None, "prepared dataset folder or text file; null means the run's own dataset", path=True)
    split: str = key("heldout", "split of a prepared dataset to evaluate on", choices=("train", "heldout"))
    seq_len: int | None = key(
        None, "tokens per sequence; null means the value of training, or else model.max_seq_len", minimum=1
    )
    batch_size: int = key(8, "sequences evaluated at once", minimum=1)
    max_batches: int | None = key(None, "largest number of batches to evaluate; null evaluates all", minimum=1)
    tasks: list[str] = key(
        [], "tasks of lm-evaluation-harness, by name or pattern (needs megatrain[evaluate]), in place of the loss"
    )
    tasks_dir: str | None = key(
        None, "folder of task files (.yaml) of your own; without tasks, all that it holds are evaluated", path=True
    )
    num_fewshot: int | None = key(
        None, "solved examples before each question of a task; null means what the task says", minimum=0
    )
    examples: str | None = key(
        None, "file of JSON lines with prompt and label, for classification or extraction", path=True
    )
    answer: str = key(
        "label",
        "what a model's answer to examples is: label, the likeliest of the file's labels; written, what it writes, as "
        "a label; text, what it writes, compared word by word",
        choices=("label", "written", "text"),
    )
    prompts: str | None = key(
        None,
        "file of JSON lines with prompt, for the win rate of path against each of paths, or its score without",
        path=True,
    )
    judge: str | None = key(
        None, "what scores replies to prompts: an embedded reward, module:function, path.py:function or a reward model"
    )
    temperature: float = key(0.0, "softmax temperature of replies to prompts; 0 is greedy", minimum=0)
    max_new_tokens: int = key(64, "largest number of tokens that a model writes as an answer", minimum=1)
    contamination: bool = key(
        False, "count the texts of tasks or examples that the run's training data hold too, which are read in full"
    )
    limit: int | None = key(None, "documents, examples or prompts to read, the first ones; null reads all", minimum=1)
    chat_template: str = key(
        "auto",
        "lay out questions by the tokenizer's chat template: auto, where it has one; always; never",
        choices=("auto", "always", "never"),
    )
    system: str | None = key(None, "system message before the questions, with a chat template")
    seed: int = key(1234, "seed of the solved examples, of sampled answers and of the bootstrap", minimum=0)
    out: str | None = key(None, "JSON file for the results, with each document's answer", path=True)
    page: str | None = key(None, "HTML page to write, with the scores of all models side by side", path=True)
    device: str = key("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
