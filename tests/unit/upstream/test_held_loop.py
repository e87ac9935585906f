"""A loop that was held for longer than a deadline: what came in time is not called late."""

from __future__ import annotations

import asyncio
import socket
import time

from proxyd.upstream.readiness import Readiness, Ready


def test_a_descriptor_that_was_ready_before_the_loop_came_to_it_is_ready_though_the_timer_is_due() -> None:
    async def run() -> None:
        left, right = socket.socketpair()
        with left, right:
            loop = asyncio.get_running_loop()
            waiting = loop.create_task(Readiness(loop, left.fileno()).wait(Ready.READ, 0.02))
            await asyncio.sleep(0)
            right.send(b"in time")
            time.sleep(0.05)  # the loop is held
            assert await waiting is Ready.READ
            left.recv(100)
            assert await Readiness(loop, left.fileno()).wait(Ready.READ, 0.02) is Ready.NEITHER

    asyncio.run(run())


def test_a_deadline_that_has_passed_before_the_wait_began_still_looks_once() -> None:
    async def run() -> None:
        left, right = socket.socketpair()
        with left, right:
            loop = asyncio.get_running_loop()
            assert await Readiness(loop, left.fileno()).wait(Ready.WRITE, -1.0) is Ready.WRITE
            assert await Readiness(loop, left.fileno()).wait(Ready.READ, -1.0) is Ready.NEITHER
            right.close()
            assert await Readiness(loop, left.fileno()).wait(Ready.READ, 0.0) is Ready.READ

    asyncio.run(run())
