"""Who knocks with a token that is none is answered after those whom we know, and is answered all the same."""

from __future__ import annotations

import os

from proxyd.errors import Refusal
from proxyd.front.connection import ClientConnection
from proxyd.front.door import SUSPECTS_A_TURN
from proxyd.front.request import Request
from tests.daemon.front_house import Client, house, on_uvloop

KNOCKING = 40


def send(client: Client, body: bytes) -> None:
    """At once, not when the loop comes round to it."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    os.write(client.writer.get_extra_info("socket").fileno(), head + body)


@on_uvloop
async def test_a_flood_of_bad_tokens_adds_a_bounded_number_of_requests_to_a_turn() -> None:
    served: list[bytes] = []

    def serve(conn: ClientConnection, request: Request) -> None:
        served.append(request.body)
        if request.body == b"forged":
            raise Refusal(403, "invalid_token", "no")
        conn.reply(200, [], b"")

    async with house(serve) as built:
        knocking = [await built.connect() for _ in range(KNOCKING)]
        known = await built.connect()
        for client in knocking:
            send(client, b"forged")
        for client in knocking:
            assert (await client.answer())[0] == 403
        served.clear()
        for client in knocking:
            send(client, b"forged")
        send(known, b"good")  # the last to come
        assert (await known.answer())[0] == 200
        assert served.index(b"good") <= 2 * SUSPECTS_A_TURN
        for client in knocking:
            assert (await client.answer())[0] == 403
        assert len(served) == KNOCKING + 1


@on_uvloop
async def test_one_that_brings_a_good_token_is_no_suspect_any_more() -> None:
    def serve(conn: ClientConnection, request: Request) -> None:
        if request.body == b"forged":
            raise Refusal(401, "missing_token", "no")
        conn.reply(200, [], b"")

    async with house(serve) as built:
        client = await built.connect()
        for body, status in ((b"forged", 401), (b"good", 200), (b"forged", 401), (b"good", 200)):
            send(client, body)
            assert (await client.answer())[0] == status
            assert next(iter(built.door.connections))._is_suspect is (status == 401)
