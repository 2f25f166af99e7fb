-- summarize_run: reads where a run's unfinished steps stand, a stretch of them at a time, and no payload.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 cursor  "0" to begin with, then as replied
--       3 count   of fields to pass in this stretch, more or less
-- REPLY {"summary", nonce, cursor, made, completed, last, {step, state, …}}  last: state of the step completed last, or ""
--       {"missing", nonce}
-- Writes nothing.

-- include record
-- include walk

local steps, done, cursor, count = KEYS[1], KEYS[2], ARGV[2], ARGV[3]
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
if not run.exists then
  return { "missing", nonce }
end
local newest = redis.call("ZRANGE", done, -1, -1)[1]
local last = newest and redis.call("HGET", steps, "s" .. newest) or ""
if tonumber(run.created) == tonumber(run.completed) then
  return { "summary", nonce, "0", run.created, run.completed, last, {} }
end

local fields, unfinished = nil, {}
cursor, fields = walk(steps, cursor, count)
for first = 1, #fields, CHUNK do
  local to = math.min(first + CHUNK - 1, #fields)
  for index, line in ipairs(redis.call("HMGET", steps, unpack(fields, first, to))) do
    if string.sub(line, 2, 2) ~= COMPLETED then
      unfinished[#unfinished + 1] = string.sub(fields[first + index - 1], 2)
      unfinished[#unfinished + 1] = line
    end
  end
end
return { "summary", nonce, cursor, run.created, run.completed, last, unfinished }
