"""A cleaning recipe: the steps that `clean.steps` lists, in order, and what they did to a corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

import xxhash

from megatrain.config.compose import check_value
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import describe, fits, kind_of, misfit
from megatrain.data.corpus.document import Document, Step
from megatrain.data.corpus.steps.personal_data import PersonalData
from megatrain.data.corpus.steps.registry import STEPS
from megatrain.errors import ConfigError

EXAMPLES = 5
"""Documents kept to look at, of each rule that removes some and of each step that changes some."""
_EXCERPT = 2000  # characters of each


def build_recipe(steps: Sequence[Any]) -> tuple[Step, ...]:
    """Make the steps that `clean.steps` lists: each a name, or a mapping of a name to parameters.

    Raises ConfigError with the place in the list, what was given and what would work.
    """
    return tuple(_build(f"clean.steps[{place}]", entry) for place, entry in enumerate(steps))


def _build(place: str, entry: Any) -> Step:
    name, parameters = (entry, {}) if isinstance(entry, str) else _single(place, entry)
    if name not in STEPS:
        hint = did_you_mean("", name, list(STEPS))
        raise ConfigError(f"{place}: unknown step {name}{hint} (steps: {', '.join(sorted(STEPS))})")
    kind = STEPS[name]
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # every step is a dataclass
    for key, value in parameters.items():
        if key not in known:
            hint = did_you_mean("", key, list(known))
            listed = ", ".join(known) or "none"
            raise ConfigError(f"{place}: {name} has no parameter {key}{hint} (parameters: {listed})")
        if not fits(hints[key], value):
            expected = describe(hints[key])
            raise ConfigError(f"{place}: {name}.{key}={value}: expected {expected}, given {misfit(hints[key], value)}")
        check_value(f"{place}: {name}.{key}", value, known[key].metadata)
    step = kind(**parameters)
    for low in known:
        high = low.replace("min_", "max_", 1)
        if low.startswith("min_") and high in known:
            least, most = getattr(step, low), getattr(step, high)
            if least is not None and most is not None and least > most:
                raise ConfigError(f"{place}: {name}.{low}={least} is above {name}.{high}={most}; no value is allowed")
    return step


def _single(place: str, entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the parameters of an entry with parameters."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, parameters),) = entry.items()
        if parameters is None or isinstance(parameters, dict):
            return str(name), parameters or {}
    raise ConfigError(
        f"{place}: {entry}: expected the name of a step, or {{name: {{parameter: value}}}}, given {kind_of(entry)}"
    )


def settings_of(recipe: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the steps with all their parameters, defaults included: what determines a recipe's result."""
    return [{step.name: step.settings()} for step in recipe]


@dataclass
class StepReport:
    """What a step did: documents and bytes that came and that stayed, documents it changed, removals by rule, changes.

    `added` of those that stayed are originals beside their augmented documents.

    `examples` are documents that it removed (with `rule` and `detail`) or changed (with the text `after`), those of the
    lowest draws, so they do not depend on how the work was divided. They have the text `before`, unless the step hides
    it (`Step.shows_before`). If the recipe masks personal data, they are masked too, whatever the step.
    """

    name: str
    documents_in: int = 0
    documents_out: int = 0
    added: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changed: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: StepReport) -> None:
        """Add what the step did to other documents."""
        for name in ("documents_in", "documents_out", "added", "bytes_in", "bytes_out", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rules = dict(Counter(self.rules) + Counter(other.rules))
        self.changes = dict(Counter(self.changes) + Counter(other.changes))
        self.examples = _fewest([*self.examples, *other.examples])

    def without_examples(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "examples"}


def new_reports(recipe: Sequence[Step]) -> list[StepReport]:
    """Return an empty report for each step."""
    return [StepReport(step.name) for step in recipe]


def add_reports(total: list[StepReport], more: Iterable[StepReport]) -> None:
    """Add reports of the same recipe, step by step."""
    for report, other in zip(total, more, strict=True):
        report.add(other)


def run_recipe(recipe: Sequence[Step], document: Document, reports: list[StepReport], seed: int) -> bool:
    """Let each step work on the document and report it; return whether it is kept.

    Where a step keeps the original beside the augmented text, the steps after it work on both; the originals are in
    `document.originals`, and those that a step removed have a `removal`.
    """
    masks = [step for step in recipe if isinstance(step, PersonalData)]
    size = _size(document.text)
    for place, (step, report) in enumerate(zip(recipe, reports, strict=True), start=1):
        before = document.text
        report.documents_in += 1
        report.bytes_in += size
        document.counts.clear()
        removal = step.apply(document)
        shown = {"before": before} if step.shows_before else {}
        if document.counts:
            report.changes = dict(Counter(report.changes) + document.counts)
        if removal is not None:
            removal = replace(removal, detail=_excerpt(removal.detail, masks))  # it may quote the text
            document.removal = report.name, removal
            report.rules[removal.rule] = report.rules.get(removal.rule, 0) + 1
            shown |= {"rule": removal.rule, "detail": removal.detail}
            _show(report, document, seed, shown, masks)
            return False
        report.documents_out += 1
        if document.original is not None:
            original, document.original = document.original, None
            report.added += 1
            report.documents_out += 1
            report.bytes_out += size
            run_recipe(recipe[place:], original, reports[place:], seed)
            document.originals += [*original.originals, original]
        if document.text is not before and document.text != before:
            size = _size(document.text)
            report.changed += 1
            _show(report, document, seed, shown | {"after": document.text}, masks)
        report.bytes_out += size
    return True


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _show(
    report: StepReport, document: Document, seed: int, what: dict[str, str], masks: Sequence[PersonalData] = ()
) -> None:
    """Keep a document as an example if its draw is among the lowest: an excerpt, masked before it is cut."""
    draw = xxhash.xxh3_64_intdigest(f"{report.name}\0{document.id}".encode(errors="surrogatepass"), seed=seed)
    kept = [example for example in report.examples if example.get("rule") == what.get("rule")]
    if len(kept) < EXAMPLES or draw < kept[-1]["draw"]:
        shown = {name: _excerpt(text, masks) for name, text in what.items()}
        report.examples = _fewest([*report.examples, {"draw": draw, "id": document.id, **shown}])


def _excerpt(text: str, masks: Sequence[PersonalData]) -> str:
    for step in masks:
        text, _ = step.mask(text)
    return text[:_EXCERPT]


def _fewest(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples of the lowest draws for each rule."""
    seen: Counter[str | None] = Counter()
    kept = []
    by_draw = sorted(examples, key=lambda example: (str(example.get("rule") or ""), example["draw"], example["id"]))
    for example in by_draw:
        seen[example.get("rule")] += 1
        if seen[example.get("rule")] <= EXAMPLES:
            kept.append(example)
    return kept
