"""The calls of a function as a step: its arguments are the input, its result is the output."""
