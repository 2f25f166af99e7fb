"""The contract, row by row: what each operation does to each state of a step."""
