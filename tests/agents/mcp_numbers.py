"""An MCP server with one tool, on standard input and output: what the protocol has one need, and no library."""

from __future__ import annotations

import json
import sys
from typing import Any

TOOL = {
    "name": "lucky_number",
    "description": "Return the lucky number of a person.",
    "inputSchema": {"type": "object", "properties": {"person": {"type": "string"}}, "required": ["person"]},
}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the result of one request."""
    if method == "initialize":
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "numbers", "version": "1"},
        }
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        text = f"{params['arguments']['person']} has 4711"
        return {"content": [{"type": "text", "text": text}], "isError": False}
    return {}


for line in sys.stdin:
    message = json.loads(line)
    if "id" in message and "method" in message:
        reply = {"jsonrpc": "2.0", "id": message["id"]}
        if message["method"] in ("initialize", "ping", "tools/list", "tools/call"):
            reply["result"] = answer(message["method"], message.get("params") or {})
        else:
            reply["error"] = {"code": -32601, "message": "there is no such method"}
        print(json.dumps(reply), flush=True)
