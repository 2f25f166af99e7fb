"""Tests of `run_step` and `claim_step`: claims that are extended while their work runs."""
