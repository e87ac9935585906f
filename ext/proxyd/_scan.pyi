from collections.abc import Sequence

class Watch:
    report_keys: tuple[bytes, ...]
    type_values: tuple[bytes, ...]
    meter_keys: tuple[bytes, ...]
    def __init__(
        self,
        report_keys: Sequence[bytes] = ...,
        type_values: Sequence[bytes] = ...,
        meter_keys: Sequence[bytes] = ...,
    ) -> None: ...

def scan(watch: Watch, data: bytes) -> tuple[bool, int]: ...
def members(data: bytes, most: int = ...) -> list[tuple[int, int, int, int]]: ...
def structure(data: bytes, most: int) -> int: ...
def mend(data: bytes) -> bytes: ...
