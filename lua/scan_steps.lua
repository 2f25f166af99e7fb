-- scan_steps: reads whole records of a run, a stretch of them at a time.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 cursor  "0" to begin with, then as replied
--       3 count   of fields to pass in this stretch, more or less
-- REPLY {"page", nonce, cursor, {field, state, input, output, error, …}}  "" for what is not there; in no order
-- Writes nothing.

-- include record
-- include walk

local steps = KEYS[1]

local _, _, refusal = load(steps, KEYS[2])
if refusal then
  return refusal
end
local cursor, fields = walk(steps, ARGV[2], ARGV[3])
local records = {}
for _, field in ipairs(fields) do
  local step = string.sub(field, 2)
  local values = redis.call("HMGET", steps, field, "i" .. step, "o" .. step, "e" .. step)
  local last = #records
  records[last + 1] = field
  for part = 1, 4 do
    records[last + 1 + part] = values[part] or ""
  end
end
return { "page", nonce, cursor, records }
