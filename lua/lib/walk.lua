-- walk: finds the steps of a run, one page of its hash at a time, so that a long run does not block the server.

-- Returns the next cursor ("0" after the last page) and the fields of the state lines found.
local function walk(steps, cursor, count)
  local names, width = nil, 1
  if cursor == "0" and redis.call("HLEN", steps) <= tonumber(count) then
    names = redis.call("HKEYS", steps)
  else
    -- Redis 7.4, Valkey 8 and later can omit the values, which are payloads and need not be copied.
    local reply = redis.pcall("HSCAN", steps, cursor, "MATCH", "s*", "COUNT", count, "NOVALUES")
    if reply.err then
      reply, width = redis.call("HSCAN", steps, cursor, "MATCH", "s*", "COUNT", math.ceil(count / 5)), 2
    end
    cursor, names = tostring(reply[1]), reply[2] -- older versions of fakeredis return a number
  end
  local fields = {}
  for index = 1, #names, width do
    if string.sub(names[index], 1, 1) == "s" then
      fields[#fields + 1] = names[index]
    end
  end
  return cursor, fields
end
