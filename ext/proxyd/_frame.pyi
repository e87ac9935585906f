BODY_LENGTH: int
BODY_CHUNKED: int
BODY_CLOSE: int

class Unframer:
    kind: int
    leftover: int
    def __init__(self, kind: int, length: int = ...) -> None: ...
    @property
    def done(self) -> bool: ...
    def feed(self, data: bytes) -> bytes: ...
