-- retry_step: resets a failed step, or one whose lease expired, to pending, and resets its attempt counter.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 nonce   of this call only; it becomes the token of the attempt that the call claims and releases
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 owner   of the call, or ""
-- REPLY {"retried", nonce, state, input, progress} | {"pending" | "stale", nonce, state, input, output, error, progress}
--       {"missing", nonce}
-- Writes only when it first replies "retried".

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local step, owner = ARGV[2], ARGV[4]
@OPEN_EXISTING_STEP

local resent = state.token == nonce and state or past_attempt(steps, step, state, nonce)
if resent then
  return { "retried", nonce, resent.line, unpack(redis.call("HMGET", steps, "i" .. step, "p" .. step)) }
end
if state.status == @PENDING then
  return with_record("pending", steps, step)
end
local now, lease = now_ms(), state.lease
if state.status == @RUNNING and has_expired(state, now) then
  expire_attempt(state)
end
if not @IS_FAILURE(state.status) then
  return with_record("stale", steps, step)
end
@CHECK_INDEXES(claims, failed)

-- The call claims the step and releases it. This extra attempt moves the failed attempt to the history, and its token
-- identifies a re-sent call. All attempts so far count as released.
local past, number = format_state(state), state.attempt
local last_error = redis.call("HGET", steps, "e" .. step) or ""
if lease ~= "" then -- of a lapsed claim, or the delay after the failure
  unretain(run, lease)
end
state.status = @PENDING
state.attempt = state.attempt + 1
state.released = state.attempt
state.token = nonce
state.lease = ""
state.started = math.max(0, now - state.created)
state.ended = 0
state.rest = string.match(state.rest, "^" .. @REST("%d+", "%S*", "")) .. owner
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, attempt_field(number, step), past .. "\n" .. last_error)
redis.call("HDEL", steps, "e" .. step, attempt_field(state.attempt - 1 - HISTORY, step))
redis.call("ZREM", claims, ARGV[3] .. step)
redis.call("ZREM", failed, ARGV[3] .. step)
renew_expiry(run, steps, done, now)
return { "retried", nonce, line, unpack(redis.call("HMGET", steps, "i" .. step, "p" .. step)) }
