"""Who is asking, from where, and may they: sans-io policy. No sockets, no asyncio; clocks and configuration are
passed in.
"""
