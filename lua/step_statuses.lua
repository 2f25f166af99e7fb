-- step_statuses: reads the state line of every step of a run, without payloads.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"states", nonce, {field, …}, {state, …}}  unordered
-- Writes nothing.

-- include record
-- include bulk

local steps, done = KEYS[1], KEYS[2]
local STATE = string.byte("s")
@OPEN_RUN

-- If the server supports NOVALUES, it selects the fields of state lines itself.
local reply = redis.pcall("HSCAN", steps, 0, "MATCH", "s*", "COUNT", redis.call("HLEN", steps) + 1, "NOVALUES")
local fields = {}
if not reply.err and tostring(reply[1]) == "0" then
  fields = reply[2]
else
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.byte(field) == STATE then
      fields[#fields + 1] = field
    end
  end
end
return { "states", nonce, fields, read_fields(steps, fields) }
