-- walk: the state lines of a run, a stretch of its hash at a time, so that a long run holds nobody up.

-- Answers the next cursor ("0": that was all) and the names of the fields of the steps found.
local function walk(steps, cursor, count)
  local names, width = nil, 1
  if cursor == "0" and redis.call("HLEN", steps) <= tonumber(count) then
    names = redis.call("HKEYS", steps)
  else
    -- The values are payloads, which need not be copied: servers from Redis 7.4 and Valkey 8 on can leave them out.
    local answer = redis.pcall("HSCAN", steps, cursor, "MATCH", "s*", "COUNT", count, "NOVALUES")
    if answer.err then
      answer, width = redis.call("HSCAN", steps, cursor, "MATCH", "s*", "COUNT", math.ceil(count / 5)), 2
    end
    cursor, names = tostring(answer[1]), answer[2] -- older versions of fakeredis give a number
  end
  local fields = {}
  for index = 1, #names, width do
    if string.sub(names[index], 1, 1) == "s" then
      fields[#fields + 1] = names[index]
    end
  end
  return cursor, fields
end
