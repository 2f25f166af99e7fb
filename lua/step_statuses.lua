-- step_statuses: reads the state line of every step of a run, and no payload.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"states", nonce, {field, …}, {state, …}}  in no order
-- Writes nothing.

-- include record

local steps = KEYS[1]
local STATE = string.byte("s")
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local _, _, refusal = load(steps, KEYS[2])
if refusal then
  return refusal
end
-- The server picks the names out, where it knows how to, before they become Lua's.
local answer = redis.pcall("HSCAN", steps, 0, "MATCH", "s*", "COUNT", redis.call("HLEN", steps) + 1, "NOVALUES")
local fields, lines, count = {}, {}, 0
if not answer.err and tostring(answer[1]) == "0" then
  fields, count = answer[2], #answer[2]
else
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.byte(field) == STATE then
      count = count + 1
      fields[count] = field
    end
  end
end
for first = 1, count, CHUNK do
  local last = math.min(first + CHUNK - 1, count)
  for _, line in ipairs(redis.call("HMGET", steps, unpack(fields, first, last))) do
    lines[#lines + 1] = line
  end
end
return { "states", nonce, fields, lines }
