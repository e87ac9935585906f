"""Drives the Python SDKs, synchronous and asynchronous, through the session; a program of its own.

Reads one JSON document: {"sdk", "ways": {name: {"base_url", "api_key", "keys"}}, "steps": [...]}; writes one JSON line
a step and way: what was returned, yielded or raised, without anything of time. The ways go on side by side.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

LONG = 2000
_output = threading.Lock()


def plain(value: Any) -> Any:
    """An SDK's object as the JSON it came from; only what was set, so that an absent field is not a null one."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json", exclude_unset=True, warnings=False)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return plain(value.decode("latin-1"))
    if isinstance(value, str) and len(value) > LONG:
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{value[:40]}... {len(value)} characters, {digest}"
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def headers_of(response: Any) -> Any:
    return None if response is None else dict(sorted((k.lower(), v) for k, v in response.headers.multi_items()))


def raised(error: BaseException) -> dict[str, Any]:
    """What a caller can learn of an exception."""
    known = {
        "class": f"{type(error).__module__.partition('.')[0]}.{type(error).__name__}",
        "message": plain(str(error)),
    }
    for name in ("status_code", "code", "type", "param", "request_id", "body"):
        if hasattr(error, name):
            known[name] = plain(getattr(error, name))
    if known["class"].startswith(("openai.", "anthropic.")) and hasattr(error, "response"):
        known["headers"] = headers_of(error.response)
    if error.__cause__ is not None:
        known["cause"] = type(error.__cause__).__name__
    return known


async def settle(value: Any) -> Any:
    return await value if asyncio.iscoroutine(value) else value


async def items(stream: Any) -> AsyncIterator[Any]:
    """The items of a stream of either kind."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item


async def enter(manager: Any) -> Any:
    return await manager.__aenter__() if hasattr(manager, "__aenter__") else manager.__enter__()


async def leave(manager: Any) -> None:
    await settle(
        manager.__aexit__(None, None, None) if hasattr(manager, "__aexit__") else manager.__exit__(None, None, None)
    )


def resource(client: Any, call: str) -> Any:
    return (
        client.chat.completions
        if call == "chat"
        else client.messages
        if call == "count_tokens"
        else getattr(client, call)
    )


async def take(
    step: dict[str, Any], client: Any, keys: dict[str, str], marks: dict[str, str], seen: dict[str, Any]
) -> None:
    """One step; what it gives goes into `seen` as it comes, so that an exception keeps what was before it."""
    call, how = step["call"], step["how"]
    params = dict(step["params"])
    params["extra_headers"] = {**params.get("extra_headers", {}), **marks}
    options = dict(step["options"])
    if "timeout_s" in options:
        options["timeout"] = options.pop("timeout_s")
    if "key" in options:
        options["api_key"] = keys[options.pop("key")]
    target = resource(client.with_options(**options) if options else client, call)
    if call == "models":
        seen["value"] = [plain(model) async for model in items(await settle(target.list(extra_headers=marks)))]
    elif call == "count_tokens":
        seen["value"] = plain(await settle(target.count_tokens(**params)))
    elif how == "whole":
        value = await settle(target.create(**params))
        seen["value"] = plain(value)
        seen["request_id"] = getattr(value, "_request_id", None)
    elif how == "raw":
        response = await settle(target.with_raw_response.create(**params))
        seen["headers"] = headers_of(response)
        seen["value"] = plain(await settle(response.parse()))
    elif how == "helper":
        manager = target.stream(**params)
        stream = await enter(manager)
        try:
            seen["events"] = [plain(event) async for event in items(stream)]
            final = {"chat": "get_final_completion", "responses": "get_final_response", "messages": "get_final_message"}
            seen["value"] = plain(await settle(getattr(stream, final[call])()))
        finally:
            await leave(manager)
    else:
        stream = await settle(target.create(stream=True, **params))
        seen["headers"] = headers_of(stream.response)
        events = seen["events"] = []
        count = 0
        async for event in items(stream):
            count += 1
            if count <= 400:
                events.append(plain(event))
            if how == "break" and count == 2:
                break
        seen["count"] = count
        await settle(stream.close())


async def walk(sdk: str, way: str, where: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """The whole session of one way."""
    if sdk.startswith("openai"):
        import openai as module

        make = module.AsyncOpenAI if sdk.endswith("async") else module.OpenAI
    else:
        import anthropic as module  # type: ignore[no-redef]

        make = module.AsyncAnthropic if sdk.endswith("async") else module.Anthropic  # type: ignore[attr-defined]
    client = make(base_url=where["base_url"], api_key=where["api_key"])
    for step in steps:
        seen: dict[str, Any] = {}
        try:
            await take(step, client, where["keys"], {"x-step": f"{sdk}|{way}|{step['name']}"}, seen)
        except Exception as error:
            seen["raised"] = raised(error)
        with _output:
            print(json.dumps({"way": way, "step": step["name"], "seen": seen}), flush=True)
    await settle(client.close())


async def together(plan: dict[str, Any]) -> None:
    await asyncio.gather(*(walk(plan["sdk"], way, where, plan["steps"]) for way, where in plan["ways"].items()))


def main() -> None:
    plan = json.load(sys.stdin)
    if plan["sdk"].endswith("async"):
        asyncio.run(together(plan))
        return
    walks = [
        threading.Thread(target=asyncio.run, args=(walk(plan["sdk"], way, where, plan["steps"]),))
        for way, where in plan["ways"].items()
    ]
    for one in walks:
        one.start()
    for one in walks:
        one.join()


if __name__ == "__main__":
    main()
