-- record: how a run and its steps are written down, and the checks that every script makes first.
--
-- The steps hash of a run, drawn (README.md beside the scripts explains each part):
--
--     r            "1 3 2"                                               run line: format, steps made, completed
--     r            "1 3 2 60000 0 1790000030000"                         the same, of a run that expires
--     r            "1x mUx2Ttq5g3vA"                                     a tombstone
--     s<step>      "1r 2 1 Tk9wZ2xhc3Nl 30000 125  1790000000000 3  "    state line of a step
--     i, o, e      input, output, last error of a step: bytes that no script looks into
--     w<step>      "1"                                                   somebody waits for the step
--     a<n>:<step>  a past attempt: its state line as it ended, "\n", its error
--
-- What is parsed stays text until it is reckoned with: a script that rewrites a line pays for what it changes.
-- Times are milliseconds: in fewer than 15 digits, so that .. writes them whole.

local FORMAT = "1"

-- Status letters. "x" is a failure too: the claim lapsed and no attempt was left to take it over.
local PENDING, RUNNING, COMPLETED, FAILED, EXPIRED = "p", "r", "c", "f", "x"

local nonce = ARGV[1]

-- The one clock. As text: to write a number down costs as much as to call the server, to reckon with text little.
local function now_ms()
  local time = redis.call("TIME")
  return time[1] .. string.sub("00000" .. time[2], -6, -4)
end

-- What to reply about a pcall that failed: a key of another type is told apart, the rest is the server's own error.
local function failed_call(key, answer)
  if string.find(tostring(answer.err), "WRONGTYPE", 1, true) then -- fakeredis gives no string
    return { "wrongtype", nonce, key }
  end
  return answer
end

-- What to reply about a line that does not parse: a later format is not corruption.
local function unreadable(key, field, line)
  local format = string.match(line, "^(%d+)")
  if format and format ~= FORMAT then
    return { "newer", nonce, key, format }
  end
  return { "corrupt", nonce, key, field }
end

local function parse_state(line)
  local status, attempt, released, token, lease, started, ended, created, rest =
    string.match(line, "^1([prcfx]) (%d+) (%d*) (%S*) (%d*) (%d*) (%d*) (%d+) (%d+ %S* .*)$")
  if not status then
    return nil
  end
  return {
    line = line,
    status = status,
    attempt = attempt,
    released = released, -- attempts given back, which do not count against max_attempts; "" for none
    token = token,
    lease = lease, -- since started; "" if the claim never ends by itself
    started = started, -- since created
    ended = ended, -- since started
    created = created,
    rest = rest, -- place among the run's steps, nonce of the call that scheduled it, owner
  }
end

local function format_state(state)
  return FORMAT .. state.status .. " " .. state.attempt .. " " .. state.released .. " " .. state.token .. " "
    .. state.lease .. " " .. state.started .. " " .. state.ended .. " " .. state.created .. " " .. state.rest
end

-- The line of a step that nobody scheduled, when it is claimed for the first time.
local function first_line(token, lease, now, nth, owner)
  return FORMAT .. RUNNING .. " 1  " .. token .. " " .. lease .. " 0  " .. now .. " " .. nth .. "  " .. owner
end

-- An empty token is an operator's: it stands for whoever holds the claim.
local function holds(state, token)
  return state.status == RUNNING and (token == state.token or token == "")
end

-- Ends the attempt in hand. Times run on within a record even if the server's clock is set back.
local function end_attempt(state, status, now)
  state.status = status
  state.lease = ""
  state.ended = math.max(0, now - state.created - state.started)
end

-- Reads the run's line and, if one is named, a step's, and checks the types of both keys and that they agree: a run
-- of which one key was evicted or overwritten is refused, never half believed.
-- Answers run, state (nil: no record), or nil, nil and what to reply.
local function load(steps, done, step)
  local lines = step and redis.pcall("HMGET", steps, "r", "s" .. step, "w" .. step) or redis.pcall("HMGET", steps, "r")
  if lines.err then
    return nil, nil, failed_call(steps, lines)
  end
  local in_order = redis.pcall("ZCARD", done)
  if type(in_order) == "table" then
    return nil, nil, failed_call(done, in_order)
  end
  local line = lines[1]
  if not line then
    if in_order > 0 then
      return nil, nil, { "torn", nonce, steps }
    end
    if redis.call("EXISTS", steps) == 1 then
      return nil, nil, { "corrupt", nonce, steps, "r" }
    end
    return { created = 0, completed = 0 }
  end
  local created, completed, expiry = string.match(line, "^1 (%d+) (%d+)(.*)$")
  if not created then
    local deleted_by = string.match(line, "^1x (.*)$")
    if deleted_by then
      return nil, nil, { "tombstone", nonce, deleted_by }
    end
    return nil, nil, unreadable(steps, "r", line)
  end
  if tonumber(completed) ~= in_order then
    return nil, nil, { "torn", nonce, done }
  end
  local run = { exists = true, created = created, completed = completed }
  if expiry ~= "" then
    local ttl, unleased, hold = string.match(expiry, "^ (%d+) (%d+) (%d+)$")
    if not ttl then
      return nil, nil, unreadable(steps, "r", line)
    end
    run.ttl = ttl
    run.unleased = unleased -- live claims without a lease
    run.hold = hold -- when the last of its leases ends
  end
  if not lines[2] then
    return run
  end
  local state = parse_state(lines[2])
  if not state then
    return nil, nil, unreadable(steps, "s" .. step, lines[2])
  end
  state.awaited = lines[3]
  return run, state
end
