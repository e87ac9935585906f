"""Downstream sockets and HTTP: accept, read a request, answer it, hand it on."""
