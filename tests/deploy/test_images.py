"""The Dockerfiles say the same as the recipe by which tests make the image of their cluster."""

from __future__ import annotations

import re

import pytest

from checks.kubernetes.cluster import images
from tests.deploy.manifests import DEPLOY, ROOT

DOCKERFILES = ("Dockerfile", "Dockerfile.vllm")


def final_stage(name: str) -> str:
    text = (DEPLOY / "docker" / name).read_text(encoding="utf-8")
    return text[text.rindex("\nFROM ") :].replace("\\\n", " ")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_both_images_run_penstock_as_the_tests_image_does(name: str) -> None:
    stage = final_stage(name)
    assert re.findall(r"^USER (.+)$", stage, re.MULTILINE)[-1] == images.PENSTOCK_USER
    assert f"--uid {images.PENSTOCK_USER}" in stage
    assert 'ENTRYPOINT ["penstock"]' in stage
    assert "COPY models/tiny /models/tiny" in stage
    [environment] = re.findall(r"^ENV (.+)$", stage, re.MULTILINE)
    assert {"PYTHONUNBUFFERED=1", "HOME=/tmp"} <= set(environment.split())
    installed = set(re.findall(r"[\w-]+", stage.partition("install --yes")[2].partition("&&")[0]))
    # What probes in manifests call.
    assert {"curl", "jq", "ca-certificates"} <= installed & {*images.BASE_PACKAGES}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_both_images_have_the_extras_of_the_tests_image(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text(encoding="utf-8")
    [extras] = re.findall(r'"/source\[([a-z,]+)\]"', text)
    assert set(images.EXTRAS) <= set(extras.split(","))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_not_ignored(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [line.split()[1:-1] for line in text.splitlines() if re.match(r"COPY (?!--from)", line)]
    assert {f"!{source}" for sources in copied for source in sources} == {
        line for line in ignored if line.startswith("!")
    }
