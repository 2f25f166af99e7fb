-- get_step_run: reads one step's record.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"found", nonce, state, input, output, error} | {"missing", nonce}
-- Writes nothing.

-- include record
-- include reply

local _, state, refusal = load(KEYS[1], KEYS[2], ARGV[2])
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
return with_record("found", KEYS[1], ARGV[2])
