"""What is sent and how replies are read: arguments, payloads, keys, scripts, calls, records. Pure: no I/O."""
