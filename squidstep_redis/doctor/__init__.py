"""Checks whether a server and a client can provide the store's guarantees."""
