-- get_run: reads all records of a run.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"run", nonce, {field, value, …}}  the whole hash, unordered
-- Writes nothing.

-- include record

local steps, done = KEYS[1], KEYS[2]
@OPEN_RUN

return { "run", nonce, redis.call("HGETALL", steps) }
