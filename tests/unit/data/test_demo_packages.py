"""Packages come from the user's own pip and npm, whole and as they were pinned, or not at all."""

import dataclasses
import zipfile

import pytest
from support.packages import make_tarball, make_wheel, pip_reads_only, sha256_of

from megatrain.data.demo import packages
from megatrain.data.demo.packages import Package, fetch, opened
from megatrain.errors import DataError, EnvironmentFault


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    pip_reads_only(monkeypatch, folder)
    wheel = make_wheel(folder, "some-texts", "1.2", {"some_texts/a.md": "text", "some_texts/b.py": "1"})
    make_wheel(folder, "some-texts", "1.3", {"some_texts/a.md": "newer"})
    return folder, Package("pip", "some-texts", "1.2", "MIT", sha256_of(wheel), 0.1)


def test_a_package_is_fetched_once_and_has_the_pinned_hash(index, tmp_path, capfd):
    folder, package = index
    archive = fetch(package, tmp_path / "packages")
    assert sha256_of(archive) == package.sha256
    assert "fetching some-texts 1.2 (0.1 MB) with pip" in capfd.readouterr().err
    for path in folder.iterdir():
        path.unlink()
    assert fetch(package, tmp_path / "packages") == archive
    assert capfd.readouterr().err == ""


def test_an_archive_that_was_cut_is_fetched_again(index, tmp_path, capfd):
    _, package = index
    archive = fetch(package, tmp_path / "packages")
    archive.write_bytes(archive.read_bytes()[:-7])
    assert sha256_of(fetch(package, tmp_path / "packages")) == package.sha256
    assert "was changed or cut" in capfd.readouterr().err


def test_another_file_under_the_pinned_version_is_refused_and_not_kept(index, tmp_path):
    _, package = index
    other = dataclasses.replace(package, sha256="0" * 64)
    with pytest.raises(DataError, match=f"SHA-256 {package.sha256}, expected {'0' * 64}.*pip config list"):
        fetch(other, tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_package_that_pip_cannot_get_is_one_message_that_says_what_to_do(index, tmp_path):
    _, package = index
    missing = dataclasses.replace(package, name="no-such-texts")
    with pytest.raises(
        EnvironmentFault, match=r"no-such-texts 1\.2 could not be fetched with pip \(ERROR: No matching"
    ) as raised:
        fetch(missing, tmp_path / "packages")
    assert "check the network and pip's configuration (pip config list)" in str(raised.value)
    assert raised.value.exit_code == 8 and "\n" not in str(raised.value)
    assert list((tmp_path / "packages").iterdir()) == []


def test_what_a_killed_fetch_left_is_removed(index, tmp_path):
    _, package = index
    left = tmp_path / "packages" / ".fetching-killed" / "some_texts-1.2-py3-none-any.whl"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"PK half of it")
    fetch(package, tmp_path / "packages")
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["some-texts-1.2.whl"]


def test_a_fetch_without_end_is_given_up(index, tmp_path, monkeypatch):
    _, package = index
    monkeypatch.setattr(packages, "LIMIT_S", 0.01)
    with pytest.raises(EnvironmentFault, match=r"no end after 0\.01 s"):
        fetch(package, tmp_path / "packages")


def fake_npm(tmp_path, monkeypatch, script):
    """Put a program named npm on the path, alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_npm_packs_a_pinned_version_without_its_scripts(tmp_path, monkeypatch):
    tarball = make_tarball(tmp_path / "poems-2.0.1.tgz", {"package/a.json": b"[]", "package/b.txt": b"b"})
    said = tmp_path / "said"
    fake_npm(tmp_path, monkeypatch, f'echo "$@" > {said}\n/bin/cp {tarball} "$5"')
    package = Package("npm", "poems", "2.0.1", "MIT", sha256_of(tarball), 0.1)
    archive = fetch(package, tmp_path / "packages")
    words = said.read_text().split()
    assert words[:4] == ["pack", "--silent", "--ignore-scripts", "--pack-destination"] and words[-1] == "poems@2.0.1"
    with opened(archive) as files:
        assert list(files.names("*")) == ["package/a.json", "package/b.txt"]
        assert files.read("package/b.txt") == b"b"


def test_npm_that_fails_is_quoted_by_its_first_error(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, "echo 'npm error code ENOTFOUND' >&2\necho 'npm error a log is in /x' >&2\nexit 1")
    with pytest.raises(EnvironmentFault, match=r"with npm \(npm error code ENOTFOUND\); .*npm config get registry"):
        fetch(Package("npm", "poems", "2.0.1", "MIT", "", 0.1), tmp_path / "packages")


def test_without_npm_its_packages_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"npm is not installed: install Node\.js, or leave the sources"):
        fetch(Package("npm", "poems", "2.0.1", "MIT", "", 0.1), tmp_path / "packages")


def test_without_pip_the_message_says_how_to_get_it(index, tmp_path, monkeypatch):
    _, package = index
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="-m ensurepip"):
        fetch(package, tmp_path / "packages")


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "a\nb"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    path = tmp_path / "bad-1.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(name), b"evil")
    with opened(path) as archive, pytest.raises(DataError, match="is not unpacked"):
        list(archive.names("*"))


def test_links_in_a_tarball_are_not_followed(tmp_path):
    import tarfile

    path = tmp_path / "bad-1.tgz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("package/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with opened(path) as archive:
        assert list(archive.names("*")) == []


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "bad-1.whl"
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a package"), opened(path):
        pass
