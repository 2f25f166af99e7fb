-- schedule: pending records for steps that have none. Needs record.

local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

-- The nonce of the call that scheduled the step.
local function scheduled_by(state)
  return string.match(state.rest, "^%d+ (%S*)")
end

local function pending_line(by, now, nth)
  return FORMAT .. PENDING .. " 0      " .. now .. " " .. nth .. " " .. by .. " "
end

-- Which of the steps (names at ARGV[first], ARGV[first + 2], … and their inputs behind them) have no record.
-- Answers their positions, and those of the ones that the call `by` made before its reply was lost.
local function without_record(steps, first, by)
  local missing, made = {}, {}
  for chunk = first, #ARGV, 2 * CHUNK do
    local fields = {}
    for position = chunk, math.min(chunk + 2 * CHUNK, #ARGV) - 1, 2 do
      fields[#fields + 1] = "s" .. ARGV[position]
    end
    for index, line in ipairs(redis.call("HMGET", steps, unpack(fields))) do
      local position = chunk + 2 * (index - 1)
      if not line then
        missing[#missing + 1] = position
      elseif by ~= "" then
        local state = parse_state(line)
        if state and scheduled_by(state) == by then
          made[#made + 1] = position
        end
      end
    end
  end
  return missing, made
end

-- Writes the pending records, and counts them in the run; its line is for the caller to write.
local function write_pending(run, steps, positions, by, now)
  for chunk = 1, #positions, CHUNK do
    local fields = {}
    for index = chunk, math.min(chunk + CHUNK - 1, #positions) do
      local position = positions[index]
      run.created = run.created + 1
      fields[#fields + 1] = "s" .. ARGV[position]
      fields[#fields + 1] = pending_line(by, now, run.created)
      fields[#fields + 1] = "i" .. ARGV[position]
      fields[#fields + 1] = ARGV[position + 1]
    end
    redis.call("HSET", steps, unpack(fields))
  end
end
