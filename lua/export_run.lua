-- export_run: reads all that is known of a run.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"run", nonce, {field, value, …}, {step, …}}  the whole hash, and the completed steps in their order
--       {"missing", nonce}
-- Writes nothing.

-- include record

local run, _, refusal = load(KEYS[1], KEYS[2])
if refusal then
  return refusal
end
if not run.exists then
  return { "missing", nonce }
end
return { "run", nonce, redis.call("HGETALL", KEYS[1]), redis.call("ZRANGE", KEYS[2], 0, -1) }
