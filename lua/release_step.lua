-- release_step: gives a claim back before its work took effect; the attempt does not count against max_attempts.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 token   of the claim, or ""  for whoever holds it
-- REPLY {"released", nonce, state} | {"released", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error}
--       {"missing", nonce}
-- Writes only when it replies "released" for the first time.

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token = ARGV[2], ARGV[4]

local function replied(line)
  return { "released", nonce, line, token == "" and redis.call("HGET", steps, "i" .. step) or nil }
end

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
if not holds(state, token) then
  if state.status == PENDING and state.attempt ~= "0" and (token == state.token or token == "") then
    return replied(state.line)
  end
  local past = past_attempt(steps, step, state, token)
  if past and past.status == PENDING then
    return replied(past.line)
  end
  return with_record("stale", steps, step)
end
refusal = check_indexes(claims)
if refusal then
  return refusal
end

local now = now_ms()
unhold(run, state)
end_attempt(state, PENDING, now)
state.released = (tonumber(state.released) or 0) + 1
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line)
redis.call("ZREM", claims, ARGV[3] .. step)
renew_expiry(run, steps, done, now)
return replied(line)
