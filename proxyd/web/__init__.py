"""The web application: the only room that imports aiohttp."""
