"""The OpenAPI document says what the routes do, and nothing that schemathesis makes from it breaks them."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from serving_parts import AUTH, app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


def test_the_document_says_what_the_routes_do() -> None:
    with TestClient(app()) as c:
        document = c.get("/openapi.json").json()
    paths, schemas = document["paths"], document["components"]["schemas"]
    asked = paths["/v1/sentiment"]["post"]
    assert set(asked["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert set(asked["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "401", "408", "413", "415", "422", "503", "504"} <= set(asked["responses"]) and asked["security"]
    assert set(paths["/v1/sentiment/batch"]["post"]["responses"]["200"]["content"]) == {"application/x-ndjson"}
    assert set(schemas["SentimentRequest"]["properties"]) == {"id", "text", "aspect", "image", "image_key", "explain", "stream"}
    assert schemas["SentimentRequest"]["additionalProperties"] is False and "ChatRequest" in schemas and "Delta" in schemas
    assert "security" not in paths["/healthz"]["get"] and paths["/metrics"]["get"]["security"] and "/" not in paths
    refs = {r.rpartition("/")[2] for r in _refs(document)}
    assert refs <= set(schemas)


def _refs(node: Any) -> list[str]:
    if isinstance(node, dict):
        return ([node["$ref"]] if "$ref" in node else []) + [r for v in node.values() for r in _refs(v)]
    return [r for v in node for r in _refs(v)] if isinstance(node, list) else []


API = app(running=8)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]


@schemathesis.serializer("application/x-ndjson", "text/event-stream")
def lines(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", API)


@pytest.mark.parametrize("operation", [found.ok() for found in SCHEMA.get_all_operations()], ids=lambda o: o.label)
def test_nothing_made_from_the_document_breaks_it(operation: Any) -> None:
    """No 5xx, no status or content type that the document does not have, and bodies as it says."""

    @given(case=operation.as_strategy())
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def breaks_nothing(case: Any) -> None:
        case.call_and_validate(headers=AUTH, checks=CHECKS)

    breaks_nothing()
