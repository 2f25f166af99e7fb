-- confirm_entry: holds an entry of the claims or failed index against its record, and drops it if they disagree.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 index   sorted set  claims or failed
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>"
--       4 wanted  "failed", or of the claims "lapsed" or "live"
--       5 owner   whose live claims alone are wanted, or ""  anybody's
-- REPLY {"failed" | "lapsed" | "live", nonce, state, input, output, error} | {"other", nonce} | {"dropped", nonce}
-- Writes hints alone: when it replies "dropped", or of a live claim whose entry had another end of the lease.

-- include record
-- include reply

local steps, index, step, member = KEYS[1], KEYS[3], ARGV[2], ARGV[3] .. ARGV[2]
local wanted, owner = ARGV[4], ARGV[5]

local _, state, refusal = load(steps, KEYS[2], step)
if refusal and refusal[1] ~= "tombstone" then
  return refusal
end
if state and wanted == "failed" and (state.status == FAILED or state.status == EXPIRED) then
  return with_record("failed", steps, step)
end
if state and wanted ~= "failed" and state.status == RUNNING and state.lease ~= "" then
  local lease_end = state.created + state.started + state.lease
  local lapsed = lease_end - now_ms() <= 0
  -- A write that changes nothing is refused, too, when memory is full or the server is a replica.
  if not lapsed and tonumber(redis.call("ZSCORE", index, member) or 0) ~= lease_end then
    redis.call("ZADD", index, lease_end, member)
  end
  if lapsed ~= (wanted == "lapsed") or (owner ~= "" and owner ~= string.match(state.rest, "^%d+ %S* (.*)$")) then
    return { "other", nonce }
  end
  return with_record(wanted, steps, step)
end
redis.call("ZREM", index, member)
return { "dropped", nonce }
