-- begin: claims a step for one delivery, or skips it: the last part of a script. Needs record and run.
--
-- Reads run and the state of step, both loaded, now, and the arguments of begin_step.

if not state then
  if lease ~= "" then
    -- The first write checks its own key: if it fails, nothing is written.
    local reply = redis.pcall("ZADD", claims, now + lease, ARGV[3] .. step)
    if type(reply) == "table" then
      return failed_call(claims, reply)
    end
  end
  set_ttl_if_new(run, ARGV[7] or "")
  run.created = run.created + 1 .. ""
  retain(run, lease, now)
  local line = @FIRST_CLAIM(token, lease, now, run.created, owner)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "i" .. step, input)
  renew_expiry(run, steps, done, now)
  return { "execute", nonce, line }
end

-- include reply
-- include indexes
-- include history

if state.status == @COMPLETED then
  return with_record("completed", steps, step)
end
if holds(state, token) then
  return { "execute", nonce, state.line, redis.call("HGET", steps, "i" .. step) }
end
local lease_expired = false
if state.status == @RUNNING then
  local remaining = state.lease ~= "" and state.created + state.started + state.lease - now
  if not remaining or remaining > 0 then
    local reply = with_record("busy", steps, step)
    reply[7] = remaining and tostring(remaining) or ""
    return reply
  end
  lease_expired = true
end
local scheduled = state.status == @PENDING
if state.token == token or past_attempt(steps, step, state, token) then
  -- An earlier copy of this call acquired a claim that has ended since. No caller is waiting for this copy.
  return with_record("superseded", steps, step)
end
@CHECK_INDEXES(claims, failed)

local member = ARGV[3] .. step
if lease_expired then
  expire_attempt(state)
end
local used = state.attempt - (tonumber(state.released) or 0)
local limit = tonumber(ARGV[8] or "") or math.huge
if not scheduled and used >= limit then
  if lease_expired then
    redis.call("HSET", steps, "s" .. step, format_state(state), "e" .. step, ARGV[9])
    redis.call("ZREM", claims, member)
    index_failed(failed, member, now)
    renew_expiry(run, steps, done, now)
  end
  return with_record("exhausted", steps, step)
end

local fields = {}
if state.attempt ~= "0" then
  local last_error = redis.call("HGET", steps, "e" .. step) or ""
  fields[1], fields[2] = attempt_field(state.attempt, step), format_state(state) .. "\n" .. last_error
end
state.status = @RUNNING
state.attempt = state.attempt + 1
state.token = token
state.lease = lease
state.started = math.max(0, now - state.created)
state.ended = ""
state.rest = string.match(state.rest, "^" .. @REST("%d+", "%S*", "")) .. owner
retain(run, lease, state.created + state.started)
local line = format_state(state)
local count = #fields
fields[count + 1], fields[count + 2] = "r", format_run(run)
fields[count + 3], fields[count + 4] = "s" .. step, line
if not scheduled then
  fields[count + 5], fields[count + 6] = "i" .. step, input
end
redis.call("HSET", steps, unpack(fields))
redis.call("HDEL", steps, "e" .. step, attempt_field(state.attempt - 1 - HISTORY, step))
redis.call("ZREM", failed, member)
if lease == "" then
  redis.call("ZREM", claims, member)
else
  redis.call("ZADD", claims, now + lease, member)
end
renew_expiry(run, steps, done, now)
local stored_input = scheduled and redis.call("HGET", steps, "i" .. step) or nil
return { lease_expired and "takeover" or "execute", nonce, line, stored_input }
