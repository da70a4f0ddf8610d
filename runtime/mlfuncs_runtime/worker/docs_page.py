"""The page at /docs: what the endpoint takes and gives, with an example and a form to try it. No network needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem}h2{margin-top:2rem;font-size:1.2rem}
code,pre,textarea{font:14px/1.45 ui-monospace,monospace}
pre,textarea{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow:auto}
textarea{width:100%;box-sizing:border-box;min-height:8rem;color:inherit}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.4rem .6rem;
border-bottom:1px solid var(--line);vertical-align:top}
button{font:inherit;padding:.4rem 1.2rem;border-radius:6px;border:1px solid var(--line);cursor:pointer}
.status{font-weight:600}
"""

_SCRIPT = """
const find=id=>document.getElementById(id);
const form=find("try"),out=find("answer"),status=find("status");
const base=location.pathname.replace(/docs\\/?$/,"");
find("curl").textContent=find("curl").textContent.replace("URL",location.origin+base);
form.addEventListener("submit",async event=>{
  event.preventDefault();status.textContent="waiting for the answer";out.textContent="";
  const started=performance.now();
  try{
    const answer=await fetch(base,{method:"POST",headers:{"Content-Type":"application/json"},body:form.body.value});
    const text=await answer.text();
    status.textContent=answer.status+" in "+Math.round(performance.now()-started)+" ms";
    try{out.textContent=JSON.stringify(JSON.parse(text),null,2)}catch{out.textContent=text}
  }catch(error){status.textContent="no answer: "+error.message}
});
"""


def render(document: Mapping[str, Any]) -> bytes:
    """The page for an OpenAPI 3.1 document whose operation is POST /."""
    info = document.get("info", {})
    operation = _operation(document)
    body = _resolve(document, _media_schema(operation.get("requestBody", {})))
    answer = _resolve(document, _media_schema(operation.get("responses", {}).get("200", {})))
    example = json.dumps(example_of(document, body), indent=2)
    title = escape(str(info.get("title", "endpoint")))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{title}</h1><p>version {escape(str(info.get('version', '')))} · ",
        "<a href='openapi.json'>openapi.json</a></p>",
        f"<p>{escape(str(info.get('description') or operation.get('description') or ''))}</p>",
        "<h2 id='in'>It takes</h2>",
        _fields(document, body),
        "<h2 id='out'>It gives</h2>",
        f"<p><code>{escape(type_of(document, answer))}</code></p>",
        "<h2>Try it</h2><form id='try'><label for='body'>Request body (JSON)</label>",
        f"<textarea id='body' name='body' spellcheck='false'>{escape(example)}</textarea>",
        "<p><button type='submit'>Send</button></p></form>",
        "<p id='status' class='status' role='status' aria-live='polite'></p>",
        "<pre id='answer' aria-label='Answer' tabindex='0'></pre>",
        "<h2>From a terminal</h2><pre id='curl'>",
        escape(f"curl -s URL -H 'Content-Type: application/json' -d '{json.dumps(json.loads(example))}'"),
        f"</pre></main><script>{_SCRIPT}</script></body></html>",
    ]
    return "".join(parts).encode()


def example_of(document: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 0) -> Any:
    """A value that the schema allows: its own example or default first, else the simplest of its type."""
    schema = _resolve(document, schema)
    for key in ("example", "default", "const"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return example_of(document, schema[key][0], depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        properties = {} if depth > 6 else schema.get("properties", {})
        return {name: example_of(document, inner, depth + 1) for name, inner in properties.items()}
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * max(1, schema.get("minItems", 1))
        return [example_of(document, item if isinstance(item, dict) else {}, depth + 1) for item in items]
    return _SIMPLEST.get((kind, schema.get("format")), _SIMPLEST.get((kind, None)))


_SIMPLEST: dict[tuple[str | None, str | None], Any] = {
    ("number", None): 0.5,
    ("integer", None): 1,
    ("boolean", None): True,
    ("string", None): "text",
    ("string", "date-time"): "2026-01-31T12:00:00Z",
    ("string", "date"): "2026-01-31",
    ("string", "uuid"): "00000000-0000-4000-8000-000000000000",
}


def type_of(document: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 0) -> str:
    """The schema as a short type, like "list of list of number".

    >>> type_of({}, {"type": "array", "items": {"type": "number"}})
    'list of number'
    """
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    schema = _resolve(document, schema)
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema and depth < 6:
            return " or ".join(type_of(document, inner, depth + 1) for inner in schema[key])
    kind = schema.get("type", "any value")
    if kind == "array" and isinstance(schema.get("items"), dict) and depth < 6:
        return "list of " + type_of(document, schema["items"], depth + 1)
    if kind == "object" and (name or schema.get("title")):
        return name or str(schema["title"])
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _fields(document: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    properties = schema.get("properties")
    if not properties:
        return f"<p><code>{escape(type_of(document, schema))}</code></p>"
    required = set(schema.get("required", ()))
    rows = []
    for name, inner in properties.items():
        resolved = _resolve(document, inner)
        default = (
            f"default <code>{escape(json.dumps(resolved['default']))}</code>" if "default" in resolved else "optional"
        )
        rows.append(
            f"<tr><th scope='row'><code>{escape(name)}</code></th><td>{escape(type_of(document, inner))}</td>"
            f"<td>{'required' if name in required else default}</td>"
            f"<td>{escape(str(resolved.get('description', '')))}</td></tr>"
        )
    head = "".join(f"<th scope='col'>{text}</th>" for text in ("field", "type", "needed", "meaning"))
    return f"<table aria-labelledby='in'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _operation(document: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((item["post"] for item in document.get("paths", {}).values() if "post" in item), {})


def _media_schema(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    content = holder.get("content", {})
    media: Mapping[str, Any] = content.get("application/json") or next(iter(content.values()), {})
    return media.get("schema", {})


def _resolve(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    seen = 0
    while "$ref" in schema and seen < 8:
        target: Any = document
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(target, Mapping) else {}
        schema, seen = target, seen + 1
    return schema
