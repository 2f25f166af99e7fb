-- schedule_steps: creates pending records for the given steps that have no record, all or none.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call only; the records store it, so that a re-sent call is recognized
--       2 new_run  what a run that this call creates gets: "" or ttl_ms, then a space and labels if it gets any
--       3 width   of the arguments for each step: 3 with fingerprints, else 2
--       4 step, 5 input, …  of each step, and its fingerprint if width is 3
-- REPLY {"mismatch", nonce, step, fingerprint}  this step has this different fingerprint
--       {"scheduled", nonce, position, …}  of the newly scheduled steps among the given ones, from 0
--       {"cancelled", nonce, position, …}  the same, and the other steps are not stored: the run is cancelled
-- Writes only when at least one of the steps has no record, and the run is not cancelled.

-- include record
-- include run
-- include new_run
-- include schedule
-- include fingerprint

local steps, done = KEYS[1], KEYS[2]
local width = tonumber(ARGV[3])
local FIRST = 4
@OPEN_RUN

local missing, created, others = without_record(steps, FIRST, width, nonce)
for index = 1, width == 3 and #others or 0 do
  refusal = other_fingerprint(steps, ARGV[others[index]], ARGV[others[index] + 2])
  @RETURN_REFUSAL
end
local reply = { "scheduled", nonce }
if run.cancelled and #missing > 0 then
  missing, reply[1] = {}, "cancelled"
end
if #missing > 0 then
  local now = now_ms()
  set_up(run, ARGV[2])
  refusal = enter_if_new(run, steps, now)
  @RETURN_REFUSAL
  write_pending(run, steps, missing, width, nonce, now)
  redis.call("HSET", steps, "r", format_run(run))
  renew_expiry(run, steps, done, now)
end
for _, positions in ipairs({ created, missing }) do
  for _, position in ipairs(positions) do
    reply[#reply + 1] = (position - FIRST) / width
  end
end
return reply
