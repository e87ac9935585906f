"""The table of doors and the table of states."""

from __future__ import annotations

import pytest

from proxyd.dialects.ask import Route
from proxyd.errors import Refusal
from proxyd.front.routes import Preflight, Relay, Web, decide_route
from proxyd.front.states import EDGES, State, check_edge


@pytest.mark.parametrize("route", list(Route))
def test_a_relay_route_takes_post_and_a_preflight(route: Route) -> None:
    assert decide_route("POST", route.value) == Relay(route)
    assert decide_route("OPTIONS", route.value) == Preflight(route)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("route", list(Route))
def test_a_relay_route_refuses_other_methods_and_says_which_it_takes(route: Route, method: str) -> None:
    with pytest.raises(Refusal) as refused:
        decide_route(method, route.value)
    assert refused.value.status == 405
    assert ("Allow", "POST, OPTIONS") in refused.value.headers


@pytest.mark.parametrize(
    "path",
    [
        "/", "/healthz", "/v1/models", "/v1/messages/", "//v1/messages", "/V1/messages", "/v1%2Fmessages",
        "/v1/./messages", "/x/../v1/messages", "/v1/messages;a=b", "*", "/v1/chat/completions/", "/api/v1/stream%20",
    ],
)  # fmt: skip
def test_every_other_path_is_the_webs_whatever_it_would_normalise_to(path: str) -> None:
    assert decide_route("POST", path) == Web()


def test_every_state_can_close_and_closed_absorbs() -> None:
    assert set(EDGES) == set(State)
    assert all(State.CLOSED in edges for edges in EDGES.values())
    assert EDGES[State.CLOSED] == {State.CLOSED}


def test_every_state_can_be_reached() -> None:
    reached = {State.IDLE}
    for _ in State:
        reached |= {after for before in reached for after in EDGES[before]}
    assert reached == set(State)


ANSWERED = (State.REPLYING, State.STREAMING, State.HANDED)


@pytest.mark.parametrize("state", [state for state in State if state not in ANSWERED])
def test_only_an_answered_connection_goes_back_to_idle(state: State) -> None:
    with pytest.raises(RuntimeError, match=f"from {state.name} to IDLE"):
        check_edge(state, State.IDLE)
