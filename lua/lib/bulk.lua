-- bulk: commands with any number of arguments, in chunks. Needs record.

-- The values of the fields, in their order; false for a missing one.
local function read_fields(key, fields)
  local values = {}
  for first = 1, #fields, @CHUNK do
    local chunk = redis.call("HMGET", key, unpack(fields, first, math.min(first + @CHUNK - 1, #fields)))
    for index = 1, #chunk do
      values[first + index - 1] = chunk[index]
    end
  end
  return values
end

-- Writes `arguments` from the position `start` on, or all.
local function write_chunks(command, key, arguments, start)
  for first = start or 1, #arguments, @CHUNK do
    redis.call(command, key, unpack(arguments, first, math.min(first + @CHUNK - 1, #arguments)))
  end
end
