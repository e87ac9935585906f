"""Sans-io protocol: heads, framing, event streams. Bytes in, bytes and facts out.

Must not know: sockets, loops, clocks, files, logs, configuration, providers.
"""
