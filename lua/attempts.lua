-- attempts: reads the stored attempts of a step.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"attempts", nonce, past, …, latest}  oldest first; each a state line, "\n", its error
--       {"missing", nonce}
-- Writes nothing.

-- include record
-- include history

local steps, done, step = KEYS[1], KEYS[2], ARGV[2]
@OPEN_EXISTING_STEP

local reply = { "attempts", nonce }
for number = math.max(1, state.attempt - HISTORY), state.attempt - 1 do
  reply[#reply + 1] = redis.call("HGET", steps, attempt_field(number, step)) or nil
end
if state.attempt ~= "0" then
  reply[#reply + 1] = state.line .. "\n" .. (redis.call("HGET", steps, "e" .. step) or "")
end
return reply
