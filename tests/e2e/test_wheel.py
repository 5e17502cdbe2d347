"""The built distributions: a wheel installed elsewhere finds its config groups, kernels and page assets without a
checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "megatrain", "conf", "kernels", "slurm")


def run(*command: object, cwd: Path, **environ: str) -> str:
    """Return a command's output; show all of it when the command fails. The checkout stays off the import path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environ, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel that pip builds from a copy of the sources (a build leaves files beside them)."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder / "dist", folder, cwd=folder)
    (built,) = (folder / "dist").glob("megatrain-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return a fresh environment with only the wheel; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=folder)
    dependencies = Path(run(sys.executable, "-c", "import torch; print(torch.__path__[0])", cwd=folder).strip()).parent
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def test_the_wheel_holds_every_module_kernel_config_file_and_page_asset(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "megatrain").rglob("*") if path.suffix == ".py"]
    files += [ROOT / "megatrain" / path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")]
    files += [ROOT / "megatrain" / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")]
    files += (ROOT / "megatrain" / "report" / "assets").iterdir()
    missing = {str(path.relative_to(ROOT)) for path in files} - held
    assert not missing
    assert "megatrain/report/assets/page.css" in held
    assert "megatrain/conf/train.yaml" in held and "megatrain/kernels/__init__.py" in held


def test_the_installed_command_composes_a_config_in_an_empty_folder(installed, tmp_path):
    shown = run(installed, "-m", "megatrain", "train", "--cfg", "model=tiny", "experiment=quickstart", cwd=tmp_path)
    assert "name: tiny" in shown
    where = "import megatrain.conf, megatrain.kernels; print(megatrain.conf.__file__, megatrain.kernels.__file__)"
    places = run(installed, "-c", where, cwd=tmp_path).split()
    assert all(Path(place).is_relative_to(installed.parent.parent) for place in places)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_writes_a_report_page(installed, tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: empty}\n")
    shown = run(installed, "-m", "megatrain", "report", tmp_path, cwd=tmp_path)
    page = Path(shown.strip()).read_text(encoding="utf-8")
    assert "function build()" in page and "--card:" in page and "{{" not in page
