from collections.abc import Callable

from proxyd._scan import Watch

FLAG_FIRST: int
FLAG_DONE: int
FLAG_ERROR_FIELD: int
FLAG_OVERSIZE: int

class Splitter:
    events: int
    comments: int
    last_event_id: bytes
    retry: int | None
    tail_data: bytes | None
    watch: Watch | None
    def __init__(
        self,
        on_event: Callable[[bytes, bytes, int], bytes | None],
        watch: Watch | None = ...,
        max_event_bytes: int = ...,
        hold_bytes: int = ...,
    ) -> None: ...
    @property
    def at_boundary(self) -> bool: ...
    @property
    def text_bytes(self) -> int: ...
    @property
    def sample(self) -> bytes: ...
    def feed(self, data: bytes) -> bytes: ...
    def finish(self) -> bytes: ...
    def discard(self) -> int: ...
