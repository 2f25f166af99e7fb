-- fail_step: ends a claim with an error; the step can be claimed again.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 token   of the claim, or ""  for whoever holds it
--       5 error
-- REPLY {"failed", nonce, state} | {"failed", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error}
--       {"missing", nonce}
-- Writes only when it replies "failed" for the first time.

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local step, token, last_error = ARGV[2], ARGV[4], ARGV[5]

local function replied(line)
  return { "failed", nonce, line, token == "" and redis.call("HGET", steps, "i" .. step) or nil }
end

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
if not holds(state, token) then
  if state.status == FAILED and (token == state.token or token == "") then
    if redis.call("HGET", steps, "e" .. step) == last_error then
      return replied(state.line)
    end
  end
  local past = past_attempt(steps, step, state, token)
  if past and past.status == FAILED and past.error == last_error then
    return replied(past.line)
  end
  return with_record("stale", steps, step)
end
refusal = check_indexes(claims, failed)
if refusal then
  return refusal
end

local now = now_ms()
local member = ARGV[3] .. step
unhold(run, state)
end_attempt(state, FAILED, now)
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "e" .. step, last_error)
redis.call("ZREM", claims, member)
index_failed(failed, member, now)
renew_expiry(run, steps, done, now)
-- include wake
wake(state, steps, step)
return replied(line)
