"""An OpenAPI document of the public routes, from the same structs that decode their bodies."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from synthia_vllm.api.base import AnsweringApi, GeneratingApi
from synthia_vllm.api.errors import anthropic_form

PATH = "/openapi.json"
_COMPONENTS = "#/components/schemas/{name}"
_TEXT, _OR_NONE = {"type": "string"}, {"type": ["string", "null"]}
_ERRORS = {
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": _TEXT, "type": _TEXT, "param": _OR_NONE, "code": _OR_NONE},
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
            "request_id": _OR_NONE,
        },
    },
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

Document = dict[str, Any]


def document(
    version: str,
    generating: Sequence[GeneratingApi],
    answering: Sequence[AnsweringApi],
    *others: Mapping[str, Any],
    keys_required: bool,
) -> Document:
    """OpenAPI 3.1. `others` are documents of FastAPI apps, whose routes and schemas come along."""
    apis: list[GeneratingApi | AnsweringApi] = [*generating, *answering]
    references, schemas = msgspec.json.schema_components([api.body for api in apis], ref_template=_COMPONENTS)
    paths: Document = {
        api.path: {"post": _route(api, reference, streams=api in generating)}
        for api, reference in zip(apis, references, strict=True)
    }
    paths["/v1/models"] = {"get": _plain("The models, in the form of OpenAI or, with `anthropic-version`, Anthropic.")}
    paths["/v1/models/{model}"] = {"get": _plain("One of them.") | {"parameters": [_in_path("model")]}}
    for name, about in (("/health", "The process lives."), ("/ready", "The engine generates, and stores answer.")):
        paths[name] = {"get": _plain(about) | {"security": []}}
    for other in others:
        paths |= other["paths"]
        schemas |= other.get("components", {}).get("schemas", {})
    return {
        "openapi": "3.1.0",
        "info": {"title": "synthia-vllm", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas, **_ERRORS}, "securitySchemes": _KEYS},
        "security": [{name: []} for name in _KEYS] if keys_required else [],
    }


def _route(api: GeneratingApi | AnsweringApi, reference: Document, *, streams: bool) -> Document:
    content: Document = {"application/json": {"schema": {"type": "object"}}}
    about = ""
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
        about = "The reply, as events where `stream` is true"
    return {
        "summary": (inspect.getdoc(type(api)) or "").partition("\n")[0],
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": {
            "200": {
                "description": about,
                "content": content,
            },
            **_refusals("AnthropicError" if api.form is anthropic_form else "OpenAIError"),
        },
    }


def _plain(about: str) -> Document:
    return {"summary": about, "responses": {"200": {"description": ""}, **_refusals("OpenAIError")}}


def _refusals(error: str) -> Document:
    schema = {"$ref": _COMPONENTS.format(name=error)}
    return {
        kind: {"description": about, "content": {"application/json": {"schema": schema}}}
        for kind, about in (("4XX", "What is wrong with the request"), ("5XX", "Come again after `Retry-After`"))
    }


def _in_path(name: str) -> Document:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}
