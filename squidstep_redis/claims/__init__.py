"""Claims with a heartbeat: the rules of `run_step` and `claim_step`, and the heartbeat itself."""
