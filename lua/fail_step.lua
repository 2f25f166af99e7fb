-- fail_step: ends a claim with an error; the step can be claimed again at once, after a delay, or not at all.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 error
--       5 run     "<bytes in the run id>:<run id>", for the indexes
--       6 delay_ms      until the step can be claimed again; or "final"  it cannot; or omitted  at once
-- REPLY {"failed", nonce, state} | {"failed", nonce, state, input}  without a token
--       {"failed", nonce, state, input, progress}  if there is progress
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}
--       {"stale", nonce, state, input, output, error, progress, ended, ended_error}  this claim has ended in the same way,
--       with an error of other bytes: the client compares what the two decode to
-- Writes only when it first replies "failed".

-- include record
-- include run
-- include reply
-- include indexes
-- include history

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local step, token, last_error, delay = ARGV[2], ARGV[3], ARGV[4], ARGV[6]
local status = delay == "final" and @FINAL or @FAILED
@OPEN_EXISTING_STEP

if not holds(state, token) then
  local ended = (token == state.token or token == "") and state or past_attempt(steps, step, state, token)
  if not ended or ended.status ~= status then
    return with_record("stale", steps, step)
  end
  local stored = ended.error or redis.call("HGET", steps, "e" .. step) or ""
  if stored == last_error then
    return with_input("failed", ended.line, token, steps, step, state.mark)
  end
  local reply = with_record("stale", steps, step)
  reply[8], reply[9] = ended.line, stored
  return reply
end
@CHECK_INDEXES(claims, failed)

local now = now_ms()
local member = ARGV[5] .. step
unretain(run, state.lease)
end_attempt(state, status, now)
if delay and status == @FAILED then
  state.lease = string.format("%d", state.ended + delay)
  retain(run, state.lease, state.created + state.started)
end
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "e" .. step, last_error)
redis.call("ZREM", claims, member)
index_failed(failed, member, now)
renew_expiry(run, steps, done, now)
-- include marks
settle_mark(steps, step, state.mark, false)
return with_input("failed", line, token, steps, step, state.mark)
