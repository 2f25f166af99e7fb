-- schedule_steps: makes pending records for those of many steps that have none, all of them or none.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   made for this call alone; it stays on the records and tells a re-sent call from a second one
--       2 ttl_ms  or ""  for a run that this call makes
--       3 step, 4 input, …
-- REPLY {"scheduled", nonce, position, …}  of the newly scheduled among the steps given, from 0
-- Writes only when at least one of the steps has no record.

-- include record
-- include run
-- include schedule

local steps, done = KEYS[1], KEYS[2]
local FIRST = 3

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
local missing, made = without_record(steps, FIRST, nonce)
if #missing > 0 then
  local now = now_ms()
  if not run.exists then
    set_ttl(run, ARGV[2])
  end
  write_pending(run, steps, missing, nonce, now)
  redis.call("HSET", steps, "r", format_run(run))
  renew_expiry(run, steps, done, now)
end
local reply = { "scheduled", nonce }
for _, positions in ipairs({ made, missing }) do
  for _, position in ipairs(positions) do
    reply[#reply + 1] = (position - FIRST) / 2
  end
end
return reply
