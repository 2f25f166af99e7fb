-- history: the earlier attempts of a step. Needs record.

local HISTORY = 8 -- past attempts stored per step

local function attempt_field(number, step)
  return "a" .. number .. ":" .. step
end

-- The past attempt whose claim had `token`, or nil. Only for calls that would otherwise be refused.
local function past_attempt(steps, step, state, token)
  if token == "" then
    return nil
  end
  for number = state.attempt - 1, math.max(1, state.attempt - HISTORY), -1 do
    local line = redis.call("HGET", steps, attempt_field(number, step))
    local past = line and parse_state(string.match(line, "^[^\n]*"))
    if past and past.token == token then
      past.error = string.sub(line, #past.line + 2)
      return past
    end
  end
end
