-- completed_steps: lists a stretch of a run's completed steps in the order of their completion.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 first   of the places to list, from 0
--       3 last    of them; -1: the last there is
-- REPLY {"steps", nonce, {step, …}}
-- Writes nothing.

-- include record

local _, _, refusal = load(KEYS[1], KEYS[2])
if refusal then
  return refusal
end
return { "steps", nonce, redis.call("ZRANGE", KEYS[2], ARGV[2], ARGV[3]) }
