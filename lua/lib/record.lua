-- record: reads the records of a run, and makes the checks that every script makes first.
--
-- README.md draws the hash `steps` and its lines. Parsed parts stay text until a script calculates with them, so a
-- script that rewrites a line converts only what it changes. Times are milliseconds; each part has few enough digits that
-- .. writes the sum of three in full.

-- include grammar

local nonce = ARGV[1]

local function now_ms()
  local time = redis.call("TIME")
  return @NOW(time)
end

-- The reply for a failed pcall. A key of another type has its own reply; other errors are returned as they are.
local function failed_call(key, reply)
  if string.find(tostring(reply.err), "WRONGTYPE", 1, true) then -- on fakeredis, err is not a string
    return { "wrongtype", nonce, key }
  end
  return reply
end

-- The reply for a line that does not parse: a newer format, or corruption.
local function unreadable(key, field, line)
  local format = string.match(line, "^(%d+)")
  if format and format ~= @FORMAT then
    return { "newer", nonce, key, format }
  end
  return { "corrupt", nonce, key, field }
end

local function parse_state(line)
  local status, attempt, released, token, lease, started, ended, created, rest = string.match(line, @READ_STATE)
  if
    not status
    or math.max(#attempt, #released, #lease, #started, #ended, #created) > @MAX_DIGITS
    or not @HAS_SHORT_POSITION(rest)
  then
    return nil
  end
  return {
    line = line,
    status = status,
    attempt = attempt,
    released = released, -- attempts that do not count against max_attempts; "" for none
    token = token,
    lease = lease, -- since started; "" for a claim that never expires
    started = started, -- since created
    ended = ended, -- since started
    created = created,
    rest = rest,
  }
end

local function format_state(state)
  local claim = @CLAIM(state.attempt, state.released, state.token)
  return @STATE(state.status, claim, state.lease, state.started, state.ended, state.created, state.rest)
end

-- An empty token comes from an operator: it matches any claim.
local function holds(state, token)
  return state.status == @RUNNING and (token == state.token or token == "")
end

local function has_expired(state, now)
  return state.lease ~= "" and state.created + state.started + state.lease - now <= 0
end

local function end_attempt(state, status, now)
  local span = now - state.created - state.started
  state.status = status
  state.lease = ""
  state.ended = @DURATION(span)
end

-- The attempt was abandoned: it ended when its lease expired.
local function expire_attempt(state)
  state.status, state.ended, state.lease = @EXPIRED, state.lease, ""
end

-- Reads the run line and further fields. Checks the types of both keys and that they agree: a run of which one key was
-- evicted or overwritten is refused.
-- Returns run, the values of "r" and the further fields; or nil, nil, refusal.
local function load_run(steps, done, ...)
  local lines = redis.pcall("HMGET", steps, "r", ...)
  if lines.err then
    return nil, nil, failed_call(steps, lines)
  end
  local completions = redis.pcall("ZCARD", done)
  if type(completions) == "table" then
    return nil, nil, failed_call(done, completions)
  end
  local line = lines[1]
  if not line then
    if completions > 0 then
      return nil, nil, { "torn", nonce, steps }
    end
    if redis.call("EXISTS", steps) == 1 then
      return nil, nil, { "corrupt", nonce, steps, "r" }
    end
    return { created = 0, completed = 0 }, lines
  end
  local created, completed, expiry = string.match(line, @READ_RUN .. "(.*)$")
  if not created then
    local deleted_by = string.match(line, "^" .. @TOMBSTONE("(.*)") .. "$")
    if deleted_by then
      return nil, nil, { "tombstone", nonce, deleted_by }
    end
    return nil, nil, unreadable(steps, "r", line)
  end
  if tonumber(completed) ~= completions then
    return nil, nil, { "torn", nonce, done }
  end
  if #created > @MAX_DIGITS then
    return nil, nil, unreadable(steps, "r", line)
  end
  local run = { exists = true, created = created, completed = completed }
  local before = string.match(expiry, "^(.*)" .. @RUN_CANCELLED .. "$")
  if before then
    run.cancelled, expiry = true, before
  end
  if expiry ~= "" then
    run.ttl, run.unleased, run.leased, run.retained_until = string.match(expiry, @READ_RUN_EXPIRY)
    if not run.ttl or math.max(#run.ttl, #run.unleased, #run.leased, #run.retained_until) > @MAX_DIGITS then
      return nil, nil, unreadable(steps, "r", line)
    end
  end
  return run, lines
end

-- Reads the run line and the state line of a step. Returns run, state (nil if there is no record); or nil, nil, refusal.
local function load_step(steps, done, step)
  local run, lines, refusal = load_run(steps, done, "s" .. step, "w" .. step)
  if refusal or not lines[2] then
    return run, nil, refusal
  end
  local state = parse_state(lines[2])
  if not state then
    return nil, nil, unreadable(steps, "s" .. step, lines[2])
  end
  state.mark = lines[3]
  return run, state
end

-- The opening of a script, as macros. Each reads `steps`, `done` and, about a step, `step`. It defines `run`, `state`
-- and `refusal`, and returns the reply if the run is refused or what must exist is missing.
-- define RETURN_REFUSAL if refusal then return refusal end
-- define OPEN_RUN local run, _, refusal = load_run(steps, done) @RETURN_REFUSAL
-- define OPEN_EXISTING_RUN @OPEN_RUN if not run.exists then return { "missing", nonce } end
-- define OPEN_STEP local run, state, refusal = load_step(steps, done, step) @RETURN_REFUSAL
-- define OPEN_EXISTING_STEP @OPEN_STEP if not state then return { "missing", nonce } end
