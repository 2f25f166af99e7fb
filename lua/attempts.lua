-- attempts: reads what is known of a step's attempts.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"attempts", nonce, past, …, latest}  oldest first; each a state line, "\n", its error
--       {"missing", nonce}
-- Writes nothing.

-- include record
-- include history

local steps, step = KEYS[1], ARGV[2]

local _, state, refusal = load(steps, KEYS[2], step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
local reply = { "attempts", nonce }
for number = math.max(1, state.attempt - HISTORY), state.attempt - 1 do
  reply[#reply + 1] = redis.call("HGET", steps, "a" .. number .. ":" .. step) or nil
end
if state.attempt ~= "0" then
  reply[#reply + 1] = state.line .. "\n" .. (redis.call("HGET", steps, "e" .. step) or "")
end
return reply
