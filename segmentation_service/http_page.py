"""The page /docs: addresses and fields out of the OpenAPI schema, without scripts, so that it needs no other server."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """body{font:15px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}
code{background:#8882;padding:0 .2em} td{padding:.1em .8em .1em 0;vertical-align:top}"""


def page(schema: dict[str, Any]) -> str:
    """HTML for an OpenAPI schema such as FastAPI's `app.openapi()`."""
    return "\n".join(_lines(schema))


def _lines(schema: dict[str, Any]) -> Iterator[str]:
    info = schema["info"]
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title><style>{_STYLE}</style>"
    yield f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])} The whole schema: <a href=openapi.json>openapi.json</a>.</p>"
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(about.get('description', ''))}</p>"
            yield from _body(about)
            yield from _table((status, answer["description"]) for status, answer in about["responses"].items())
    for name, about in schema["components"]["schemas"].items():
        yield f"<h2>{escape(name)}</h2><p>{escape(about.get('description', ''))}</p>"
        yield from _table((field, " ".join(filter(None, [_type(f) + ".", f.get("description")]))) for field, f in about.get("properties", {}).items())


def _body(about: dict[str, Any]) -> Iterator[str]:
    for kind, content in about.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body: {escape(_type(content['schema']))} as <code>{escape(kind)}</code></p>"


def _table(rows: Any) -> Iterator[str]:
    yield "<table>" + "".join(f"<tr><td><code>{escape(a)}</code><td>{escape(b)}" for a, b in rows) + "</table>"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "prefixItems" in schema:
        return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return str(schema.get("enum", schema.get("type", "any")))
