-- begin: claims a step that has a record for one delivery, or skips it. Needs record and run.
--
-- Reads run and now, both loaded, and the arguments of begin_step. The caller checks `input_mismatch` first.

-- include reply
-- include indexes
-- include history
-- include marks
-- include fingerprint

-- The refusal if the step's input differs from the call's; nil for a call that is re-sent.
local function input_mismatch(state, token, step, fingerprint)
  local other = other_fingerprint(steps, step, fingerprint)
  return other and state.token ~= token and not past_attempt(steps, step, state, token) and other or nil
end

local function begin(state, token, step, input, fingerprint)
  if state.status == @COMPLETED then
    return with_record("completed", steps, step)
  end
  if holds(state, token) then
    return { "execute", nonce, state.line, unpack(redis.call("HMGET", steps, "i" .. step, "p" .. step)) }
  end
  if run.cancelled then
    local reply = with_record("cancelled", steps, step)
    reply[8] = redis.call("HGET", steps, "c") or ""
    return reply
  end
  local lease_expired = false
  if state.status == @RUNNING then
    local remaining = state.lease ~= "" and state.created + state.started + state.lease - now
    if not remaining or remaining > 0 then
      local reply = with_record("busy", steps, step)
      reply[8] = remaining and tostring(remaining) or ""
      return reply
    end
    lease_expired = true
  end
  if state.status == @FINAL then
    return with_record("failed", steps, step)
  end
  local scheduled = state.status == @PENDING
  if state.token == token or past_attempt(steps, step, state, token) then
    -- An earlier copy of this call acquired a claim that has ended since. No caller is waiting for this copy.
    return with_record("superseded", steps, step)
  end
  @CHECK_INDEXES(claims, failed)

  local member = ARGV[4] .. step
  local lease_of_last = state.lease
  if lease_expired then
    expire_attempt(state)
  end
  local used = state.attempt - (tonumber(state.released) or 0)
  local limit = tonumber(ARGV[8] or "") or math.huge
  if not scheduled and used >= limit then
    if lease_expired then
      unretain(run, lease_of_last)
      redis.call("HSET", steps, "r", format_run(run), "s" .. step, format_state(state), "e" .. step, ARGV[9])
      redis.call("ZREM", claims, member)
      index_failed(failed, member, now)
      renew_expiry(run, steps, done, now)
      settle_mark(steps, step, redis.call("HGET", steps, "w" .. step), false)
    end
    return with_record("exhausted", steps, step)
  end
  if state.status == @FAILED and state.lease ~= "" then
    local remaining = state.created + state.started + state.lease - now
    if remaining > 0 then
      local reply = with_record("delayed", steps, step)
      reply[8] = tostring(remaining)
      return reply
    end
  end

  local written, progress = {}, nil
  if state.attempt ~= "0" then
    local last = redis.call("HMGET", steps, "e" .. step, "p" .. step)
    written[1], written[2] = attempt_field(state.attempt, step), format_state(state) .. "\n" .. (last[1] or "")
    progress = last[2] or nil
  end
  state.status = @RUNNING
  state.attempt = state.attempt + 1
  state.token = token
  state.lease = lease
  state.started = math.max(0, now - state.created)
  state.ended = ""
  state.rest = string.match(state.rest, "^" .. @REST("%d+", "%S*", "")) .. owner
  if lease_of_last ~= "" then -- of a lapsed claim, or the delay after a failure
    unretain(run, lease_of_last)
  end
  retain(run, lease, state.created + state.started)
  local line = format_state(state)
  local count = #written
  written[count + 1], written[count + 2] = "r", format_run(run)
  written[count + 3], written[count + 4] = "s" .. step, line
  if not scheduled then
    written[count + 5], written[count + 6] = "i" .. step, input
  end
  local dropped = "e" .. step
  if fingerprint ~= "" then
    written[#written + 1], written[#written + 2] = "f" .. step, fingerprint
  elseif not scheduled then
    dropped = "f" .. step -- of an earlier input
  end
  redis.call("HSET", steps, unpack(written))
  redis.call("HDEL", steps, "e" .. step, attempt_field(state.attempt - 1 - HISTORY, step), dropped)
  redis.call("ZREM", failed, member)
  if lease == "" then
    redis.call("ZREM", claims, member)
  else
    redis.call("ZADD", claims, now + lease, member)
  end
  renew_expiry(run, steps, done, now)
  local stored_input = scheduled and redis.call("HGET", steps, "i" .. step) or progress and false
  return { lease_expired and "takeover" or "execute", nonce, line, stored_input, progress }
end
