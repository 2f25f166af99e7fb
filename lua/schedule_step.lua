-- schedule_step: makes a pending record for a step that has none.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   made for this call alone; it stays on the record and tells a re-sent call from a second one
--       2 ttl_ms  or ""  for a run that this call makes
--       3 step
--       4 input
-- REPLY {"schedule", nonce, state} | {"schedule" | "skip", nonce, state, input, output, error}
-- Writes only when it replies "schedule" for the first time.

-- include record
-- include run
-- include schedule

local steps, done, step = KEYS[1], KEYS[2], ARGV[3]

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  local now = now_ms()
  if not run.exists then
    set_ttl(run, ARGV[2])
  end
  run.created = run.created + 1
  local line = pending_line(nonce, now, run.created)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "i" .. step, ARGV[4])
  renew_expiry(run, steps, done, now)
  return { "schedule", nonce, line }
end

-- include reply

-- The step may have moved on before the reply to the call that scheduled it got through.
return with_record(scheduled_by(state) == nonce and "schedule" or "skip", steps, step)
