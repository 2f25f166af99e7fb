-- extend_claim: restarts the lease of a live claim from now.
--
-- KEYS  1 steps, 2 done, 3 claims
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 token   of the claim, or ""  any claim
--       4 lease_ms  or ""  the claim never expires, or 0  it can be taken over immediately
--       5 run     "<bytes in the run id>:<run id>", for the indexes
-- REPLY {"extended", nonce, state} | {"extended", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error} | {"missing", nonce}
-- Writes only when it replies "extended".

-- include record
-- include run
-- include reply
-- include indexes

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token, lease = ARGV[2], ARGV[3], ARGV[4]
@OPEN_EXISTING_STEP

if not holds(state, token) then
  return with_record("stale", steps, step)
end
@CHECK_INDEXES(claims, nil)

local now = now_ms()
local member = ARGV[5] .. step
unretain(run, state.lease)
if lease == "" then
  state.lease = ""
  redis.call("ZREM", claims, member)
else
  local started = state.created + state.started
  state.lease = math.max(0, now + lease - started)
  redis.call("ZADD", claims, started + state.lease, member)
end
retain(run, state.lease, state.created + state.started)
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line)
renew_expiry(run, steps, done, now)
return with_input("extended", line, token, steps, step)
