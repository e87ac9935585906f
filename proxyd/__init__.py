"""proxyd: a streaming proxy daemon for language-model APIs.

Owns the version number and nothing else, so that importing the package costs nothing and imports no room.
"""

__version__ = "0.1.0"
