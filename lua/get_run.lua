-- get_run: reads all records of a run.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"run", nonce, {field, value, …}}  the whole hash, in no order
-- Writes nothing.

-- include record

local _, _, refusal = load(KEYS[1], KEYS[2])
if refusal then
  return refusal
end
return { "run", nonce, redis.call("HGETALL", KEYS[1]) }
