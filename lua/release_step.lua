-- release_step: releases a claim before its work took effect; the attempt does not count against max_attempts.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 run     "<bytes in the run id>:<run id>", for the indexes
-- REPLY {"released", nonce, state} | {"released", nonce, state, input}  without a token
--       {"released", nonce, state, input, progress}  if there is progress
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}
-- Writes only when it first replies "released".

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token = ARGV[2], ARGV[3]
@OPEN_EXISTING_STEP

if not holds(state, token) then
  if state.status == @PENDING and state.attempt ~= "0" and (token == state.token or token == "") then
    return with_input("released", state.line, token, steps, step, state.mark)
  end
  local past = past_attempt(steps, step, state, token)
  if past and past.status == @PENDING then
    return with_input("released", past.line, token, steps, step, state.mark)
  end
  return with_record("stale", steps, step)
end
@CHECK_INDEXES(claims, nil)

local now = now_ms()
unretain(run, state.lease)
end_attempt(state, @PENDING, now)
state.released = (tonumber(state.released) or 0) + 1
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line)
redis.call("ZREM", claims, ARGV[4] .. step)
renew_expiry(run, steps, done, now)
return with_input("released", line, token, steps, step, state.mark)
