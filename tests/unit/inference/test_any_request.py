"""Requests made up from the server's own schema find no error of the server, and no reply that the schema lacks."""

from __future__ import annotations

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.serving import LIMIT_S, make_assistant, running

torch.set_num_threads(1)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def schema():
    with running(make_assistant(), max_new_tokens=20, max_queue=500) as (_, url):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=LIMIT_S)


MADE_UP = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_finds_an_error_of_the_server(schema, mode):
    tried = []

    def ask(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "toy"  # all else would be refused for its model
        found = case.call_and_validate(checks=CHECKS, timeout=LIMIT_S)
        tried.append(found.status_code)
        if mode is GenerationMode.POSITIVE:
            assert ": only with" not in found.text, f"the schema allows {case.body}"

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue
        MADE_UP(given(case=operation.as_strategy(generation_mode=mode))(ask))()
    assert len(tried) > 15 and (200 if mode is GenerationMode.POSITIVE else 400) in tried
