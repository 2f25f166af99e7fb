-- checkpoint_step: stores the progress of a claim for the next attempt, and restarts the lease if asked to.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed; a number that grows with each call of a sender
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 sender  who makes this call
--       5 progress
--       6 run     "<bytes in the run id>:<run id>", for the indexes
--       7 lease_ms  or ""  the claim never expires; or omitted  the lease stays
-- REPLY "checkpointed nonce state" | {"checkpointed", nonce, state, input}  without a token
--       {"superseded", nonce, state, input, progress}  a later call of the sender has stored this progress
--       {"cancelled", nonce, state, input, progress, reason}  in a cancelled run: as above, the progress if superseded
--       {"stale", nonce, state, input, output, error, progress} | {"missing", nonce}
-- Writes unless it replies "stale" or "missing"; if superseded, no progress.

-- include record
-- include run
-- include reply
-- include indexes
-- include extend

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token, sender, lease = ARGV[2], ARGV[3], ARGV[4], ARGV[7]
@OPEN_EXISTING_STEP

if not holds(state, token) then
  return with_record("stale", steps, step)
end
if lease then
  @CHECK_INDEXES(claims, nil)
end

local superseded
if state.mark and @MARKED(state.mark, @HAS_PROGRESS) then
  local stored = redis.call("HGET", steps, "p" .. step) or ""
  local attempt, last_sender, last_number = string.match(stored, @READ_PROGRESS)
  if attempt == state.attempt and last_sender == sender and #last_number <= @MAX_DIGITS then
    -- The call is a delayed copy: its sender has made a later checkpoint since.
    superseded = last_number + 0 > nonce + 0 and stored
  end
end

local now = now_ms()
local line, written, ends = state.line, {}, nil
if lease then
  state.lease, ends = extend(run, state.lease, state.created, state.started, lease_end(lease, now))
  line = format_state(state)
  written = { "r", format_run(run), "s" .. step, line }
end
if not superseded then
  local last = #written
  written[last + 1], written[last + 2] = "p" .. step, @PROGRESS(state.attempt, sender, nonce) .. ARGV[5]
  written[last + 3], written[last + 4] = "w" .. step, @MARK_ALSO(state.mark, @HAS_PROGRESS)
end
if written[1] then
  redis.call("HSET", steps, unpack(written)) -- first: after a ZREM, a full server would accept it
  if ends then
    redis.call("ZADD", claims, ends, ARGV[6] .. step)
  elseif lease then
    redis.call("ZREM", claims, ARGV[6] .. step)
  end
  renew_expiry(run, steps, done, now)
end
if run.cancelled then
  return cancelled_claim(steps, step, line, superseded)
end
if superseded then
  return { "superseded", nonce, line, redis.call("HGET", steps, "i" .. step), superseded }
end
return with_input("checkpointed", line, token, steps, step)
