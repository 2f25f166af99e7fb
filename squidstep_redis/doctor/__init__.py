"""Checks whether a server and a client can keep the store's guarantees."""
