-- confirm_entry: checks an entry of the claims or failed index against its record, and drops it if they disagree.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 index   sorted set  claims or failed
-- ARGV  1 nonce   of this call, echoed
--       2 step
--       3 run     "<bytes in the run id>:<run id>"
--       4 wanted  "failed", or for an entry of claims "lapsed" or "live"
--       5 owner   only live claims of this owner, or ""  any owner
--       6 parts   "" for the state and the error alone
-- REPLY {"failed" | "lapsed" | "live", nonce, state, input, output, error, progress} | {…, nonce, state, error} | {"other", nonce} |
--       {"dropped", nonce} | {"kept", nonce}
-- Writes only hints: when it replies "dropped", or for a live claim whose entry had another end of the lease. An entry stays as it is
-- ("kept") if the server rejects the write, as a replica does.

-- include record
-- include reply

local steps, index, step, member = KEYS[1], KEYS[3], ARGV[2], ARGV[3] .. ARGV[2]
local wanted, owner, parts = ARGV[4], ARGV[5], ARGV[6]

local function found(word, line)
  if parts == "" then
    return { word, nonce, line, redis.call("HGET", steps, "e" .. step) }
  end
  return with_record(word, steps, step)
end

local _, state, refusal = load_step(steps, KEYS[2], step)
if refusal and refusal[1] ~= "tombstone" then
  return refusal
end
if state and wanted == "failed" and @IS_FAILURE(state.status) then
  return found("failed", state.line)
end
if state and wanted ~= "failed" and state.status == @RUNNING and state.lease ~= "" then
  local expired = has_expired(state, now_ms())
  local lease_end = state.created + state.started + state.lease
  -- A hint, which a full server and a replica refuse. Write only if needed: a replica rejects even a write without effect.
  local is_kept = false
  if not expired and tonumber(redis.call("ZSCORE", index, member) or 0) ~= lease_end then
    is_kept = type(redis.pcall("ZADD", index, lease_end, member)) ~= "number"
  end
  local owned = owner == "" or owner == string.match(state.rest, "^" .. @REST("%d+", "%S*", "(.*)") .. "$")
  if expired ~= (wanted == "lapsed") or not owned then
    return { is_kept and "kept" or "other", nonce }
  end
  return found(wanted, state.line)
end
return { type(redis.pcall("ZREM", index, member)) == "number" and "dropped" or "kept", nonce }
