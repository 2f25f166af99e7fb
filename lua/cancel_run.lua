-- cancel_run: cancels a run: until resume_run, no step of it is scheduled or begins.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 reason  or ""  none; if the run is cancelled already, the first reason stays
-- REPLY {"set", nonce} | {"missing", nonce}
-- Writes only when it replies "set".

-- include record
-- include run

local steps, done = KEYS[1], KEYS[2]
@OPEN_EXISTING_RUN

if not run.cancelled then
  run.cancelled = true
  redis.call("HSET", steps, "r", format_run(run), "c", ARGV[2])
end
renew_expiry(run, steps, done, now_ms())
return { "set", nonce }
