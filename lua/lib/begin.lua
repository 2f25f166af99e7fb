-- begin: claims a step for one delivery, or says why it must be skipped: the rest of a script. Needs record and run.
--
-- It goes on from `run` and the `state` of `step`, both loaded, at `now`; ARGV is that of begin_step.

if not state then
  if lease ~= "" then
    -- The first write checks its own key: nothing is written if this fails.
    local answer = redis.pcall("ZADD", claims, now + lease, ARGV[3] .. step)
    if type(answer) == "table" then
      return failed_call(claims, answer)
    end
  end
  if not run.exists then
    set_ttl(run, ARGV[7] or "")
  end
  run.created = run.created + 1 .. ""
  hold(run, lease, now)
  local line = first_line(token, lease, now, run.created, owner)
  redis.call("HSET", steps, "r", format_run(run), "s" .. step, line, "i" .. step, input)
  renew_expiry(run, steps, done, now)
  return { "execute", nonce, line }
end

-- include reply
-- include indexes
-- include history

if state.status == COMPLETED then
  return with_record("completed", steps, step)
end
if holds(state, token) then
  return { "execute", nonce, state.line, redis.call("HGET", steps, "i" .. step) }
end
local lapsed = false
if state.status == RUNNING then
  local remaining = state.lease ~= "" and state.created + state.started + state.lease - now
  if not remaining or remaining > 0 then
    local reply = with_record("busy", steps, step)
    reply[7] = remaining and tostring(remaining) or ""
    return reply
  end
  lapsed = true
end
local scheduled = state.status == PENDING
if state.token == token or past_attempt(steps, step, state, token) then
  -- This very call was granted a claim that has ended since. Nobody may be waiting for this copy of it any more.
  return with_record("superseded", steps, step)
end
refusal = check_indexes(claims, failed)
if refusal then
  return refusal
end

local member = ARGV[3] .. step
if lapsed then
  -- Nobody ended the attempt: it counts as ended when its lease did.
  state.status, state.ended, state.lease = EXPIRED, state.lease, ""
end
local used = state.attempt - (tonumber(state.released) or 0)
local limit = tonumber(ARGV[8] or "") or math.huge
if not scheduled and used >= limit then
  if lapsed then
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
  fields[1], fields[2] = "a" .. state.attempt .. ":" .. step, format_state(state) .. "\n" .. last_error
end
state.status = RUNNING
state.attempt = state.attempt + 1
state.token = token
state.lease = lease
state.started = math.max(0, now - state.created)
state.ended = ""
state.rest = string.match(state.rest, "^%d+ %S* ") .. owner
hold(run, lease, state.created + state.started)
local line = format_state(state)
local count = #fields
fields[count + 1], fields[count + 2] = "r", format_run(run)
fields[count + 3], fields[count + 4] = "s" .. step, line
if not scheduled then
  fields[count + 5], fields[count + 6] = "i" .. step, input
end
redis.call("HSET", steps, unpack(fields))
redis.call("HDEL", steps, "e" .. step, "a" .. (state.attempt - 1 - HISTORY) .. ":" .. step)
redis.call("ZREM", failed, member)
if lease == "" then
  redis.call("ZREM", claims, member)
else
  redis.call("ZADD", claims, now + lease, member)
end
renew_expiry(run, steps, done, now)
return { lapsed and "takeover" or "execute", nonce, line, scheduled and redis.call("HGET", steps, "i" .. step) or nil }
