-- scan_steps: reads whole records of a run, one page at a time.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 cursor  "0" for the first page, then as replied
--       3 count   of fields to scan for this page, approximately
-- REPLY {"page", nonce, cursor, {field, state, input, output, error, progress, …}}  "" for a missing value; unordered
-- Writes nothing.

-- include record
-- include walk

local steps, done = KEYS[1], KEYS[2]
@OPEN_RUN

local cursor, fields = walk(steps, ARGV[2], ARGV[3])
local records = {}
for _, field in ipairs(fields) do
  local step = string.sub(field, 2)
  local values = redis.call("HMGET", steps, field, "i" .. step, "o" .. step, "e" .. step, "p" .. step)
  local last = #records
  records[last + 1] = field
  for part = 1, 5 do
    records[last + 1 + part] = values[part] or ""
  end
end
return { "page", nonce, cursor, records }
