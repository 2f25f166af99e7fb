-- completed_outputs: lists the outputs of a stretch of a run's completed steps in the order of their completion.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 first   of the places to list, from 0
--       3 last    of them; -1: the last there is
-- REPLY {"outputs", nonce, {step, …}, {output, …}}
-- Writes nothing.

-- include record

local steps, done = KEYS[1], KEYS[2]
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local _, _, refusal = load(steps, done)
if refusal then
  return refusal
end
local names = redis.call("ZRANGE", done, ARGV[2], ARGV[3])
local outputs = {}
for first = 1, #names, CHUNK do
  local fields = {}
  for index = first, math.min(first + CHUNK - 1, #names) do
    fields[#fields + 1] = "o" .. names[index]
  end
  for index, output in ipairs(redis.call("HMGET", steps, unpack(fields))) do
    if not output then
      return { "corrupt", nonce, steps, fields[index] }
    end
    outputs[#outputs + 1] = output
  end
end
return { "outputs", nonce, names, outputs }
