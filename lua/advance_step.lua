-- advance_step: completes a step and claims the next one of its run: complete_step and begin_step in one.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 token   of the next claim, to 9 lapse_error: as of begin_step, for the next step
--       2 step, 3 run, 4 input, 5 lease_ms, 6 owner, 7 ttl_ms, 8 max_attempts, 9 lapse_error
--       10 from    the step to complete
--       11 held    token of the claim on it, or ""  for whoever holds it
--       12 output  of it
-- REPLY as begin_step, about the next step, once the first is completed:
--       {"execute" | "takeover", nonce, state} | {"execute", nonce, state, input}
--       {"completed" | "exhausted" | "lost", nonce, state, input, output, error}
--       {"busy", nonce, state, input, output, error, remaining_ms | ""}
--       {"stale", nonce, state, input, output, error} | {"missing", nonce}  about the step to complete
-- Writes only when it completes the first step for the first time, or as begin_step. It then does both or neither.

-- include record
-- include run

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local token, step, input, lease, owner = ARGV[1], ARGV[2], ARGV[4], ARGV[5], ARGV[6] or ""
local from, held, output = ARGV[10], ARGV[11], ARGV[12]

local run, ended, refusal = load(steps, done, from)
if refusal then
  return refusal
end
if not ended then
  return { "missing", nonce }
end
local line = redis.call("HGET", steps, "s" .. step)
local state = line and parse_state(line)
if line and not state then
  return unreadable(steps, "s" .. step, line)
end
local now = now_ms()

-- include reply
-- include indexes
-- include complete

if holds(ended, held) then
  refusal = check_indexes(claims, failed)
  if refusal then
    return refusal
  end
  redis.call("ZREM", claims, ARGV[3] .. from)
  complete(run, ended, steps, done, from, output, now)
  -- include wake
  wake(ended, steps, from)
else
  local again = ended.status == COMPLETED and (held == ended.token or held == "")
  if not again or redis.call("HGET", steps, "o" .. from) ~= output then
    return with_record("stale", steps, from)
  end
end

-- include begin
