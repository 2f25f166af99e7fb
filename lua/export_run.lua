-- export_run: reads the complete records of a run.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"run", nonce, {field, value, …}, {step, …}}  the whole hash, and the completed steps in their order
--       {"missing", nonce}
-- Writes nothing.

-- include record

local steps, done = KEYS[1], KEYS[2]
@OPEN_EXISTING_RUN

return { "run", nonce, redis.call("HGETALL", steps), redis.call("ZRANGE", done, 0, -1) }
