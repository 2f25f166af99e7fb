"""The commands of `squidstep` that look after a store: a thin layer over the public API, one module each."""
