-- completed_steps: lists a range of a run's completed steps, in completion order.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 first   position to list, from 0
--       3 last    position to list; -1: the last step
-- REPLY {"steps", nonce, {step, …}}
-- Writes nothing.

-- include record

local steps, done = KEYS[1], KEYS[2]
@OPEN_RUN

return { "steps", nonce, redis.call("ZRANGE", done, ARGV[2], ARGV[3]) }
