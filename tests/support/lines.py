"""Checkpoints without weights that say which models they were made from, for tests of lineage."""

from megatrain.checkpoint import lineage
from megatrain.checkpoint.manifest import Identity, Manifest, Progress, read_manifest, write_manifest


def make_checkpoint(folder, name, *parents, method="sft", step=5, made_from=None):
    """Write the manifest of a model that was made from the checkpoints `parents`, and return its folder."""
    folder.mkdir(parents=True)
    lines = [lineage.line_of(parent, read_manifest(parent)) for parent in parents]
    config = {"run": {"name": name}, "method": {"name": method}, "data": {"name": f"{name}-data", "dir": "data"}}
    ancestors = lineage.joined(lines)
    identity = Identity(config, "f" * 32, {"dp": 1}, "native", ancestors=ancestors, made_from=made_from)
    write_manifest(folder, Manifest(progress=Progress(step=step), identity=identity))
    return folder


def make_run(place, name, *parents, **options):
    """Write the folder of a run with one checkpoint, and return that checkpoint."""
    step = options.get("step", 5)
    folder = make_checkpoint(place / name / "checkpoints" / f"step_{step:08d}", name, *parents, **options)
    (place / name / "config.yaml").touch()
    return folder
