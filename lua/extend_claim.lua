-- extend_claim: lets the lease of a held claim run from now.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>", for the indexes
--       4 token   of the claim, or ""  for whoever holds it
--       5 lease_ms  or ""  the claim never ends by itself, or 0  it can be taken over at once
-- REPLY {"extended", nonce, state} | {"extended", nonce, state, input}  without a token
--       {"stale", nonce, state, input, output, error}
--       {"missing", nonce}
-- Writes only when it replies "extended".

-- include record
-- include run
-- include reply
-- include indexes

local steps, done, claims = KEYS[1], KEYS[2], KEYS[3]
local step, token, lease = ARGV[2], ARGV[4], ARGV[5]

local run, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
if not holds(state, token) then
  return with_record("stale", steps, step)
end
refusal = check_indexes(claims)
if refusal then
  return refusal
end

local now = now_ms()
local member = ARGV[3] .. step
unhold(run, state)
if lease == "" then
  state.lease = ""
  redis.call("ZREM", claims, member)
else
  local started = state.created + state.started
  state.lease = math.max(0, now + lease - started)
  redis.call("ZADD", claims, started + state.lease, member)
end
hold(run, state.lease, state.created + state.started)
local line = format_state(state)
redis.call("HSET", steps, "r", format_run(run), "s" .. step, line)
renew_expiry(run, steps, done, now)
return { "extended", nonce, line, token == "" and redis.call("HGET", steps, "i" .. step) or nil }
