"""Claims that are kept alive: the rules of `run_step` and `claim_step`, and the heartbeat."""
