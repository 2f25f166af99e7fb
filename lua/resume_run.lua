-- resume_run: ends the cancellation of a run.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"set", nonce} | {"missing", nonce}
-- Writes only when it replies "set".

-- include record
-- include run

local steps, done = KEYS[1], KEYS[2]
@OPEN_EXISTING_RUN

if run.cancelled then
  run.cancelled = nil
  redis.call("HSET", steps, "r", format_run(run))
  redis.call("HDEL", steps, "c")
end
renew_expiry(run, steps, done, now_ms())
return { "set", nonce }
