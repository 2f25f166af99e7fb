-- completed_outputs: lists the outputs of a range of a run's completed steps, in completion order.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 first   position to list, from 0
--       3 last    position to list; -1: the last step
-- REPLY {"outputs", nonce, {step, …}, {output, …}}
-- Writes nothing.

-- include record
-- include bulk

local steps, done = KEYS[1], KEYS[2]
@OPEN_RUN

local names = redis.call("ZRANGE", done, ARGV[2], ARGV[3])
local fields = {}
for index, name in ipairs(names) do
  fields[index] = "o" .. name
end
local outputs = read_fields(steps, fields)
for index, output in ipairs(outputs) do
  if not output then
    return { "corrupt", nonce, steps, fields[index] }
  end
end
return { "outputs", nonce, names, outputs }
