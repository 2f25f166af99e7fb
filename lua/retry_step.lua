-- retry_step: makes a step that failed, or whose claim lapsed, pending again, with attempts that count anew.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce   made for this call alone; it becomes the token of the attempt that is claimed and given back
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 owner   who retries, or ""
-- REPLY {"retried", nonce, state, input} | {"pending" | "stale", nonce, state, input, output, error}
--       {"missing", nonce}
-- Writes only when it replies "retried" for the first time.

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local step, owner = ARGV[2], ARGV[4]

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
local again = state.token == nonce and state or past_attempt(steps, step, state, nonce)
if again then
  return { "retried", nonce, again.line, redis.call("HGET", steps, "i" .. step) }
end
if state.status == PENDING then
  return with_record("pending", steps, step)
end
local now = now_ms()
if state.status == RUNNING and state.lease ~= "" and state.created + state.started + state.lease - now <= 0 then
  -- Nobody ended the attempt: it counts as ended when its lease did.
  state.status, state.ended, state.lease = EXPIRED, state.lease, ""
end
if state.status ~= FAILED and state.status ~= EXPIRED then
  return with_record("stale", steps, step)
end
refusal = check_indexes(claims, failed)
if refusal then
  return refusal
end

-- As if the one who retries had claimed the step and given it back: an attempt of its own keeps the one that failed
-- in the history, and its token makes this call known again. All attempts so far count as given back.
local past, number = format_state(state), state.attempt
local last_error = redis.call("HGET", steps, "e" .. step) or ""
state.status = PENDING
state.attempt = state.attempt + 1
state.released = state.attempt
state.token = nonce
state.lease = ""
state.started = math.max(0, now - state.created)
state.ended = 0
state.rest = string.match(state.rest, "^%d+ %S* ") .. owner
local line = format_state(state)
redis.call("HSET", steps, "s" .. step, line, "a" .. number .. ":" .. step, past .. "\n" .. last_error)
redis.call("HDEL", steps, "e" .. step, "a" .. (state.attempt - 1 - HISTORY) .. ":" .. step)
redis.call("ZREM", claims, ARGV[3] .. step)
redis.call("ZREM", failed, ARGV[3] .. step)
renew_expiry(run, steps, done, now)
return { "retried", nonce, line, redis.call("HGET", steps, "i" .. step) }
