-- schedule_step: creates a pending record for a step that has no record.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call only; the record stores it, so that a re-sent call is recognized
--       2 new_run  what a run that this call creates gets: "" or ttl_ms, then a space and labels if it gets any
--       3 step
--       4 input
--       5 fingerprint  of the input, or omitted
-- REPLY {"schedule", nonce, state} | {"cancelled", nonce, state, reason}  of a step that is not stored: the run is cancelled
--       {"schedule" | "skip", nonce, state, input, output, error, progress}
--       {"mismatch", nonce, step, fingerprint}  the step has this different fingerprint
-- Writes only when it first replies "schedule".

-- include record
-- include run
-- include new_run
-- include schedule
-- include fingerprint

local steps, done, step = KEYS[1], KEYS[2], ARGV[3]
@OPEN_STEP

if not state and run.cancelled then
  local now = now_ms()
  return { "cancelled", nonce, @PENDING_LINE("", now, "0"), redis.call("HGET", steps, "c") or "" }
end
if not state then
  local now = now_ms()
  set_up(run, ARGV[2])
  refusal = enter_if_new(run, steps, now)
  @RETURN_REFUSAL
  run.created = run.created + 1
  local line = @PENDING_LINE(nonce, now, run.created)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "i" .. step, ARGV[4])
  if ARGV[5] then
    redis.call("HSET", steps, "f" .. step, ARGV[5])
  end
  renew_expiry(run, steps, done, now)
  return { "schedule", nonce, line }
end

-- include reply

-- By the time a call is re-sent, the step that it scheduled may have another status.
if scheduled_by(state) == nonce then
  return with_record("schedule", steps, step)
end
return other_fingerprint(steps, step, ARGV[5] or "") or with_record("skip", steps, step)
