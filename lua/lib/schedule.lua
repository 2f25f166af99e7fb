-- schedule: pending records for steps that have no record. Needs record.

-- include bulk

-- The nonce of the call that scheduled the step.
local function scheduled_by(state)
  return string.match(state.rest, "^" .. @REST("%d+", "(%S*)", ""))
end

-- Looks up the steps at ARGV[first], ARGV[first + width], …; each is followed by its input, and by its fingerprint if
-- width is 3.
-- Returns the positions in ARGV of the steps without a record, of those that an earlier copy of call `by` created, and
-- of the others. Without `by`, the last two are empty.
local function without_record(steps, first, width, by)
  local fields, missing, created, others = {}, {}, {}, {}
  for position = first, #ARGV, width do
    fields[#fields + 1] = "s" .. ARGV[position]
  end
  for index, line in ipairs(read_fields(steps, fields)) do
    local position = first + width * (index - 1)
    if not line then
      missing[#missing + 1] = position
    elseif by ~= "" then
      local state = parse_state(line)
      if state and scheduled_by(state) == by then
        created[#created + 1] = position
      else
        others[#others + 1] = position
      end
    end
  end
  return missing, created, others
end

-- Writes the pending records and counts them in `run`; the caller writes the run line.
local function write_pending(run, steps, positions, width, by, now)
  local fields = {}
  for _, position in ipairs(positions) do
    run.created = run.created + 1
    fields[#fields + 1] = "s" .. ARGV[position]
    fields[#fields + 1] = @PENDING_LINE(by, now, run.created)
    fields[#fields + 1] = "i" .. ARGV[position]
    fields[#fields + 1] = ARGV[position + 1]
    if width == 3 then
      fields[#fields + 1] = "f" .. ARGV[position]
      fields[#fields + 1] = ARGV[position + 2]
    end
  end
  write_chunks("HSET", steps, fields)
end
