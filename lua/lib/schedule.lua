-- schedule: pending records for steps that have no record. Needs record.

-- include bulk

-- The nonce of the call that scheduled the step.
local function scheduled_by(state)
  return string.match(state.rest, "^" .. @REST("%d+", "(%S*)", ""))
end

-- Looks up the steps at ARGV[first], ARGV[first + 2], …; each is followed by its input.
-- Returns the positions in ARGV of the steps without a record, and of those that an earlier copy of call `by` created.
local function without_record(steps, first, by)
  local fields, missing, created = {}, {}, {}
  for position = first, #ARGV, 2 do
    fields[#fields + 1] = "s" .. ARGV[position]
  end
  for index, line in ipairs(read_fields(steps, fields)) do
    local position = first + 2 * (index - 1)
    if not line then
      missing[#missing + 1] = position
    elseif by ~= "" then
      local state = parse_state(line)
      if state and scheduled_by(state) == by then
        created[#created + 1] = position
      end
    end
  end
  return missing, created
end

-- Writes the pending records and counts them in `run`; the caller writes the run line.
local function write_pending(run, steps, positions, by, now)
  local fields = {}
  for _, position in ipairs(positions) do
    run.created = run.created + 1
    fields[#fields + 1] = "s" .. ARGV[position]
    fields[#fields + 1] = @PENDING_LINE(by, now, run.created)
    fields[#fields + 1] = "i" .. ARGV[position]
    fields[#fields + 1] = ARGV[position + 1]
  end
  write_chunks("HSET", steps, fields)
end
