"""The files with which a server is deployed: real linters accept them, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml

from megatrain.config import ServeGroup
from megatrain.config.key import walk

ROOT = Path(__file__).resolve().parents[3]
PLACE = ROOT / "tools" / "serve"
FILES = {path.name: path.read_text() for path in PLACE.iterdir()}


def copied():
    """Return what the image gets of the sources."""
    lines = re.findall(r"^COPY (.+) \S+$", FILES["Dockerfile"], flags=re.MULTILINE)
    return [ROOT / source for line in lines for source in line.split()]


def manifests():
    return {found["kind"]: found for found in yaml.safe_load_all(FILES["kubernetes.yaml"])}


def test_hadolint_accepts_the_dockerfile_and_it_copies_what_there_is():
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([lint, PLACE / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert copied() and all(path.exists() for path in copied())


def test_the_image_has_the_target_of_every_link_that_it_copies():
    copies = re.findall(r"^COPY (.+) (\S+)$", FILES["Dockerfile"], flags=re.MULTILINE)
    assert all(target in (sources, "./") for sources, target in copies), "what is copied must keep its place"
    places = [path for folder in copied() for path in [folder, *folder.rglob("*")]]
    links = {path.relative_to(ROOT): path.resolve() for path in places if path.is_symlink()}
    assert Path("megatrain/conf") in links
    lost = [f"{link} -> {to}" for link, to in links.items() if not any(to.is_relative_to(one) for one in copied())]
    assert not lost


def test_the_image_is_built_without_what_is_large():
    assert {".git", ".venv", "data", "runs"} <= set((ROOT / ".dockerignore").read_text().splitlines())


def test_kubernetes_accepts_the_manifests():
    for manifest in manifests().values():
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_manifests_agree_with_the_server_and_with_one_another():
    keys = {f"serve.{name}" for name in walk(ServeGroup)}
    words = re.findall(r"serve\.\w+", " ".join(FILES.values()))
    assert len(words) > 10 and set(words) <= keys
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    server = pod["containers"][0]
    grace = int(next(word for word in server["args"] if word.startswith("serve.grace_s=")).partition("=")[2])
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > grace + pause
    metric = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f'"{metric}"' in (ROOT / "megatrain/inference/serving_metrics.py").read_text()
    probes = {server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {"/health", "/ready"}
    timeout = int(re.search(r"proxy_read_timeout (\d+)s", FILES["nginx.conf"]).group(1))
    assert timeout > ServeGroup().timeout_s
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in FILES["nginx.conf"]
    compose = yaml.safe_load(FILES["compose.yaml"])
    services, subnet = compose["services"], compose["networks"]["default"]["ipam"]["config"][0]["subnet"]
    assert f"serve.trusted_proxies=[{subnet}]" in services["server"]["command"]
    assert services["server"]["deploy"]["replicas"] > 1 and "./nginx.conf:" in services["proxy"]["volumes"][0]
